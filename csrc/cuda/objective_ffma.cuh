// Proto-KD of eight rows at a time by one block of 256 threads, D=256, K<=32, in float32 arithmetic whatever the
// features are. The work changes owner three times, so that prototypes stay in registers and nothing is read twice:
//   rows:        warp w normalises row w                         -> f
//   prototypes:  warp w holds prototypes w, w+8, w+16, w+24      -> similarities
//   rows:        warp w, lane k: softmax and KL of row w          -> slopes by similarity
//   columns:     thread s holds column s of all prototypes       -> the gradient by f
// Vectors of 256 lie in shared memory in "slot" order, in which a lane's 8 consecutive columns are two 16-byte words,
// one in each half, and no access has bank conflicts.
#pragma once
#include "objective_terms.cuh"

namespace ngd_fast {

constexpr int kChunk = 8, kFfmaThreads = 256;

__device__ __forceinline__ int slot_column(int slot) { return slot % 128 / 4 * 8 + slot / 128 * 4 + slot % 4; }

__device__ __forceinline__ void read_slots(const float* vector, int lane, float (&out)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float4 v = *reinterpret_cast<const float4*>(vector + half * 128 + lane * 4);
    out[4 * half] = v.x;
    out[4 * half + 1] = v.y;
    out[4 * half + 2] = v.z;
    out[4 * half + 3] = v.w;
  }
}

__device__ __forceinline__ void write_slots(float* vector, int lane, const float (&v)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
    *reinterpret_cast<float4*>(vector + half * 128 + lane * 4) =
        make_float4(v[4 * half], v[4 * half + 1], v[4 * half + 2], v[4 * half + 3]);
}

// class_terms of objective_terms.cuh for D=256 and C<=8 from arrays in shared memory, in whatever order the columns lie
// there: a lane takes eight, and nothing waits in a loop. `mean`: all kClasses rows are written.
__device__ __forceinline__ void class_terms_256(const ObjectiveArgs& args, int c, const float (*mean)[kDim],
                                                const float* count, const float* square, float* gradient, float* var,
                                                float* margin) {
  int lane = int(threadIdx.x % 32);
  float own[8], g[8], other[8], distance[kClasses], push[kClasses];
  float rows = count[c], weight = geo_weight<float>(args) * float(args.geo_grad_scale), pull = 0;
  read_slots(mean[c], lane, own);
  double length = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) length += double(own[e]) * double(own[e]);
  length = warp_sum(length);
#pragma unroll
  for (int j = 0; j < kClasses; ++j) {
    read_slots(mean[j], lane, other);
    distance[j] = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) distance[j] += (own[e] - other[e]) * (own[e] - other[e]);
  }
#pragma unroll
  for (int j = 0; j < kClasses; ++j) distance[j] = sqrt(warp_sum(distance[j]));
  *var = *margin = 0;
  if (args.high_valence >> c & 1) *var = float(variance_excess(args, double(square[c]), double(rows), length));
  if (*var != 0.0f) pull = variance_pull(args, weight, double(rows));
#pragma unroll
  for (int j = 0; j < kClasses; ++j) {
    bool pair = j < args.classes && j != c && rows > 0.0f && count[j < args.classes ? j : c] > 0.0f;
    float term = 0, slope = margin_push(args, weight, rows, distance[j], term);
    *margin += pair ? term : 0.0f;
    push[j] = pair ? slope : 0.0f;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) g[e] = pull * own[e];
#pragma unroll
  for (int j = 0; j < kClasses; ++j) {
    read_slots(mean[j], lane, other);
#pragma unroll
    for (int e = 0; e < 8; ++e) g[e] += push[j] * (own[e] - other[e]);
  }
  write_slots(gradient, lane, g);
}

// Lane i gets, in v[0], the sum over the lanes of v[i]: 31 shuffles where 32 separate sums take 160.
template <int kHalf = 16>
__device__ __forceinline__ void transposed_sum(float (&v)[32], int lane) {
  bool upper = lane & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    float give = upper ? v[i] : v[i + kHalf], keep = upper ? v[i + kHalf] : v[i];
    v[i] = keep + __shfl_xor_sync(kAllLanes, give, kHalf);
  }
  if constexpr (kHalf > 1) transposed_sum<kHalf / 2>(v, lane);
}

// Shared memory of the chunk in work.
struct ChunkShared {
  float similarity[kChunk][kPrototypes];
  float slope[kChunk][kPrototypes];  // by the unnormalised prototype's similarity
  float prototype_scale[kPrototypes];
};

template <typename T>
struct Ffma {
  float by_prototype[4][8];      // prototypes warp + 8 j, columns 8 lane...
  float by_column[kPrototypes];  // column of slot threadIdx.x
  ChunkShared& shared;

