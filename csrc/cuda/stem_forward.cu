// Forward pass of the stem: moments of the patches, the scale and shift that follow, convolution with pooling.
#include "stem_tiles.cuh"

namespace ngd_fast {
namespace {

constexpr int kMomentRows = 4;  // pooled rows of a tile of the moments
constexpr int kMomentThreads = 256;

// Where the sum of the product of two taps, i <= j, lies among the moments: in tile (i / 16, j / 8) as mma left it.
// Tiles below the diagonal of the symmetric matrix are not kept.
__device__ __forceinline__ int moment_at(int i, int j) {
  int m = i / 16, tile = m * (8 - m) + j / 8 - 2 * m;
  int lane = i % 8 * 4 + j % 8 / 2, slot = i % 16 / 8 * 2 + j % 2;
  return tile * 128 + lane * 4 + slot;
}

// partial [gridDim.x, kMoments]: sums of the products of all pairs of taps over a block's positions.
template <typename T>
__global__ void __launch_bounds__(kMomentThreads, 2) stem_moments(const T* image, StemSize size, float* partial) {
  uint32_t* words = reinterpret_cast<uint32_t*>(shared_memory());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tap = lane / 4, pair = lane % 4;
  const int pitch = size.width + 8, across = size.width / 16;
  const int chunks = parts_of(size.rows(), kMomentRows);
  float acc[16][4] = {};
  for (int tile = blockIdx.x; tile < size.images * chunks; tile += gridDim.x) {
    int first = part_begin(size.rows(), chunks, tile % chunks);
    int rows = part_begin(size.rows(), chunks, tile % chunks + 1) - first;
    const T* own = image + int64_t(tile / chunks) * size.height * size.width;
    __syncthreads();  // the last tile has been read
    load_words(words, pitch, 4 * rows + 3, own, size.height, size.width, 4 * first - 3, -4);
    __syncthreads();
    for (int task = warp; task < rows * across; task += kMomentThreads / 32) {
      uint32_t patches[7][2];
      load_patches(patches, words + 4 * (task / across) * pitch + 16 * (task % across) + tap + 2 * pair, pitch);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int odd = m < 3 ? 2 * m + 1 : 6;  // the eighth row of taps is none
        uint32_t a[4] = {patches[2 * m][0], m < 3 ? patches[odd][0] : 0, patches[2 * m][1],
                         m < 3 ? patches[odd][1] : 0};
        if (m == 0 && tap == 0) a[0] = a[2] = PairOfOnes<T>::bits;
#pragma unroll
        for (int n = 2 * m; n < 7; ++n) mma_16x8x16<T>(acc[m * (8 - m) + n - 2 * m], a, patches[n]);
      }
    }
  }
  float4* sums = reinterpret_cast<float4*>(words);
  for (int turn = 0; turn < kMomentThreads / 32; ++turn) {
    __syncthreads();
    if (warp != turn) continue;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float4 sum = turn ? sums[32 * i + lane] : make_float4(0, 0, 0, 0);
      sums[32 * i + lane] = make_float4(sum.x + acc[i][0], sum.y + acc[i][1], sum.z + acc[i][2], sum.w + acc[i][3]);
    }
  }
  __syncthreads();
  float4* to = reinterpret_cast<float4*>(partial) + int64_t(blockIdx.x) * (kMoments / 4);
  for (int i = threadIdx.x; i < kMoments / 4; i += kMomentThreads) to[i] = sums[i];
}

