// Stage 1 of the large path (objective_rows.cu follows) and of the general one (objective_general.cu): prepare (zeroes,
// norms of the prototypes), then the sums over rows that every row's gradient needs: per class S, n and q for D-Geo, per
// class the number of targets for the mean of the cross-entropy.
#include <atomic>

#include "workspace.cuh"

namespace ngd_fast {
namespace {

template <typename A>
__device__ void add_fixed(long long* to, A value, int bits, int* flags) {
  if (!(value - value == A(0))) {
    atomicOr(flags, int(kNotFinite));
    return;
  }
  long long fixed = __double2ll_rn(ldexp(double(value), bits));
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(fixed));
}

__device__ void add_count(long long* to, int count) {
  if (count) atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(count));
}

template <typename A>
__global__ void __launch_bounds__(256) prepare(const __grid_constant__ ObjectiveArgs args) {
  let_next_kernel_start();
  Workspace<A> w = workspace<A>(args);
  int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = thread; i < w.zero_words; i += threads) w.sums[i] = 0;
  int lane = int(threadIdx.x % 32);
  for (int64_t k = thread / 32; k < args.prototype_count; k += threads / 32) {
    A squares = 0;
    for (int d = lane; d < args.dim; d += 32) {
      A p = given<A>(args.prototypes, k * args.dim + d);
      squares += p * p;
    }
    A scale = inverse_norm(warp_sum(squares));
    if (lane == 0) w.prototype_scale[k] = scale;
  }
}

// How often each class is a row's target; a warp takes 32 rows at a time. Behind the wait for the kernel before.
template <typename A>
__device__ void count_targets(const ObjectiveArgs& args, const Workspace<A>& w) {
  int lane = int(threadIdx.x % 32), low = 0, high = 0;
  int64_t warp = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32, warps = int64_t(gridDim.x) * blockDim.x / 32;
  for (int64_t base = warp * 32; base < args.rows; base += warps * 32) {
    int64_t row = base + lane;
    int target = row < args.rows ? class_of(args.target[row], args.classes) : -1;
    for (int c = 0; c < args.classes; ++c) {
      int count = __popc(__ballot_sync(kAllLanes, target == c));
      if (c == lane) low += count;
      if (c == lane + 32) high += count;
    }
  }
  if (lane < args.classes) add_count(w.target_counts + lane, low);
  if (lane + 32 < args.classes) add_count(w.target_counts + lane + 32, high);
}

// D=256, C<=8. A warp reads whole rows, 8 columns a lane, and keeps all eight class sums in registers; the branch on
// the label is the same for all its lanes. Issue slots for a row: some 50, half of what reading it takes at full
// bandwidth.
template <typename T>
__global__ void __launch_bounds__(512, 1) class_sums_256(const __grid_constant__ ObjectiveArgs args) {
  constexpr int kWarps = 16, kBatch = sizeof(T) == 2 ? 4 : 2;
  let_next_kernel_start();
  Workspace<float> w = workspace<float>(args);
  int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  float acc[kClasses][8] = {};
  int count = 0;
  float squares = 0;
  Eight<T> batch[kBatch], next[kBatch] = {};
  int label = -1, next_label = -1;
  int rows = int(args.rows), stride = int(gridDim.x) * kWarps * kBatch;  // 2^31 rows of 256 would be a terabyte
  auto fetch = [&](int base) {
#pragma unroll
    for (int r = 0; r < kBatch; ++r)
      if (base + r < rows)  // the pointer read again rather than kept: the registers are all taken
        next[r] = load_eight(static_cast<const T*>(args.features.data) + (int64_t(base + r) * kDim + lane * 8));
    bool mine = lane < kBatch && base + lane < rows;
    next_label = mine ? class_of(args.labels[base + lane], args.classes) : -1;
  };
  int base = (int(blockIdx.x) * kWarps + warp) * kBatch;
  fetch(base);
  for (; base < rows; base += stride) {
    label = next_label;
#pragma unroll
    for (int r = 0; r < kBatch; ++r) batch[r] = next[r];
    fetch(base + stride);
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      int c = __shfl_sync(kAllLanes, label, r);
      float x[8], sum = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        x[e] = to_float(batch[r].at[e]);
        sum += x[e] * x[e];
      }
      sum = warp_sum(sum);
      float scale = inverse_norm(sum);
      if (c == lane) {
        ++count;
        squares += sum * scale * scale;
      }
      auto add = [&](float (&to)[8]) {
#pragma unroll
        for (int e = 0; e < 8; ++e) to[e] += x[e] * scale;
      };
      switch (c) {
        case 0:
          add(acc[0]);
          break;
        case 1:
          add(acc[1]);
          break;
        case 2:
          add(acc[2]);
          break;
        case 3:
          add(acc[3]);
          break;
        case 4:
          add(acc[4]);
          break;
        case 5:
          add(acc[5]);
          break;
        case 6:
          add(acc[6]);
          break;
        case 7:
          add(acc[7]);
          break;
        default:
          break;
      }
    }
  }

  wait_for_previous_kernel();
  int bits = fraction_bits(args.rows);
  auto* lines = reinterpret_cast<float (*)[2][kDim]>(shared_memory());  // [warps][2 classes][D]
  int column = int(threadIdx.x % kDim), half = int(threadIdx.x / kDim);
