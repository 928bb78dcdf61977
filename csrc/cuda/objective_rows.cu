// Last stage of the large path, D=256, C<=8, K<=32: every row's terms and gradients. A persistent grid; each block
// first derives D-Geo's class vectors from the class sums, then takes rows from the end of the batch on: those were
// read last. bfloat16 features go through the tensor cores; float32 ones through FFMA, and float16 ones too, which no
// training has: features that want gradients are converted first.
#include "objective_ffma.cuh"

namespace ngd_fast {
namespace {

struct alignas(16) GeoShared {
  float mean[kClasses][kDim], gradient[kClasses][kDim];
  float rows[kClasses], square[kClasses], var[kClasses], margin[kClasses];
};

// Class means and D-Geo's class vectors in shared memory, behind a barrier. column(i): which column lies at place i.
template <typename Column>
__device__ void class_vectors(const ObjectiveArgs& args, const Workspace<float>& w, GeoShared& geo, Column column) {
  if (!args.labels) return;
  int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  bool exchanged = args.class_sums.data != nullptr;
  // volatile: other blocks of this kernel may be setting the other flags already
  bool broken = !exchanged && (*static_cast<const volatile int*>(w.flags) & kNotFinite);
  double unit = ldexp(1.0, -fraction_bits(args.rows));
  auto sum = [&](int c, int i) {
    int64_t at = int64_t(c) * (kDim + 2) + i;
    if (exchanged) return given<float>(args.class_sums, at);
    return float(double(w.sums[at]) * (i == kDim ? 1.0 : unit));
  };
  for (int i = int(threadIdx.x); i < kClasses * kDim; i += int(blockDim.x)) {
    int c = i / kDim;
    float rows = c < args.classes ? sum(c, kDim) : 0.0f;
    geo.mean[c][i % kDim] = broken ? NAN : rows > 0.0f ? sum(c, column(i % kDim)) / rows : 0.0f;
  }
  if (int c = int(threadIdx.x); c < args.classes) {
    geo.rows[c] = sum(c, kDim);
    geo.square[c] = sum(c, kDim + 1);
  }
  __syncthreads();
  if (warp < args.classes) {
    float var, margin;
    class_terms_256(args, warp, geo.mean, geo.rows, geo.square, geo.gradient[warp], &var, &margin);
    if (lane == 0) {
      geo.var[warp] = var;
      geo.margin[warp] = margin;
    }
  }
  __syncthreads();
}

__device__ void finish_rows(const ObjectiveArgs& args, const Workspace<float>& w, const GeoShared& geo,
                            const RowScales<float>& scales, const RowTerms<float>& terms, float* scratch) {
  float var = 0, margin = 0;
  for (int c = 0; args.labels && c < args.classes; ++c) {
    var += geo.var[c];
    margin += geo.margin[c];
  }
  finish(args, w, scales, terms, var, margin, scratch);
}

// ---- float32 ----------------------------------------------------------------------------------------------------
struct FfmaShared {
  GeoShared geo;
  ChunkShared chunk;
  float f[kChunk][kDim], gradient[kChunk][kDim];
  float scratch[3 * kFfmaThreads / 32];
  RowScales<float> scales;
};

template <typename T>
__global__ void __launch_bounds__(kFfmaThreads, 2) rows_ffma(const __grid_constant__ ObjectiveArgs args) {
  auto& s = *reinterpret_cast<FfmaShared*>(shared_memory());
  Workspace<float> w = workspace<float>(args);
  int warp = int(threadIdx.x / 32), flags = 0;
  Ffma<T> ffma(args, s.chunk);
  int64_t chunks = (args.rows + kChunk - 1) / kChunk;
  Eight<T> raw{};
  auto fetch = [&](int64_t i) {
    int64_t row = (chunks - 1 - i) * kChunk + warp;
    if (i < chunks && row < args.rows) raw = Ffma<T>::load(args, row);
  };
  fetch(blockIdx.x);
  wait_for_previous_kernel();
  class_vectors(args, w, s.geo, [](int i) { return slot_column(i); });
  place_row_scales(args, [&](int c) { return w.target_counts[c]; }, s.scales);
  RowTerms<float> terms{};
  for (int64_t i = blockIdx.x; i < chunks; i += gridDim.x) {
    int64_t base = (chunks - 1 - i) * kChunk, row = base + warp;
    int count = args.rows - base < kChunk ? int(args.rows - base) : kChunk, label = -1;
    float scale = 0, square;
    if (warp < count) {
      scale = Ffma<T>::normalize(raw, s.f[warp], &square);
      if (args.labels) label = label_class(args.labels[row], args.classes, flags);
    }
    fetch(i + gridDim.x);
    __syncthreads();
    ffma.chunk(args, base, count, s.f[0], s.gradient[0], terms);
    __syncthreads();
    if (warp < count && args.grad_features.data)
      Ffma<T>::store_gradient(args, row, s.f[warp], s.gradient[warp], label < 0 ? nullptr : s.geo.gradient[label],
                              scale);
  }
  if (args.logits.data)
    for (int64_t row = int64_t(blockIdx.x) * kFfmaThreads + threadIdx.x; row < args.rows;
         row += int64_t(gridDim.x) * kFfmaThreads)
      logits_row<float, true>(args, row, s.scales, terms, flags);
  if (flags) atomicOr(w.flags, flags);
  finish_rows(args, w, s.geo, s.scales, terms, s.scratch);
}

// ---- bfloat16 ---------------------------------------------------------------------------------------------------
// A warp takes 16 rows. A matrix product does not care in which order its inner index runs, nor in which its columns
// lie as long as both sides agree; so the orders are chosen such that every operand is a whole 16-byte word of one
// lane:
//   features:     lane (g, t) = (lane / 4, lane % 4) holds columns 32 j + 8 t ... + 7 of rows g and g + 8, j = 0..7,
//                 as they lie in memory; the gradient leaves by the same pattern;
//   similarities: columns permuted so that lane t of a row gets prototypes 8 t ... 8 t + 7, which is the operand of
//                 the second product as it stands (tiles 0..3), and classes 2 t, 2 t + 1 (tile 4).
constexpr int kMmaThreads = 384, kMmaRows = 16, kJ = kDim / 32;

struct MmaShared {
  uint4 similarity[kJ][5][32];  // operand words: prototypes in tiles 0..3, class vectors in tile 4
  uint4 combine[kJ][4][32];     // prototypes, transposed
  uint4 classes[kJ][32];        // class vectors, transposed
  GeoShared geo;
  float class_scale[kClasses];  // the class vectors are stored divided by their largest element
  float prior[kPrototypes], log_prior[kPrototypes];
  RowScales<float> scales;  // here, and each thread's sum of Proto-KD too: the registers are all taken
  float proto[kMmaThreads];
  float scratch[3 * kMmaThreads / 32];
};

template <typename T>
union Pair {
  T at[2];
  uint32_t word;
  __device__ Pair() : word(0) {}
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  Pair<T> pair;
  pair.at[0] = Convert<T, float>::narrow(low);
  pair.at[1] = Convert<T, float>::narrow(high);
  return pair.word;
}

template <typename T>
__device__ __forceinline__ float unpack(uint32_t word, int i) {
  Pair<T> pair;
  pair.word = word;
  return to_float(pair.at[i]);
}

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Normalised prototypes in operand order; a warp for each. Needs nothing of the kernels before.
template <typename T>
__device__ void place_prototypes(const ObjectiveArgs& args, MmaShared& s) {
  int lane = int(threadIdx.x % 32);
  for (int k = int(threadIdx.x / 32); k < kPrototypes; k += kMmaThreads / 32) {
    float p[8], square = 0;
    Eight<float> raw{};
    if (k < args.prototype_count) raw = load_eight(static_cast<const float*>(args.prototypes.data) + k * kDim + lane * 8);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      p[e] = raw.at[e];
      square += p[e] * p[e];
    }
    float scale = inverse_norm(warp_sum(square));
    int g = 2 * (k / 8) + k % 2, tile = k % 8 / 2;
    s.similarity[lane / 4][tile][g * 4 + lane % 4] =
        make_uint4(pack<T>(p[0] * scale, p[1] * scale), pack<T>(p[2] * scale, p[3] * scale),
                   pack<T>(p[4] * scale, p[5] * scale), pack<T>(p[6] * scale, p[7] * scale));
#pragma unroll
    for (int e = 0; e < 8; ++e) {  // column 32 j + 8 (g / 2) + 2 tile + g % 2
      int column_g = 2 * (lane % 4) + e % 2;
      reinterpret_cast<T*>(&s.combine[lane / 4][e / 2][column_g * 4 + k / 8])[k % 8] =
          Convert<T, float>::narrow(p[e] * scale);
    }
  }
  if (int k = int(threadIdx.x); k < kPrototypes) {
    bool there = k < args.prototype_count && !args.prior_per_row;
    s.prior[k] = there ? given<float>(args.prior, k) : 0.0f;
    s.log_prior[k] = s.prior[k] != 0.0f ? log(s.prior[k] * float(args.prototype_count)) : 0.0f;
  }
}

template <typename T>
__device__ void place_class_vectors(const ObjectiveArgs& args, MmaShared& s) {
  int lane = int(threadIdx.x % 32), c = int(threadIdx.x / 32);
  if (c < kClasses) {
    float g[8], largest = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      g[e] = args.labels && c < args.classes ? s.geo.gradient[c][lane * 8 + e] : 0.0f;
      largest = fmaxf(largest, fabsf(g[e]));
    }
    largest = warp_max(largest);
    float scale = largest > 0.0f ? 1.0f / largest : 0.0f;
    if (lane == 0) s.class_scale[c] = largest;
#pragma unroll
    for (int e = 0; e < 8; ++e) g[e] *= scale;
    s.similarity[lane / 4][4][c * 4 + lane % 4] =
        make_uint4(pack<T>(g[0], g[1]), pack<T>(g[2], g[3]), pack<T>(g[4], g[5]), pack<T>(g[6], g[7]));
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      int column_g = 2 * (lane % 4) + e % 2;
      reinterpret_cast<T*>(&s.classes[lane / 4][column_g * 4 + c / 2])[2 * (e / 2) + c % 2] =
          Convert<T, float>::narrow(g[e]);
    }
  }
}

