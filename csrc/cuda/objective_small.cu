// The whole objective, values and gradients, in one launch: a cluster of 16 (or 8) blocks holds the batch's normalised
// rows and gradients in its shared memory, and exchanges the class sums through it. D=256, C<=8, K<=32, B <= 16 x
// blocks: on an H100 three launches are faster from there on (bench/RESULTS.md).
#include <atomic>

#include "objective_ffma.cuh"

namespace ngd_fast {
namespace {

constexpr int kMostCluster = 16, kMostRows = 16;  // rows of one block: 2 KB of shared memory each
static_assert(kMostCluster * kMostRows <= kFfmaThreads);  // a thread for each row of the batch

struct alignas(16) SmallShared {  // 16: the rows that follow it are read as float4
  float partial[kClasses][kDim];  // class sums of this block's rows; the cluster reads them
  float mean[kClasses][kDim];     // class means of the batch; each block of the cluster writes its columns
  float gradient[kClasses][kDim];
  ChunkShared chunk;
  float partial_square[kClasses], square[kClasses], rows[kClasses], geo[kClasses][2];
  RowTerms<float> terms[kMostCluster];  // of rank 0: each block's
  int flags[kMostCluster];
  float scratch[3 * kFfmaThreads / 32];
  RowScales<float> scales;
  int label_count[kClasses], target_count[kClasses], own_flags;
  int label[kMostRows];
  float scale[kMostRows], row_square[kMostRows];
};

__host__ __device__ inline int rows_per_block(int64_t rows, int cluster) { return int((rows + cluster - 1) / cluster); }
__host__ __device__ inline int padded(int rows) { return (rows + kChunk - 1) / kChunk * kChunk; }
inline size_t small_shared(int rows) { return sizeof(SmallShared) + size_t(padded(rows)) * 2 * kDim * sizeof(float); }

// How often each class occurs in the whole batch, a row's class in each thread. Each block counts for itself: cheaper
// than an exchange.
__device__ void count_classes(int c, int* counts) {
  int lane = int(threadIdx.x % 32);
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    int count = __popc(__ballot_sync(kAllLanes, c == i));
    if (lane == i && count) atomicAdd(counts + i, count);
  }
}

template <typename T>
__global__ void __launch_bounds__(kFfmaThreads, 1) small_objective(const __grid_constant__ ObjectiveArgs args) {
#ifdef NGD_CLUSTERS
  auto& s = *reinterpret_cast<SmallShared*>(shared_memory());
  int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int rank = int(cluster_rank()), size = int(cluster_size());
  int share = rows_per_block(args.rows, size);
  int64_t first = int64_t(rank) * share;
  int rows = int(args.rows - first < share ? (args.rows > first ? args.rows - first : 0) : share);
  float* f = reinterpret_cast<float*>(&s + 1);  // [share padded][256]
  float* gradient = f + padded(share) * kDim;

  // All that is needed first, asked for at once.
  int64_t target = kIgnoreIndex, label = kNoLabel;
  if (args.target && thread < args.rows) target = args.target[thread];
  if (args.labels && thread < args.rows) label = args.labels[thread];
  Eight<T> raw{};
  if (warp < rows) raw = Ffma<T>::load(args, first + warp);
  Ffma<T> ffma(args, s.chunk);
  if (thread < kClasses) s.label_count[thread] = s.target_count[thread] = 0;
  if (thread == 0) s.own_flags = 0;
  __syncthreads();
  if (int own = thread - int(first); own >= 0 && own < rows) {
    int flags = 0;
    s.label[own] = label_class(label, args.classes, flags);
    if (flags) s.own_flags = flags;  // only ever kBadLabel
  }
  if (args.target) count_classes(class_of(target, args.classes), s.target_count);
  if (args.labels) count_classes(class_of(label, args.classes), s.label_count);

  RowTerms<float> terms{};
  float sums[kClasses] = {};
  for (int base = 0; base < rows; base += kChunk) {
    int count = rows - base < kChunk ? rows - base : kChunk;
    if (warp < count) {
      float square, scale = Ffma<T>::normalize(raw, f + (base + warp) * kDim, &square);
      if (base + kChunk + warp < rows) raw = Ffma<T>::load(args, first + base + kChunk + warp);
      if (lane == 0) {
        s.scale[base + warp] = scale;
        s.row_square[base + warp] = square;
      }
    }
    __syncthreads();
    for (int r = base; r < base + count; ++r) {
      float x = f[r * kDim + thread];
      int label = s.label[r];
#pragma unroll
      for (int c = 0; c < kClasses; ++c) sums[c] += label == c ? x : 0.0f;
    }
    ffma.chunk(args, first + base, count, f + base * kDim, gradient + base * kDim, terms);
  }
#pragma unroll
  for (int c = 0; c < kClasses; ++c) s.partial[c][thread] = sums[c];
  if (thread < kClasses) {
    float square = 0;
    for (int r = 0; r < rows; ++r) square += s.label[r] == thread ? s.row_square[r] : 0.0f;
    s.partial_square[thread] = square;
  }
  cluster_arrive();  // a barrier of this block too: between here and the wait, work that needs no other block
  __syncthreads();
  place_row_scales(args, [&](int c) { return s.target_count[c]; }, s.scales);
  if (args.logits.data && thread < rows) {
    int flags = 0;
    logits_row<float, true>(args, first + thread, s.scales, terms, flags);
    if (flags) atomicOr(&s.own_flags, flags);
  }
  RowTerms<float> own = block_sum(terms, s.scratch);
  cluster_wait();

  // Each block adds up its share of the columns and gives every block the means.
  int columns = kDim / size;
  for (int i = thread; i < kClasses * columns; i += kFfmaThreads) {
    int c = i / columns, slot = rank * columns + i % columns;
    float sum = 0, count = float(s.label_count[c]);
    if (args.class_sums.data) {
      sum = c < args.classes ? given<float>(args.class_sums, c * (kDim + 2) + slot_column(slot)) : 0.0f;
      count = c < args.classes ? given<float>(args.class_sums, c * (kDim + 2) + kDim) : 0.0f;
    } else {
#pragma unroll 8
      for (int other = 0; other < size; ++other) sum += *cluster_map(&s.partial[c][slot], unsigned(other));
    }
    float mean = count > 0.0f ? sum / count : 0.0f;
#pragma unroll 8
    for (int other = 0; other < size; ++other) *cluster_map(&s.mean[c][slot], unsigned(other)) = mean;
  }
  if (thread >= kFfmaThreads - kClasses) {
    int c = thread - (kFfmaThreads - kClasses);
    float square = 0, count = float(s.label_count[c]);
    if (args.class_sums.data) {
      count = c < args.classes ? given<float>(args.class_sums, c * (kDim + 2) + kDim) : 0.0f;
      square = c < args.classes ? given<float>(args.class_sums, c * (kDim + 2) + kDim + 1) : 0.0f;
    } else {
#pragma unroll 8
      for (int other = 0; other < size; ++other) square += *cluster_map(&s.partial_square[c], unsigned(other));
    }
    s.square[c] = square;
    s.rows[c] = count;
  }
  if (thread == 0) {
    *cluster_map(&s.terms[rank], 0u) = own;
    *cluster_map(&s.flags[rank], 0u) = s.own_flags;
  }
  cluster_arrive();
  cluster_wait();

  if (args.labels && warp < args.classes) {
    float var, margin;
    class_terms_256(args, warp, s.mean, s.rows, s.square, s.gradient[warp], &var, &margin);
    if (lane == 0) {
      s.geo[warp][0] = var;
      s.geo[warp][1] = margin;
    }
  }
  __syncthreads();
  if (args.grad_features.data)
    for (int r = warp; r < rows; r += kFfmaThreads / 32)
      Ffma<T>::store_gradient(args, first + r, f + r * kDim, gradient + r * kDim,
                              s.label[r] < 0 ? nullptr : s.gradient[s.label[r]], s.scale[r]);
  if (rank == 0 && thread == 0) {
    RowTerms<float> all{};
    float var = 0, margin = 0;
    int flags = 0;
    for (int i = 0; i < size; ++i) {
      all.ce += s.terms[i].ce;
      all.kd += s.terms[i].kd;
      all.proto += s.terms[i].proto;
      flags |= s.flags[i];
    }
    for (int c = 0; args.labels && c < args.classes; ++c) {
      var += s.geo[c][0];
      margin += s.geo[c][1];
      if (!(s.square[c] - s.square[c] == 0.0f)) flags |= kNotFinite;
    }
    write_output(args, all, s.scales, var, margin, flags);
  }
#endif
}

template <typename T>
cudaError_t start(const ObjectiveArgs& args, int cluster, cudaStream_t stream) {
  size_t shared = small_shared(rows_per_block(args.rows, cluster));
  return launch(small_objective<T>, dim3(unsigned(cluster)), dim3(kFfmaThreads), shared, stream, false,
                unsigned(cluster), args);
}

// Whether a cluster of this many blocks, each with this many rows, can run on the current device.
template <typename T>
bool fits(int cluster, int rows) {
  int device = 0, most = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  size_t shared = small_shared(rows);
  if (shared > size_t(most)) return false;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(cluster));
  config.blockDim = dim3(kFfmaThreads);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  // The shared memory that any such launch may ask for: the attribute is the function's, and calls differ in their
  // rows.
  size_t allowed = small_shared(kMostRows) < size_t(most) ? small_shared(kMostRows) : size_t(most);
  bool good =
      cudaFuncSetAttribute(small_objective<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(allowed)) ==
          cudaSuccess &&
      cudaFuncSetAttribute(small_objective<T>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&count, small_objective<T>, &config) == cudaSuccess && count > 0;
  if (!good) cudaGetLastError();  // a refusal here is an answer, not a failure
  return good;
}