// One block of 64 threads for each channel: the summed kernel, the statistics, scale and shift.
template <typename T>
__global__ void __launch_bounds__(64) stem_prepare(StemForward args, const float* moments) {
  wait_for_previous_kernel();
  struct Scratch {
    double weight[64], mean[64], sums[2][2];
  };
  Scratch& scratch = *reinterpret_cast<Scratch*>(shared_memory());
  const int channel = blockIdx.x, channels = args.shape.channels, k = threadIdx.x;
  const bool is_tap = k < kStemTaps && k % 8 > 0;
  float weight = 0;
  if (is_tap) {
    const float* tap = args.weight + weight_at(args.shape, channel, k);
    for (int i = 0; i < args.shape.inputs; ++i) weight += tap[i * args.shape.plane_step];
  }
  T rounded = Convert<T, float>::narrow(weight);
  if (k < kStemTaps) static_cast<T*>(args.kernel)[channel * kStemTaps + k] = rounded;

  double mean, variance, unbiased;
  if (args.batch_statistics) {
    // In float64: the covariance is the small difference of large sums.
    const double count = double(args.shape.images) * (args.shape.height / 2) * (args.shape.width / 2);
    const double own_mean = is_tap ? moments[moment_at(0, k)] / count : 0;
    scratch.weight[k] = is_tap ? double(to_float(rounded)) : 0;
    scratch.mean[k] = own_mean;
    __syncthreads();
    double covariance = 0;  // of this tap with the channel's output
    if (is_tap)
      for (int j = 0; j < kStemTaps; ++j) {
        if (j % 8 == 0) continue;
        double product = moments[k < j ? moment_at(k, j) : moment_at(j, k)] / count;
        covariance += (product - own_mean * scratch.mean[j]) * scratch.weight[j];
      }
    mean = block_sum_64(scratch.weight[k] * own_mean, scratch.sums[0]);
    variance = block_sum_64(scratch.weight[k] * covariance, scratch.sums[1]);
    variance = variance < 0 ? 0 : variance;
    unbiased = count > 1 ? variance * count / (count - 1) : variance;
    if (k < kStemTaps) {
      args.taps[(1 + channel) * kStemTaps + k] = float(covariance);
      if (channel == 0) args.taps[k] = float(own_mean);
    }
  } else {
    mean = args.mean ? args.mean[channel] : 0.0;
    unbiased = variance = args.variance ? args.variance[channel] : 1.0 - args.epsilon;
  }
  if (k > 0) return;
  double inverse = 1 / sqrt(variance + args.epsilon);
  double scale = inverse * (args.gamma ? args.gamma[channel] : 1.0f);
  double shift = (args.beta ? args.beta[channel] : 0.0f) - mean * scale;
  const double values[5] = {mean, unbiased, inverse, scale, shift};
  for (int i = 0; i < 5; ++i) args.statistics[i * channels + channel] = float(values[i]);
}

// A warp convolves 16 squares of 2 x 2 outputs side by side, for 32 channels, and walks down the image. Of its squares
// the first may serve only as the left neighbour of the second.
constexpr int kStrip = 16, kWarpChannels = 32, kForwardWarps = 4, kForwardRows = 14;

struct Strips {
  int columns, count;
  __host__ __device__ explicit Strips(int columns)
      : columns(columns), count(columns <= kStrip ? 1 : parts_of(columns, kStrip - 1)) {}
  __host__ __device__ int begin(int i) const { return part_begin(columns, count, i); }
  __host__ __device__ int first_square(int i) const { return i ? begin(i) - 1 : 0; }
  __host__ __device__ int pairs() const { return (count + 1) / 2; }  // a block takes two strips
  __host__ __device__ int last_of_pair(int pair) const { return 2 * pair + 1 < count ? 2 * pair + 1 : 2 * pair; }
};

__host__ __device__ inline int forward_pitch(const Strips& strips, int pair) {
  return 4 * (strips.first_square(strips.last_of_pair(pair)) - strips.first_square(2 * pair)) + 4 * kStrip + 8;
}

// A value's last four bits say where in its window it lies, 8 for the first position down to 0 for the last, so that
// the larger of two values brings its place along, and the earlier wins among equals. Costs 2^-20 of a value that is
// rounded to 2^-11 or 2^-8 in the end. Negative values order their places the other way round, but ReLU takes them.
__device__ __forceinline__ float with_place(float v, uint32_t place) {
  return __uint_as_float((__float_as_uint(v) & ~15u) | place);
}
__device__ __forceinline__ float move_place(float v, uint32_t by) { return __uint_as_float(__float_as_uint(v) + by); }

