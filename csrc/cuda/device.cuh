// What the kernels need of the machine: warps, clusters, tensor cores, 16-byte accesses, launches. Compiled by nvcc, or
// by a C++ compiler against tests/cuda/emulator, which then supplies everything inside the first #ifdef.
#pragma once
#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#elif !defined(NGD_EMULATED)
#error "compile with nvcc, or with -include tests/cuda/emulator/emulator.h"
#endif
#include <cstdint>
#include <cstdlib>

namespace ngd_fast {

constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef __CUDACC__
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define NGD_CLUSTERS 1
__device__ inline unsigned cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ inline unsigned cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
// Arrive releases, wait acquires: what a thread wrote before is visible to the cluster after.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
template <typename T>
__device__ T* cluster_map(T* own, unsigned rank) {
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
}
// Programmatic dependent launch: a kernel may start while its predecessor drains; it waits here before reading its
// results.
__device__ inline void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ inline void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
__device__ inline void wait_for_previous_kernel() {}
__device__ inline void let_next_kernel_start() {}
#endif

// The compiler must not keep what it derived from this word: deriving it again is cheaper than the registers.
__device__ __forceinline__ void forget(uint32_t& word) { asm volatile("" : "+r"(word)); }

template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <typename T>
__device__ __forceinline__ void mma_16x8x8(float (&acc)[4], const uint32_t (&a)[2], uint32_t b);

#define NGD_DEFINE_MMA(TYPE, NAME)                                                                                   \
  template <>                                                                                                        \
  __device__ __forceinline__ void mma_16x8x16<TYPE>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                                       \
        ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"                                                                  \
        "{%0,%1,%2,%3};"                                                                                             \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                         \
  }                                                                                                                  \
  template <>                                                                                                        \
  __device__ __forceinline__ void mma_16x8x8<TYPE>(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {              \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"       \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(b));                                                                             \
  }
NGD_DEFINE_MMA(__nv_bfloat16, "bf16")
NGD_DEFINE_MMA(__half, "f16")
#undef NGD_DEFINE_MMA

// 0xffff in each half where the halves of a and b, small integers, are equal: as float16 they are denormals, told apart.
__device__ __forceinline__ uint32_t equal_halves(uint32_t a, uint32_t b) {
  return __heq2_mask(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
}
// Sums of two pairs of T, each rounded.
template <typename T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t add_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
  __nv_bfloat162 sum = __hadd2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<uint32_t*>(&sum);
}
template <>
__device__ __forceinline__ uint32_t add_pairs<__half>(uint32_t a, uint32_t b) {
  __half2 sum = __hadd2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<uint32_t*>(&sum);
}
#else
#define NGD_CLUSTERS 1
#endif

template <typename T>
__device__ __forceinline__ float to_float(T v) {
  return v;
}
template <>
__device__ __forceinline__ float to_float(__half v) {
  return __half2float(v);
}
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
template <typename T, typename A>
struct Convert {
  static __device__ __forceinline__ A widen(T v) { return to_float(v); }
  static __device__ __forceinline__ T narrow(A v) { return T(v); }
};
template <>
struct Convert<double, double> {
  static __device__ __forceinline__ double widen(double v) { return v; }
  static __device__ __forceinline__ double narrow(double v) { return v; }
};
template <typename A>
struct Convert<__half, A> {
  static __device__ __forceinline__ A widen(__half v) { return __half2float(v); }
  static __device__ __forceinline__ __half narrow(A v) { return __float2half_rn(float(v)); }
};
template <typename A>
struct Convert<__nv_bfloat16, A> {
  static __device__ __forceinline__ A widen(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(A v) { return __float2bfloat16_rn(float(v)); }
};

template <typename T, typename A>
__device__ __forceinline__ void narrow(T& to, A v) {
  to = Convert<T, A>::narrow(v);
}

__host__ __device__ inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Eight elements of T, moved as 16-byte words.
template <typename T>
struct alignas(16) Eight {
  T at[8];
};
template <typename T>
__device__ __forceinline__ Eight<T> load_eight(const T* from) {
  Eight<T> out;
#pragma unroll
  for (int i = 0; i < int(sizeof(out) / 16); ++i)
    reinterpret_cast<uint4*>(&out)[i] = reinterpret_cast<const uint4*>(from)[i];
  return out;
}
template <typename T>
__device__ __forceinline__ void store_eight(T* to, const Eight<T>& v) {
#pragma unroll
  for (int i = 0; i < int(sizeof(v) / 16); ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&v)[i];
}

// Sum (largest) over the lanes whose numbers differ in the bits of kSpan - 1, given to each of them; the order is
// fixed.
template <int kSpan = 32, typename A>
__device__ __forceinline__ A warp_sum(A v) {
#pragma unroll
  for (int offset = kSpan / 2; offset; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}
template <int kSpan = 32, typename A>
__device__ __forceinline__ A warp_max(A v) {
#pragma unroll
  for (int offset = kSpan / 2; offset; offset /= 2) {
    A other = __shfl_xor_sync(kAllLanes, v, offset);
    v = v < other || other != other ? other : v;
  }
  return v;
}

// An alternative that is compiled in and chosen by the environment, so that choosing is a measurement on a GPU and no
// edit: NGD_FAST_CUDA_CLUSTER=16|8|0, the largest cluster (0: the large path from the first row on);
// NGD_FAST_CUDA_OVERLAP=1|0. Read once, at the first launch.
inline int chosen(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::atoi(value) : otherwise;
}

// Starts a kernel on a stream. `overlap`: it may begin while the one before it drains (compute capability 9.0 and
// later).
template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, bool overlap,
                   unsigned cluster, A... arguments) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = cluster;
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  static const bool overlaps = chosen("NGD_FAST_CUDA_OVERLAP", 1) != 0;
  if (overlap && overlaps) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace ngd_fast