  // Ends with a barrier still to come: read shared.prototype_scale only after the next __syncthreads.
  __device__ Ffma(const ObjectiveArgs& args, ChunkShared& s) : shared(s) {
    int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32), column = slot_column(int(threadIdx.x));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int k = warp + 8 * j;
      float square = 0;
      Eight<float> p{};
      if (k < args.prototype_count) p = load_eight(static_cast<const float*>(args.prototypes.data) + k * kDim + lane * 8);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        by_prototype[j][e] = p.at[e];
        square += p.at[e] * p.at[e];
      }
      square = warp_sum(square);
      if (lane == 0) shared.prototype_scale[k] = inverse_norm(square);
    }
#pragma unroll
    for (int k = 0; k < kPrototypes; ++k)
      by_column[k] = k < args.prototype_count ? given<float>(args.prototypes, k * kDim + column) : 0.0f;
  }

  // This lane's columns of a row; loaded early, they arrive while the row before is in work.
  __device__ static Eight<T> load(const ObjectiveArgs& args, int64_t row) {
    return load_eight(static_cast<const T*>(args.features.data) + row * kDim + int(threadIdx.x % 32) * 8);
  }

  // Row of warp w: its normalised vector to `f`; returns 1 / norm. `square` gets the squared norm of f (1, or 0).
  __device__ static float normalize(const Eight<T>& raw, float* f, float* square) {
    int lane = int(threadIdx.x % 32);
    float x[8], sum = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x[e] = to_float(raw.at[e]);
      sum += x[e] * x[e];
    }
    sum = warp_sum(sum);
    float scale = inverse_norm(sum);
    *square = sum * scale * scale;
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] *= scale;
    write_slots(f, lane, x);
    return scale;
  }

  // From f [count rows][256] in shared memory, complete and behind a barrier, to the gradient by f, in this thread's
  // slot of `gradient` [count][256]; adds Proto-KD to terms. All threads of the block.
  __device__ void chunk(const ObjectiveArgs& args, int64_t row, int count, const float* f, float* gradient,
                        RowTerms<float>& terms) {
    int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32), many = args.prototype_count;
    if (many == 0) {
      for (int r = 0; r < count; ++r) gradient[r * kDim + threadIdx.x] = 0;
      return;
    }
    float v[32];
#pragma unroll
    for (int r = 0; r < kChunk; ++r) {
      float x[8] = {};
      if (r < count) read_slots(f + r * kDim, lane, x);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v[4 * r + j] = 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) v[4 * r + j] += x[e] * by_prototype[j][e];
      }
    }
    int k = warp + 8 * (lane % 4);
    transposed_sum(v, lane);
    shared.similarity[lane / 4][k] = v[0] * shared.prototype_scale[k];
    __syncthreads();
    if (warp < count) {
      float cold = 1 / float(args.proto_temperature);
      bool mine = lane < many;
      float z = shared.similarity[warp][lane] * cold, largest = warp_max(mine ? z : -INFINITY);
      float e = mine ? exp(z - largest) : 0.0f, sum = warp_sum(e);
      float prior = mine ? given<float>(args.prior, (args.prior_per_row ? (row + warp) * many : 0) + lane) : 0.0f;
      // Relative to 1/K: nearly uniform distributions then have logarithms near 0, and their KL keeps its digits.
      float log_q = (z - largest) - log(sum / float(many));
      if (mine && prior != 0.0f) terms.proto += prior * (log(prior * float(many)) - log_q);
      float slope = warp_sum(prior) * (e / sum) - prior;
      shared.slope[warp][lane] =
          slope * shared.prototype_scale[lane] * (float(args.proto_weight) * cold / float(args.rows));
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kChunk; ++r) {
      if (r >= count) break;
      float g = 0;
#pragma unroll
      for (int i = 0; i < kPrototypes; i += 4) {
        float4 slope = *reinterpret_cast<const float4*>(&shared.slope[r][i]);
        g += slope.x * by_column[i] + slope.y * by_column[i + 1] + slope.z * by_column[i + 2] +
             slope.w * by_column[i + 3];
      }
      gradient[r * kDim + threadIdx.x] = g;
    }
  }

  // One warp: the row's gradient by the features, from the gradient by f, its class's vector (or null) and 1 / norm.
  __device__ static void store_gradient(const ObjectiveArgs& args, int64_t row, const float* f, const float* gradient,
                                        const float* class_vector, float scale) {
    int lane = int(threadIdx.x % 32);
    float x[8], g[8], along = 0;
    read_slots(f, lane, x);
    read_slots(gradient, lane, g);
    if (class_vector) {
      float more[8];
      read_slots(class_vector, lane, more);
#pragma unroll
      for (int e = 0; e < 8; ++e) g[e] += more[e];
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) along += x[e] * g[e];
    along = warp_sum(along);
    Eight<T> out;
#pragma unroll
    for (int e = 0; e < 8; ++e) out.at[e] = Convert<T, float>::narrow((g[e] - x[e] * along) * scale);
    store_eight(static_cast<T*>(args.grad_features.data) + row * kDim + lane * 8, out);
  }
};

}  // namespace ngd_fast