template <typename T>
__global__ void __launch_bounds__(32 * kForwardWarps, 3)
    stem_pool(const T* image, const T* kernel, const float* statistics, StemSize size, T* out, uint8_t* index) {
  wait_for_previous_kernel();
  T* pixels = reinterpret_cast<T*>(shared_memory());
  const Strips strips(size.columns());
  const int chunks = parts_of(size.rows(), kForwardRows);
  const int pair = blockIdx.x % strips.pairs(), chunk = blockIdx.x / strips.pairs() % chunks;
  const int64_t n = blockIdx.x / (strips.pairs() * chunks);
  const int first = part_begin(size.rows(), chunks, chunk), end = part_begin(size.rows(), chunks, chunk + 1);
  const int pitch = forward_pitch(strips, pair), square0 = strips.first_square(2 * pair);
  // Row 0 of the convolution here is the one above the first square: the pooling windows reach up to it.
  load_pixels(pixels, pitch, 4 * (end - first) + 7, image + n * size.height * size.width, size.height, size.width,
              4 * first - 5, 4 * square0 - 4);
  __syncthreads();

  const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  const int in_pair = strips.last_of_pair(pair) - 2 * pair + 1;
  for (int task = threadIdx.x / 32; task < in_pair * (size.channels / kWarpChannels); task += blockDim.x / 32) {
    const int strip = 2 * pair + task % in_pair, channel0 = task / in_pair * kWarpChannels;
    const int square = strips.first_square(strip), begin = strips.begin(strip), stop = strips.begin(strip + 1);

    // Column c of n-tile i is channel c / 2 * 8 + i * 2 + c % 2: each lane gets eight neighbours of the output.
    uint32_t taps[7][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int channel = channel0 + group / 2 * 8 + i * 2 + group % 2;
      const uint32_t* own = reinterpret_cast<const uint32_t*>(kernel + channel * kStemTaps) + member;
#pragma unroll
      for (int ky = 0; ky < 7; ++ky) taps[ky][i] = own[4 * ky];
    }
    float scale[8], shift[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      scale[i] = statistics[3 * size.channels + channel0 + 8 * member + i];
      shift[i] = statistics[4 * size.channels + channel0 + 8 * member + i];
    }

    // Lane `group`, half h is square 2 * group + h; its outputs are at dx 0 and 1, their pixels 2 apart.
    const uint32_t* words = reinterpret_cast<const uint32_t*>(pixels + 4 * (square - square0)) + 4 * group + member;
    uint32_t x[7][2][2];  // [ky][dx][h]: taps 2 * member and + 1 of row ky
    auto load_row = [&](uint32_t (&to)[2][2], int row) {
      const uint32_t* at = words + row * (pitch / 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i % 2][i / 2] = at[i];
    };
    const int row0 = first == 0 ? 1 : 0;  // nothing lies above the image
#pragma unroll
    for (int ky = 0; ky < 5; ++ky) load_row(x[ky + 2], 2 * row0 + ky);

    float best[2][8];
#pragma unroll
    for (int i = 0; i < 16; ++i) best[i / 8][i % 8] = NAN;
#pragma unroll 1
    for (int row = row0; row <= 2 * (end - first); ++row) {
      // One output down is two pixels down: five rows of pixels stay.
#pragma unroll
      for (int i = 0; i < 5 * 4; ++i) x[i / 4][i / 2 % 2][i % 2] = x[i / 4 + 2][i / 2 % 2][i % 2];
      load_row(x[5], 2 * row + 5);
      load_row(x[6], 2 * row + 6);

      float acc[2][4][4] = {};
#pragma unroll
      for (int ky = 0; ky < 6; ky += 2)
#pragma unroll
        for (int dx = 0; dx < 2; ++dx) {
          const uint32_t a[4] = {x[ky][dx][0], x[ky][dx][1], x[ky + 1][dx][0], x[ky + 1][dx][1]};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t b[2] = {taps[ky][i], taps[ky + 1][i]};
            mma_16x8x16<T>(acc[dx][i], a, b);
          }
        }
#pragma unroll
      for (int dx = 0; dx < 2; ++dx) {
        const uint32_t a[2] = {x[6][dx][0], x[6][dx][1]};
#pragma unroll
        for (int i = 0; i < 4; ++i) mma_16x8x8<T>(acc[dx][i], a, taps[6][i]);
      }

      // The largest of each window's three outputs in this row.
      float across[2][8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        float right[2], centre[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          centre[h] = with_place(fmaf(acc[0][c / 2][2 * h + c % 2], scale[c], shift[c]), 1);
          right[h] = with_place(fmaf(acc[1][c / 2][2 * h + c % 2], scale[c], shift[c]), 0);
        }
        float left = __shfl_up_sync(kAllLanes, right[1], 4);
        left = group == 0 ? NAN : move_place(left, 2);  // fmaxf takes the other
        across[0][c] = fmaxf(fmaxf(left, centre[0]), right[0]);
        across[1][c] = fmaxf(fmaxf(move_place(right[0], 2), centre[1]), right[1]);
      }

      if (row % 2 == 1) {  // the middle row of the windows
#pragma unroll
        for (int i = 0; i < 16; ++i)
          best[i / 8][i % 8] = fmaxf(best[i / 8][i % 8], move_place(across[i / 8][i % 8], 3));
        continue;
      }
      const int pooled_row = first + row / 2 - 1;  // their last row, and the first of the windows below
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = square + 2 * group + h;
        Eight<T> values;
        uint32_t places[2] = {0, 0};
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          float v = fmaxf(best[h][c], across[h][c]);
          uint32_t place = v > 0 ? 8 - (__float_as_uint(v) & 15) : 9;
          places[c / 4] |= place << (8 * (c % 4));
          values.at[c] = Convert<T, float>::narrow(v <= 0 ? 0.0f : v);  // a NaN stays one
          best[h][c] = move_place(across[h][c], 6);
        }
        if (row > 0 && column >= begin && column < stop) {
          int64_t at =
              ((n * size.rows() + pooled_row) * size.columns() + column) * size.channels + channel0 + 8 * member;
          store_eight(out + at, values);
          if (index) *reinterpret_cast<uint2*>(index + at) = make_uint2(places[0], places[1]);
        }
      }
    }
  }
}