#pragma unroll
  for (int c = 0; c < kClasses; c += 2) {
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 8; e += 4)
        *reinterpret_cast<float4*>(&lines[warp][h][lane * 8 + e]) =
            make_float4(acc[c + h][e], acc[c + h][e + 1], acc[c + h][e + 2], acc[c + h][e + 3]);
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += lines[i][half][column];
    if (c + half < args.classes) add_fixed(w.sums + (c + half) * (kDim + 2) + column, sum, bits, w.flags);
  }
  if (lane < args.classes && count) {
    add_count(w.sums + lane * (kDim + 2) + kDim, count);
    add_fixed(w.sums + lane * (kDim + 2) + kDim + 1, squares, bits, w.flags);
    if (args.target == args.labels) add_count(w.target_counts + lane, count);  // the usual call: counted already
  }
  if (args.target && args.target != args.labels) count_targets(args, w);
}

// Any shape: a block takes a tile of columns and a share of the rows, 32 at a time: first their norms, then a thread
// for each column adds into its own entry of [C, tile] in shared memory.
constexpr int kTile = 64, kGeneralThreads = 128;

template <typename T, typename A>
__global__ void __launch_bounds__(kGeneralThreads) class_sums_general(const __grid_constant__ ObjectiveArgs args) {
  let_next_kernel_start();
  Workspace<A> w = workspace<A>(args);
  int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const T* features = static_cast<const T*>(args.features.data);
  int64_t first = args.rows * blockIdx.y / gridDim.y, last = args.rows * (blockIdx.y + 1) / gridDim.y;
  wait_for_previous_kernel();
  if (args.target && blockIdx.x == 0) {
    for (int64_t row = first + threadIdx.x; row < last; row += kGeneralThreads) {
      int target = class_of(args.target[row], args.classes);
      if (target >= 0) add_count(w.target_counts + target, 1);
    }
  }
  if (!args.labels || !features || args.class_sums.data) return;

  A* acc = reinterpret_cast<A*>(shared_memory());  // [C, tile]
  A* scales = acc + args.classes * kTile;          // [32] 1 / norm
  A* squares = scales + 32;                        // [32] squared norm of the normalised row
  int* classes = reinterpret_cast<int*>(squares + 32);
  for (int c = 0; threadIdx.x < kTile && c < args.classes; ++c) acc[c * kTile + threadIdx.x] = 0;  // its own column
  int column = int(blockIdx.x) * kTile + int(threadIdx.x);
  bool mine = threadIdx.x < kTile && column < args.dim;
  int count = 0;
  A square_sum = 0;
  for (int64_t base = first; base < last; base += 32) {
    __syncthreads();
    int here = int(last - base < 32 ? last - base : 32);
    for (int r = warp; r < here; r += kGeneralThreads / 32) {
      A sum = 0;
      for (int d = lane; d < args.dim; d += 32) {
        A x = Convert<T, A>::widen(features[(base + r) * args.dim + d]);
        sum += x * x;
      }
      sum = warp_sum(sum);
      A scale = inverse_norm(sum);
      if (lane == 0) {
        scales[r] = scale;
        squares[r] = sum * scale * scale;
        classes[r] = class_of(args.labels[base + r], args.classes);
      }
    }
    __syncthreads();
    for (int r = 0; r < here; ++r) {
      int c = classes[r];
      if (c < 0) continue;
      if (mine)
        acc[c * kTile + threadIdx.x] += Convert<T, A>::widen(features[(base + r) * args.dim + column]) * scales[r];
      if (c == int(threadIdx.x)) {
        ++count;
        square_sum += squares[r];
      }
    }
  }
  int bits = fraction_bits(args.rows);
  for (int c = 0; mine && c < args.classes; ++c)
    add_fixed(w.sums + int64_t(c) * (args.dim + 2) + column, acc[c * kTile + threadIdx.x], bits, w.flags);
  if (blockIdx.x == 0 && int(threadIdx.x) < args.classes && count) {
    add_count(w.sums + int64_t(threadIdx.x) * (args.dim + 2) + args.dim, count);
    add_fixed(w.sums + int64_t(threadIdx.x) * (args.dim + 2) + args.dim + 1, square_sum, bits, w.flags);
  }
}

template <typename A>
__global__ void __launch_bounds__(256) export_sums(const __grid_constant__ ObjectiveArgs args) {
  wait_for_previous_kernel();
  Workspace<A> w = workspace<A>(args);
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(args.classes) * (args.dim + 2)) return;
  bool is_count = i % (args.dim + 2) == args.dim;
  A value = A(ldexp(double(w.sums[i]), is_count ? 0 : -fraction_bits(args.rows)));
  if (*w.flags & kNotFinite) value = A(NAN);
  static_cast<A*>(args.terms.data)[i] = value;
}

