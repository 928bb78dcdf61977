// The CUDA runtime calls that the launch functions make; part of emulator.h, which includes it last.
#pragma once

using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttributeValue {
  uint3 clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount      ? emulator::machine.multiprocessors
           : which == cudaDevAttrComputeCapabilityMajor ? emulator::machine.capability / 10
                                                        : emulator::machine.max_shared;
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*)(P...), const cudaLaunchConfig_t* config) {
  *count = config->attrs[0].val.clusterDim.x <= unsigned(emulator::machine.max_cluster);
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, void (*)(P...), int, size_t shared) {
  *count = shared <= size_t(emulator::machine.max_shared);
  return cudaSuccess;
}
template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  unsigned size = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) size = config->attrs[i].val.clusterDim.x;
  unsigned blocks = config->gridDim.x * config->gridDim.y * config->gridDim.z, threads = config->blockDim.x;
  if (!blocks || blocks % size || threads > 1024 || config->dynamicSmemBytes > size_t(emulator::machine.max_shared))
    return cudaErrorInvalidValue;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulator::body = [&] { kernel(arguments...); };
  size_t bytes = size_t(size) * threads * emulator::kStack;
  void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) emulator::fail("no memory for the fibers' stacks");
  std::mt19937 random(emulator::machine.seed);
  std::vector<unsigned> order(blocks / size);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i * size;
  if (emulator::machine.seed) std::shuffle(order.begin(), order.end(), random);
  for (unsigned first : order)
    emulator::run_cluster(first, size, threads, config->dynamicSmemBytes, static_cast<char*>(stacks), random);
  munmap(stacks, bytes);
  emulator::current = nullptr;
  return cudaSuccess;
}