template <typename T>
cudaError_t forward(const StemForward& args, cudaStream_t stream) {
  const StemShape& shape = args.shape;
  const StemSize size{int(shape.images), shape.height, shape.width, shape.channels};
  const T* image = static_cast<const T*>(args.image);
  float* moments = static_cast<float*>(args.workspace);
  if (args.batch_statistics) {
    float* partial = moments + kMoments;
    const int blocks = stem_blocks(shape);
    size_t tile = (4 * kMomentRows + 3) * (size.width + 8) * sizeof(uint32_t);
    size_t shared = tile > kMoments * sizeof(float) ? tile : kMoments * sizeof(float);
    cudaError_t error =
        launch(stem_moments<T>, dim3(blocks), dim3(kMomentThreads), shared, stream, false, 1, image, size, partial);
    if (error != cudaSuccess) return error;
    error = launch_stem_sum(partial, blocks, kMoments, moments, stream);
    if (error != cudaSuccess) return error;
  }
  const size_t scratch = (64 + 64 + 4) * sizeof(double);
  cudaError_t error = launch(stem_prepare<T>, dim3(shape.channels), dim3(64), scratch, stream,
                             args.batch_statistics && may_overlap(), 1, args, static_cast<const float*>(moments));
  if (error != cudaSuccess) return error;

  const Strips strips(size.columns());
  int pitch = 0;
  for (int pair = 0; pair < strips.pairs(); ++pair)
    pitch = pitch > forward_pitch(strips, pair) ? pitch : forward_pitch(strips, pair);
  const int chunks = parts_of(size.rows(), kForwardRows);
  const int tasks = (strips.count > 1 ? 2 : 1) * (shape.channels / kWarpChannels);
  const int warps = tasks < kForwardWarps ? tasks : kForwardWarps;
  const size_t shared = (4 * parts_of(size.rows(), chunks) + 7) * pitch * sizeof(T);
  return launch(stem_pool<T>, dim3(size.images * chunks * strips.pairs()), dim3(32 * warps), shared, stream,
                may_overlap(), 1, image, static_cast<const T*>(args.kernel), static_cast<const float*>(args.statistics),
                size, static_cast<T*>(args.out), args.index);
}

}  // namespace

bool stem_fits(const StemShape& shape) {
  return shape.images >= 1 && shape.height >= 4 && shape.height % 4 == 0 && shape.width >= 16 && shape.width % 16 == 0 &&
         shape.height <= 512 && shape.width <= 512 && shape.channels >= 32 && shape.channels % 32 == 0 &&
         shape.channels <= 1024 && shape.inputs >= 1 && shape.images < (1 << 20) &&
         (shape.type == Type::kBFloat16 || shape.type == Type::kFloat16);
}

size_t stem_workspace(const StemShape& shape) {
  int numbers = shape.channels * kStemTaps > kMoments ? shape.channels * kStemTaps : kMoments;
  return size_t(numbers) * (1 + stem_blocks(shape)) * sizeof(float);
}

cudaError_t launch_stem_forward(const StemForward& args, cudaStream_t stream) {
  return args.shape.type == Type::kBFloat16 ? forward<__nv_bfloat16>(args, stream) : forward<__half>(args, stream);
}

}  // namespace ngd_fast
