// The device memory that the kernels of one call share, how its numbers are read, and the stages' launch functions.
#pragma once
#include <cmath>

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

template <typename A>
__device__ __forceinline__ A element(Tensor t, int64_t i) {
  switch (t.type) {
    case Type::kFloat16:
      return Convert<__half, A>::widen(static_cast<const __half*>(t.data)[i]);
    case Type::kBFloat16:
      return Convert<__nv_bfloat16, A>::widen(static_cast<const __nv_bfloat16*>(t.data)[i]);
    case Type::kFloat64:
      return A(static_cast<const double*>(t.data)[i]);
    default:
      return A(static_cast<const float*>(t.data)[i]);
  }
}

template <typename A>
__device__ __forceinline__ void set_element(Tensor t, int64_t i, A value) {
  switch (t.type) {
    case Type::kFloat16:
      static_cast<__half*>(t.data)[i] = Convert<__half, A>::narrow(value);
      break;
    case Type::kBFloat16:
      static_cast<__nv_bfloat16*>(t.data)[i] = Convert<__nv_bfloat16, A>::narrow(value);
      break;
    case Type::kFloat64:
      static_cast<double*>(t.data)[i] = double(value);
      break;
    default:
      static_cast<float*>(t.data)[i] = float(value);
  }
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

inline int capability_major() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major;
}

inline bool fast_shape(const ObjectiveArgs& args) {
  auto aligned = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; };
  bool has = args.features.data != nullptr;
  return has && args.features.type != Type::kFloat64 && args.dim == kDim && args.classes <= kClasses &&
         args.prototype_count <= kPrototypes && aligned(args.features) && aligned(args.grad_features);
}

// Stages of the large and the general path.
cudaError_t launch_prepare(const ObjectiveArgs& args, cudaStream_t stream);
cudaError_t launch_class_sums(const ObjectiveArgs& args, cudaStream_t stream);
cudaError_t launch_rows(const ObjectiveArgs& args, cudaStream_t stream);
cudaError_t launch_general(const ObjectiveArgs& args, cudaStream_t stream);
int small_cluster(const ObjectiveArgs& args);  // blocks of the cluster that holds the batch; 0 where none does
cudaError_t launch_small(const ObjectiveArgs& args, int cluster, cudaStream_t stream);

}  // namespace ngd_fast