// One row's Proto-KD from this lane's eight similarities (times 1 / norm not yet): they become the slopes by
// similarity, over the row's weight. Returns the sum over all prototypes of slope * similarity.
__device__ __forceinline__ float proto_row(const ObjectiveArgs& args, const MmaShared& s, int64_t row, bool real,
                                           float inverse, float (&v)[8], RowTerms<float>& terms) {
  int t = int(threadIdx.x % 4), many = args.prototype_count;
  float cold = 1 / float(args.proto_temperature), largest = -INFINITY, sum = 0, prior_sum = 0, along = 0;
  float prior[8], weight[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    v[i] *= inverse;
    if (8 * t + i < many) largest = fmaxf(largest, v[i] * cold);
    prior[i] = s.prior[8 * t + i];
    if (args.prior_per_row)
      prior[i] = real && 8 * t + i < many ? given<float>(args.prior, row * many + 8 * t + i) : 0.0f;
    prior_sum += prior[i];
  }
  largest = warp_max<4>(largest);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    weight[i] = 8 * t + i < many ? exp(v[i] * cold - largest) : 0.0f;
    sum += weight[i];
  }
  sum = warp_sum<4>(sum);
  prior_sum = warp_sum<4>(prior_sum);
  float rest = log(sum / float(many)), over = prior_sum / sum;  // logarithms relative to 1/K, as in Ffma::chunk
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float log_prior = s.log_prior[8 * t + i];
    if (args.prior_per_row) log_prior = prior[i] != 0.0f ? log(prior[i] * float(many)) : 0.0f;
    if (real && prior[i] != 0.0f) terms.proto += prior[i] * (log_prior - ((v[i] * cold - largest) - rest));
    float slope = weight[i] * over - prior[i];
    along += slope * v[i];
    v[i] = slope;
  }
  return warp_sum<4>(along);
}