template <typename T>
int choose(const ObjectiveArgs& args) {
  // Asked once for each device and block size in chunks: -1 unknown, else the cluster.
  constexpr int kDevices = 64, kSizes = kMostRows / kChunk;
  static std::atomic<signed char> known[kDevices][2 * kSizes + 1];  // 0 unknown, else 1 + answer
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  int chunks = padded(rows_per_block(args.rows, kMostCluster)) / kChunk;
  if (chunks > kSizes) return 0;
  auto& answer = known[device][chunks];
  if (answer == 0) {
    int found = 0, largest = chosen("NGD_FAST_CUDA_CLUSTER", kMostCluster);
    for (int cluster : {16, 8})
      if (!found && cluster <= largest && chunks * kChunk * (kMostCluster / cluster) <= kMostRows &&
          fits<T>(cluster, chunks * kChunk * (kMostCluster / cluster)))
        found = cluster;
    answer = static_cast<signed char>(1 + found);
  }
  return answer - 1;
}

}  // namespace

int small_cluster(const ObjectiveArgs& args) {
  if (!fast_shape(args) || args.terms.type == Type::kFloat64 || args.rows > kMostCluster * kMostRows ||
      capability_major() < 9)
    return 0;
  switch (args.features.type) {
    case Type::kFloat16:
      return choose<__half>(args);
    case Type::kBFloat16:
      return choose<__nv_bfloat16>(args);
    default:
      return choose<float>(args);
  }
}

cudaError_t launch_small(const ObjectiveArgs& args, int cluster, cudaStream_t stream) {
  switch (args.features.type) {
    case Type::kFloat16:
      return start<__half>(args, cluster, stream);
    case Type::kBFloat16:
      return start<__nv_bfloat16>(args, cluster, stream);
    default:
      return start<float>(args, cluster, stream);
  }
}

}  // namespace ngd_fast