template <typename T>
__global__ void __launch_bounds__(256) scale(T* data, int64_t count, Tensor factor) {
  using A = std::conditional_t<sizeof(T) == 8, double, float>;
  double by = element<double>(factor, 0);
  if (by == 1.0) return;
  int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  int64_t vectors = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? count / 8 : 0;
  auto scaled = [&](T v) { return Convert<T, A>::narrow(Convert<T, A>::widen(v) * A(by)); };
  for (int64_t i = thread; i < vectors; i += threads) {
    Eight<T> v = load_eight(data + i * 8);
#pragma unroll
    for (int e = 0; e < 8; ++e) v.at[e] = scaled(v.at[e]);
    store_eight(data + i * 8, v);
  }
  for (int64_t i = vectors * 8 + thread; i < count; i += threads) data[i] = scaled(data[i]);
}

template <typename T, typename A>
cudaError_t class_sums(const ObjectiveArgs& args, cudaStream_t stream) {
  bool overlap = capability_major() >= 9, sums = args.labels && args.features.data && !args.class_sums.data;
  if constexpr (sizeof(A) == 4) {
    if (sums && fast_shape(args)) {
      constexpr int kRows = 16 * (sizeof(T) == 2 ? 4 : 2);
      int blocks = persistent_blocks((args.rows + kRows - 1) / kRows, 1);
      return launch(class_sums_256<T>, dim3(blocks), dim3(512), 16 * 2 * kDim * sizeof(float), stream, overlap, 1,
                    args);
    }
  }
  unsigned tiles = sums ? unsigned((args.dim + kTile - 1) / kTile) : 1u;
  size_t shared = (size_t(args.classes) * kTile + 64) * sizeof(A) + 32 * sizeof(int);
  dim3 grid(tiles, unsigned(persistent_blocks((args.rows + 255) / 256, 4)));
  return launch(class_sums_general<T, A>, grid, dim3(kGeneralThreads), shared, stream, overlap, 1, args);
}

}  // namespace

int capability_major() {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices];  // 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (device < kDevices && known[device]) return known[device];
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, prepare<float>) != cudaSuccess) return 0;  // the launch will say why
  int major = attributes.ptxVersion / 10;
  if (device < kDevices) known[device] = static_cast<signed char>(major);
  return major;
}

cudaError_t launch_prepare(const ObjectiveArgs& args, cudaStream_t stream) {
  bool exact = args.terms.type == Type::kFloat64;
  int64_t work = args.prototype_count * 32 + int64_t(args.classes) * (args.dim + 2) / 4;
  dim3 grid(unsigned(persistent_blocks((work + 255) / 256, 2)));
  return exact ? launch(prepare<double>, grid, dim3(256), 0, stream, false, 1, args)
               : launch(prepare<float>, grid, dim3(256), 0, stream, false, 1, args);
}

cudaError_t launch_class_sums(const ObjectiveArgs& args, cudaStream_t stream) {
  if (args.terms.type == Type::kFloat64) return class_sums<double, double>(args, stream);
  switch (args.features.type) {
    case Type::kFloat16:
      return class_sums<__half, float>(args, stream);
    case Type::kBFloat16:
      return class_sums<__nv_bfloat16, float>(args, stream);
    default:
      return class_sums<float, float>(args, stream);
  }
}

cudaError_t launch_geo_sums(const ObjectiveArgs& args, cudaStream_t stream) {
  cudaError_t error = launch_prepare(args, stream);
  if (error == cudaSuccess) error = launch_class_sums(args, stream);
  if (error != cudaSuccess) return error;
  dim3 grid(unsigned((int64_t(args.classes) * (args.dim + 2) + 255) / 256));
  bool overlap = capability_major() >= 9;
  return args.terms.type == Type::kFloat64 ? launch(export_sums<double>, grid, dim3(256), 0, stream, overlap, 1, args)
                                           : launch(export_sums<float>, grid, dim3(256), 0, stream, overlap, 1, args);
}

cudaError_t launch_scale(Tensor tensor, int64_t count, Tensor factor, cudaStream_t stream) {
  dim3 grid(unsigned(persistent_blocks((count + 2047) / 2048, 8)));
  switch (tensor.type) {
    case Type::kFloat16:
      return launch(scale<__half>, grid, dim3(256), 0, stream, false, 1, static_cast<__half*>(tensor.data), count,
                    factor);
    case Type::kBFloat16:
      return launch(scale<__nv_bfloat16>, grid, dim3(256), 0, stream, false, 1,
                    static_cast<__nv_bfloat16*>(tensor.data), count, factor);
    case Type::kFloat64:
      return launch(scale<double>, grid, dim3(256), 0, stream, false, 1, static_cast<double*>(tensor.data), count,
                    factor);
    default:
      return launch(scale<float>, grid, dim3(256), 0, stream, false, 1, static_cast<float*>(tensor.data), count,
                    factor);
  }
}

}  // namespace ngd_fast