template <typename T>
__global__ void __launch_bounds__(kMmaThreads, 1) rows_mma(const __grid_constant__ ObjectiveArgs args) {
  auto& s = *reinterpret_cast<MmaShared*>(shared_memory());
  Workspace<float> w = workspace<float>(args);
  int lane = int(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const T* features = static_cast<const T*>(args.features.data);
  int rows = int(args.rows), tiles = (rows + kMmaRows - 1) / kMmaRows, warps = int(gridDim.x) * (kMmaThreads / 32);
  int own = tiles - 1 - int(threadIdx.x / 32 * gridDim.x + blockIdx.x);
  uint4 x[2][kJ];
  // A tile's words are loaded as soon as those of the tile before have been used: no registers more, and they arrive
  // while the rest of that tile is in work. The first before the wait: features are no kernel's output.
  auto fetch = [&](int tile, int h, int j) {
    int row = tile * kMmaRows + g + 8 * h;
    x[h][j] = tile >= 0 && row < rows ? *reinterpret_cast<const uint4*>(features + int64_t(row) * kDim + 32 * j + 8 * t)
                                      : make_uint4(0, 0, 0, 0);
  };
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < kJ; ++j) fetch(own, h, j);
  place_prototypes<T>(args, s);
  wait_for_previous_kernel();
  class_vectors(args, w, s.geo, [](int i) { return i; });
  place_class_vectors<T>(args, s);
  s.proto[threadIdx.x] = 0;
  place_row_scales(args, [&](int c) { return w.target_counts[c]; }, s.scales);

  for (; own >= 0; own -= warps) {
    int base = own * kMmaRows;
    int flags = 0;
    RowTerms<float> terms{};
    int label[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int row = base + g + 8 * h;
      label[h] = args.labels && row < rows ? label_class(args.labels[row], args.classes, flags) : -1;
    }
    if (flags) atomicOr(w.flags, flags);

    float inverse[2], product[5][4] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float square = 0;
#pragma unroll
      for (int j = 0; j < kJ; ++j)
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float v = unpack<T>(word_of(x[h][j], e / 2), e % 2);
          square += v * v;
        }
      inverse[h] = inverse_norm(warp_sum<4>(square));
#pragma unroll
      for (int j = 0; j < kJ; ++j) {
        forget(x[h][j].x);
        forget(x[h][j].y);
        forget(x[h][j].z);
        forget(x[h][j].w);
      }
    }
