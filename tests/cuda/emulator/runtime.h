// The CUDA runtime calls that the launch functions make; part of emulator.h, which includes it last.
#pragma once

using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
struct cudaFuncAttributes {
  int ptxVersion;
};
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
  *device = emulator::device();
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
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute which, int value) {
  emulator::Function& function = emulator::function(reinterpret_cast<const void*>(kernel));
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > emulator::machine.max_shared) return cudaErrorInvalidValue;
    function.shared = value;
  } else {
    function.large_clusters = value;
  }
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
  attributes->ptxVersion = emulator::machine.compiled;
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*)(P...), const cudaLaunchConfig_t* config) {
  *count = config->attrs[0].val.clusterDim.x <= unsigned(emulator::machine.max_cluster);
  return cudaSuccess;
}
template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  emulator::Launch launch{config->gridDim, config->blockDim, config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      launch.cluster = attribute.val.clusterDim.x;
    else
      launch.overlap = attribute.val.programmaticStreamSerializationAllowed;
  }
  // Arguments lie in constant memory, not in device memory: not checked.
  auto call = [&]() __attribute__((noinline, no_sanitize("thread", "undefined"))) { kernel(arguments...); };
  auto enter = [](void* context) __attribute__((no_sanitize("thread", "undefined"))) {
    (*static_cast<decltype(call)*>(context))();
  };
  return emulator::run(launch, reinterpret_cast<const void*>(kernel), enter, &call) ? cudaSuccess
                                                                                    : cudaErrorInvalidValue;
}
