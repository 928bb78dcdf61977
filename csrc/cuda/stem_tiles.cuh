// How the stem's kernels cut an image into tiles and bring them into shared memory.
#pragma once
#include "device.cuh"
#include "stem_cuda.h"
#include "workspace.cuh"

namespace ngd_fast {

// An image and its convolution, in pixels. The convolution has stride 2 and the pooling another 2, so that a pooled
// pixel belongs to a square of 2 x 2 convolution outputs and of 4 x 4 pixels.
struct StemSize {
  int images, height, width, channels;
  __host__ __device__ int rows() const { return height / 4; }  // of the pooled output
  __host__ __device__ int columns() const { return width / 4; }
};

__host__ __device__ inline int parts_of(int size, int most) { return (size + most - 1) / most; }

constexpr int kMoments = 16 * 128;  // numbers that stem_moments sums: 16 tiles of 16 x 8

// Blocks that share the sums over all positions; each leaves a part of its own.
inline int stem_blocks(const StemShape& shape) {
  return persistent_blocks(shape.images * parts_of(shape.height / 4, 4), 2);
}
inline bool may_overlap() { return capability_major() >= 9; }

// Where tap k of a channel lies among [C, I, 7, 7], in the first plane.
__device__ __forceinline__ int64_t weight_at(const StemShape& shape, int channel, int k) {
  return int64_t(channel) * shape.inputs * 49 + (k / 8 * 7 + k % 8 - 1) * shape.tap_step;
}

// Part `i` of `count` nearly equal parts of `size`.
__host__ __device__ inline int part_begin(int size, int count, int i) { return int(int64_t(size) * i / count); }
// Four pixels at (row, column), zeros outside the image; column and width are multiples of four.
template <typename T>
__device__ __forceinline__ uint2 four_pixels(const T* image, int height, int width, int row, int column) {
  bool inside = unsigned(row) < unsigned(height) && unsigned(column) < unsigned(width);
  return inside ? *reinterpret_cast<const uint2*>(image + int64_t(row) * width + column) : make_uint2(0, 0);
}

// Rows [row0, row0 + rows) and columns [column0, column0 + pitch) of an image; pitch a multiple of four.
template <typename T>
__device__ __forceinline__ void load_pixels(T* to, int pitch, int rows, const T* image, int height, int width, int row0,
                                            int column0) {
  int across = pitch / 4;
  for (int i = threadIdx.x; i < rows * across; i += blockDim.x) {
    int row = i / across, column = 4 * (i % across);
    *reinterpret_cast<uint2*>(to + row * pitch + column) =
        four_pixels(image, height, width, row0 + row, column0 + column);
  }
}

// The same as words: a pixel and the one two rows below it, which the next row of convolution outputs sees in its
// place. As operands of mma, whose pairs are of neighbouring positions, they need no shuffling.
template <typename T>
__device__ __forceinline__ void load_words(uint32_t* to, int pitch, int rows, const T* image, int height, int width,
                                           int row0, int column0) {
  int across = pitch / 4;
  for (int i = threadIdx.x; i < rows * across; i += blockDim.x) {
    int row = i / across, column = 4 * (i % across);
    uint2 upper = four_pixels(image, height, width, row0 + row, column0 + column);
    uint2 lower = four_pixels(image, height, width, row0 + row + 2, column0 + column);
    *reinterpret_cast<uint4*>(to + row * pitch + column) =
        make_uint4(__byte_perm(upper.x, lower.x, 0x5410), __byte_perm(upper.x, lower.x, 0x7632),
                   __byte_perm(upper.y, lower.y, 0x5410), __byte_perm(upper.y, lower.y, 0x7632));
  }
}

// Patches of sixteen positions as an operand of mma: eight neighbouring outputs in each of two rows. `at`: the tile's
// word of the patch's first pixel, for this lane: + lane / 4 (its tap within a row) + 2 * (lane % 4) (its position).
__device__ __forceinline__ void load_patches(uint32_t (&patches)[7][2], const uint32_t* at, int pitch) {
#pragma unroll
  for (int ky = 0; ky < 7; ++ky) {
    patches[ky][0] = at[ky * pitch];
    patches[ky][1] = at[ky * pitch + 8];
  }
}

template <typename T>
struct PairOfOnes;
template <>
struct PairOfOnes<__nv_bfloat16> {
  static constexpr uint32_t bits = 0x3f803f80;
};
template <>
struct PairOfOnes<__half> {
  static constexpr uint32_t bits = 0x3c003c00;
};

// Sums [parts, count] over parts, in a fixed order. Blocks of 256 threads, of 32 numbers each.
static __global__ void __launch_bounds__(256) stem_sum(const float* parts_in, int parts, int count, float* out) {
  wait_for_previous_kernel();
  float* sums = reinterpret_cast<float*>(shared_memory());
  int lane = threadIdx.x % 32, slice = threadIdx.x / 32, number = blockIdx.x * 32 + lane;
  float sum = 0;
  if (number < count) {
#pragma unroll 4
    for (int part = slice; part < parts; part += 8) sum += parts_in[int64_t(part) * count + number];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice > 0 || number >= count) return;
#pragma unroll
  for (int i = 1; i < 8; ++i) sum += sums[32 * i + lane];
  out[number] = sum;
}

inline cudaError_t launch_stem_sum(const float* parts_in, int parts, int count, float* out, cudaStream_t stream) {
  return launch(stem_sum, dim3((count + 31) / 32), dim3(256), 256 * sizeof(float), stream, may_overlap(), 1, parts_in,
                parts, count, out);
}

// Sum over the 64 threads of a block, given to each; `scratch` holds two numbers and may be used again after a barrier.
__device__ __forceinline__ double block_sum_64(double v, double* scratch) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  return scratch[0] + scratch[1];
}

}  // namespace ngd_fast
