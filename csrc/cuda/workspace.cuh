// The device memory that the kernels of one call share, how its numbers are read, and the stages' launch functions.
#pragma once
#include <cmath>
#include <type_traits>

#include "device.cuh"
#include "objective.h"
#include "objective_cuda.h"

namespace ngd_fast {

constexpr int kDim = 256, kClasses = 8, kPrototypes = 32;  // the fast shapes: D, and the most C and K
// Sums over rows as 64-bit integers. |sum| <= rows, so this many fractional bits cannot overflow (two bits to spare).
__host__ __device__ inline int fraction_bits(int64_t rows) {
  int bits = 0;
  while (bits < 40 && (int64_t(1) << bits) <= rows) ++bits;
  return 61 - bits;
}

// Class sums [C, D+2] (S | n | q; S and q in fixed point), then the counts of the targets, flags and the ticket; all
// zeroed by `prepare`. The rest is written before it is read.
template <typename A>
struct Workspace {
  long long* sums;           // [C, D+2]
  long long* target_counts;  // [C]
  int* flags;
  int* ticket;
  int64_t zero_words;  // how many 8-byte words from sums on `prepare` zeroes
  A* prototype_scale;  // [K] 1 / norm
  A* partial;          // [blocks, 3] sums of CE, KD and Proto-KD over a block's rows
  A* class_gradient;   // [C, D]                (general path)
  A* class_terms;      // [C, 2] variance and margin terms (general path)
};

constexpr int kMaxBlocks = 4096;  // of a rows kernel: sizes Workspace::partial

template <typename A>
__host__ __device__ inline Workspace<A> workspace(const ObjectiveArgs& args, size_t* bytes = nullptr) {
  Workspace<A> w;
  auto* base = static_cast<unsigned char*>(args.workspace);
  int64_t words = int64_t(args.classes) * (args.dim + 2);
  w.sums = reinterpret_cast<long long*>(base);
  w.target_counts = w.sums + words;
  w.flags = reinterpret_cast<int*>(w.target_counts + args.classes);
  w.ticket = w.flags + 1;
  w.zero_words = words + args.classes + 1;
  w.prototype_scale = reinterpret_cast<A*>(w.sums + w.zero_words);
  w.partial = w.prototype_scale + args.prototype_count;
  w.class_gradient = w.partial + 3 * kMaxBlocks;
  w.class_terms = w.class_gradient + int64_t(args.classes) * args.dim;
  if (bytes) *bytes = size_t(reinterpret_cast<unsigned char*>(w.class_terms + 2 * args.classes) - base);
  return w;
}

// Calls f with the data as a pointer to the type it has: one branch for whatever f reads. Float64 is computed in
// float64.
template <typename A, typename F>
__device__ __forceinline__ void with_type(const Tensor& t, F f) {
  if (t.type == Type::kFloat16) return f(static_cast<__half*>(t.data));
  if (t.type == Type::kBFloat16) return f(static_cast<__nv_bfloat16*>(t.data));
  if constexpr (sizeof(A) == 8)
    if (t.type == Type::kFloat64) return f(static_cast<double*>(t.data));
  f(static_cast<float*>(t.data));
}

// Element i of what comes in the type that is computed in (objective_cuda.h): no branch, and a short kernel.
template <typename A>
__device__ __forceinline__ A given(const Tensor& t, int64_t i) {
  return static_cast<const A*>(t.data)[i];
}

template <typename A, typename T>
__device__ __forceinline__ A widened(T v) {
  return Convert<T, A>::widen(v);
}

template <typename A>
__device__ __forceinline__ A element(const Tensor& t, int64_t i) {
  A out;
  with_type<A>(t, [&](auto* data) { out = widened<A>(data[i]); });
  return out;
}

template <typename A>
__device__ __forceinline__ void set_element(const Tensor& t, int64_t i, A value) {
  with_type<A>(t, [&](auto* data) { narrow(data[i], value); });
}

// Elements i ... i + 7, by 16-byte accesses where they are aligned; `kAligned`: they are.
template <typename A, bool kAligned>
__device__ __forceinline__ void eight_elements(const Tensor& t, int64_t i, A (&out)[8]) {
  with_type<A>(t, [&](auto* data) {
    if (kAligned || is_aligned(data + i)) {
      auto raw = load_eight(data + i);
#pragma unroll
      for (int e = 0; e < 8; ++e) out[e] = widened<A>(raw.at[e]);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) out[e] = widened<A>(data[i + e]);
    }
  });
}

template <typename A, bool kAligned>
__device__ __forceinline__ void set_eight_elements(const Tensor& t, int64_t i, const A (&values)[8]) {
  with_type<A>(t, [&](auto* data) {
    Eight<std::remove_pointer_t<decltype(data)>> raw;
#pragma unroll
    for (int e = 0; e < 8; ++e) narrow(raw.at[e], values[e]);
    if (kAligned || is_aligned(data + i)) {
      store_eight(data + i, raw);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) data[i + e] = raw.at[e];
    }
  });
}

// Blocks of a launch that fills the device once with kernels of this many blocks a multiprocessor.
inline int persistent_blocks(int64_t work, int per_multiprocessor) {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  int64_t blocks = int64_t(count) * per_multiprocessor;
  if (blocks > kMaxBlocks) blocks = kMaxBlocks;
  return int(work < blocks ? (work > 0 ? work : 1) : blocks);
}

// Major compute capability that the kernels to run on the current device were compiled for. Below the device's where
// the driver compiles them from the PTX of an older one: clusters and waiting for the kernel before are then not in
// them.
int capability_major();

inline bool fast_shape(const ObjectiveArgs& args) {
  bool has = args.features.data != nullptr, aligned = true;
  for (const Tensor* t : {&args.features, &args.grad_features, &args.logits, &args.grad_logits, &args.teacher_logits,
                          &args.target_distribution, &args.prototypes, &args.class_weight})
    aligned = aligned && is_aligned(t->data);
  return has && aligned && args.features.type != Type::kFloat64 && args.dim == kDim && args.classes <= kClasses &&
         args.prototype_count <= kPrototypes;
}

// Stages of the large and the general path.
cudaError_t launch_prepare(const ObjectiveArgs& args, cudaStream_t stream);
cudaError_t launch_class_sums(const ObjectiveArgs& args, cudaStream_t stream);
cudaError_t launch_rows(const ObjectiveArgs& args, cudaStream_t stream);
cudaError_t launch_general(const ObjectiveArgs& args, cudaStream_t stream);
int small_cluster(const ObjectiveArgs& args);  // blocks of the cluster that holds the batch; 0 where none does
cudaError_t launch_small(const ObjectiveArgs& args, int cluster, cudaStream_t stream);

}  // namespace ngd_fast