#pragma unroll
    for (int j = 0; j < kJ; ++j)
#pragma unroll
      for (int tile = 0; tile < 5; ++tile) {
        uint4 b = s.similarity[j][tile][lane];
        mma_16x8x16<T>(product[tile], {x[0][j].x, x[1][j].x, x[0][j].y, x[1][j].y}, {b.x, b.y});
        mma_16x8x16<T>(product[tile], {x[0][j].z, x[1][j].z, x[0][j].w, x[1][j].w}, {b.z, b.w});
      }

    float along[2], class_scale[2];
    uint32_t slope[2][4], one_hot[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float v[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) v[k] = product[k / 2][2 * h + k % 2];
      int row = base + g + 8 * h;
      along[h] = 0;
      if (args.prototype_count)
        along[h] = s.scales.proto_grad * proto_row(args, s, row, row < rows, inverse[h], v, terms);
#pragma unroll
      for (int k = 0; k < 4; ++k) slope[h][k] = args.prototype_count ? pack<T>(v[2 * k], v[2 * k + 1]) : 0u;
      bool low = label[h] == 2 * t, high = label[h] == 2 * t + 1;
      class_scale[h] = label[h] < 0 ? 0.0f : s.class_scale[label[h]];
      float towards = (low ? product[4][2 * h] : 0.0f) + (high ? product[4][2 * h + 1] : 0.0f);
      along[h] += class_scale[h] * inverse[h] * warp_sum<4>(towards);
      one_hot[h] = pack<T>(low ? 1.0f : 0.0f, high ? 1.0f : 0.0f);
    }
    s.proto[threadIdx.x] += terms.proto;
    if (!args.grad_features.data) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < kJ; ++j) fetch(own - warps, h, j);
      continue;
    }
    float proto_slope = s.scales.proto_grad;

#pragma unroll
    for (int j = 0; j < kJ; ++j) {
      uint4 classes = s.classes[j][lane];
      uint32_t out[2][4];
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        float pull[4] = {}, push[4] = {};
        uint4 b = s.combine[j][tile][lane];
        mma_16x8x16<T>(pull, {slope[0][0], slope[1][0], slope[0][1], slope[1][1]}, {b.x, b.y});
        mma_16x8x16<T>(pull, {slope[0][2], slope[1][2], slope[0][3], slope[1][3]}, {b.z, b.w});
        mma_16x8x8<T>(push, {one_hot[0], one_hot[1]}, word_of(classes, tile));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float value[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float f = unpack<T>(word_of(x[h][j], tile), e) * inverse[h];
            value[e] = (proto_slope * pull[2 * h + e] + class_scale[h] * push[2 * h + e] - f * along[h]) * inverse[h];
          }
          out[h][tile] = pack<T>(value[0], value[1]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int row = base + g + 8 * h;
        if (row < rows)
          *reinterpret_cast<uint4*>(static_cast<T*>(args.grad_features.data) + int64_t(row) * kDim + 32 * j + 8 * t) =
              make_uint4(out[h][0], out[h][1], out[h][2], out[h][3]);
        fetch(own - warps, h, j);
      }
    }
  }

  // The logits in a loop of their own: in the one above they would take registers that it does not have. The warps
  // that had the fewest tiles begin.
  RowTerms<float> terms{0, 0, s.proto[threadIdx.x]};
  int flags = 0, order = (kMmaThreads / 32 - 1 - int(threadIdx.x / 32)) * int(gridDim.x) + int(blockIdx.x);
  if (args.logits.data)
    for (int64_t row = int64_t(order) * 32 + lane; row < rows; row += int64_t(warps) * 32)
      logits_row<float, true>(args, row, s.scales, terms, flags);
  if (flags) atomicOr(w.flags, flags);
  finish_rows(args, w, s.geo, s.scales, terms, s.scratch);
}

template <typename... P>
cudaError_t start(void (*kernel)(P...), const ObjectiveArgs& args, int threads, size_t shared, int rows,
                  int per_multiprocessor, cudaStream_t stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  dim3 grid(unsigned(persistent_blocks((args.rows + rows - 1) / rows, per_multiprocessor)));
  return launch(kernel, grid, dim3(unsigned(threads)), shared, stream, capability_major() >= 9, 1, args);
}

}  // namespace

cudaError_t launch_rows(const ObjectiveArgs& args, cudaStream_t stream) {
  switch (args.features.type) {
    case Type::kFloat16:
      return start(rows_ffma<__half>, args, kFfmaThreads, sizeof(FfmaShared), kChunk, 2, stream);
    case Type::kBFloat16:
      return start(rows_mma<__nv_bfloat16>, args, kMmaThreads, sizeof(MmaShared), kMmaRows, 1, stream);
    default:
      return start(rows_ffma<float>, args, kFfmaThreads, sizeof(FfmaShared), kChunk, 2, stream);
  }
}

}  // namespace ngd_fast
