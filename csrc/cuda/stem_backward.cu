// Backward pass of the stem: from the pooled output's gradient to those of the kernel and of batch norm.
#include "stem_tiles.cuh"

namespace ngd_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 7, kColumns = 56;  // of a tile: pooled rows, columns of the convolution
constexpr int kImagePitch = 2 * kColumns + 8;

// What the pooled pixels of one place hold for eight channels.
template <typename T>
struct Window {
  uint4 gradient;
  uint2 place;
};

template <typename T>
__device__ __forceinline__ Window<T> load_window(const T* gradient, const uint8_t* index, const StemSize& size, int row,
                                                 int column, int channel) {
  if (row >= size.rows() || column >= size.columns())
    return {make_uint4(0, 0, 0, 0), make_uint2(0x09090909, 0x09090909)};
  int64_t at = (int64_t(row) * size.columns() + column) * size.channels + channel;
  return {*reinterpret_cast<const uint4*>(gradient + at), *reinterpret_cast<const uint2*>(index + at)};
}

// Gradient and place of one pair of neighbouring channels.
struct PairOfChannels {
  uint32_t gradient, place;
  // The gradients where the largest value came from `position` of its window, else zeros.
  __device__ __forceinline__ uint32_t from(uint32_t position) const {
    return gradient & equal_halves(place, position * 0x10001u);
  }
};

template <typename T>
__device__ __forceinline__ PairOfChannels pair_of(const Window<T>& window, int i) {
  const uint32_t gradients[4] = {window.gradient.x, window.gradient.y, window.gradient.z, window.gradient.w};
  uint32_t places = i < 2 ? window.place.x : window.place.y;
  return {gradients[i], __byte_perm(places, 0, i % 2 ? 0x4342 : 0x4140)};
}

// The gradient of the four outputs of a square, from the windows that cover it: its own, and those to the right, below
// and below right. Written as words of the upper and the lower row, eight channels for each column.
template <typename T>
__device__ __forceinline__ void write_square(uint32_t* left, uint32_t* right, const Window<T>& own,
                                             const Window<T>& beside, const Window<T>& below, const Window<T>& across) {
  uint32_t words[2][8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    PairOfChannels a = pair_of(own, i), b = pair_of(beside, i), c = pair_of(below, i), d = pair_of(across, i);
    uint32_t upper[2] = {a.from(4), add_pairs<T>(a.from(5), b.from(3))};
    uint32_t lower[2] = {add_pairs<T>(a.from(7), c.from(1)),
                         add_pairs<T>(add_pairs<T>(a.from(8), b.from(6)), add_pairs<T>(c.from(2), d.from(0)))};
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      words[x][2 * i] = __byte_perm(upper[x], lower[x], 0x5410);
      words[x][2 * i + 1] = __byte_perm(upper[x], lower[x], 0x7632);
    }
  }
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    uint4* to = reinterpret_cast<uint4*>(x ? right : left);
    to[0] = make_uint4(words[x][0], words[x][1], words[x][2], words[x][3]);
    to[1] = make_uint4(words[x][4], words[x][5], words[x][6], words[x][7]);
  }
}

// partial [gridDim.x, C, 56]: sums over a block's positions of gradient times patch. A block takes 32 * kHalves
// channels (blockIdx.y); a warp takes half of 64 of them, and each kGroups-th eight columns.
template <typename T, int kHalves>
__global__ void __launch_bounds__(kThreads, 2)
    stem_products(const T* image, const T* gradient, const uint8_t* index, StemSize size, float* partial) {
  constexpr int kChannels = 32 * kHalves, kPitch = kChannels + 8, kGroups = kThreads / 32 / kHalves;
  constexpr int kVectors = kChannels / 8;
  uint32_t* pixels = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* staged = pixels + (4 * kRows + 3) * kImagePitch;  // two rows of squares: [columns][channels]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  const int half = warp % kHalves, turn = warp / kHalves;
  const int square = threadIdx.x / kVectors, vector = threadIdx.x % kVectors;
  const int channel = blockIdx.y * kChannels + 8 * vector;

  const int chunks = parts_of(size.rows(), kRows), width = size.width / 2;
  const int across = parts_of(width, kColumns);
  float acc[2][7][4] = {};
  for (int tile = blockIdx.x; tile < size.images * chunks * across; tile += gridDim.x) {
    const int64_t n = tile / (chunks * across);
    const int chunk = tile / across % chunks;
    const int first = part_begin(size.rows(), chunks, chunk), end = part_begin(size.rows(), chunks, chunk + 1);
    const int column0 = 8 * part_begin(width / 8, across, tile % across);
    const int columns = 8 * part_begin(width / 8, across, tile % across + 1) - column0;
    const T* own_gradient = gradient + n * size.rows() * size.columns() * size.channels;
    const uint8_t* own_index = index + n * size.rows() * size.columns() * size.channels;
    const int column = column0 / 2 + square;
    const bool stages = 2 * square < columns;
    auto window = [&](int row, int x) { return load_window(own_gradient, own_index, size, row, x, channel); };
    uint32_t* left = staged + 2 * square * kPitch + 8 * vector;

    load_words(pixels, kImagePitch, 4 * (end - first) + 3, image + n * size.height * size.width, size.height,
               size.width, 4 * first - 3, 2 * column0 - 4);
    Window<T> below = {}, beside = {};
    if (stages) {
      below = window(first + 1, column), beside = window(first + 1, column + 1);
      write_square(left, left + kPitch, window(first, column), window(first, column + 1), below, beside);
    }
    __syncthreads();
    for (int row = first; row < end; ++row) {
      const bool more = stages && row + 1 < end;
      Window<T> next = {}, next_beside = {};
      if (more) next = window(row + 2, column), next_beside = window(row + 2, column + 1);

      const uint32_t* from = staged + (row - first) % 2 * (kColumns * kPitch) + 32 * half + group;
      for (int eight = turn; eight < columns / 8; eight += kGroups) {
        uint32_t patches[7][2];
        load_patches(patches, pixels + 4 * (row - first) * kImagePitch + 16 * eight + group + 2 * member, kImagePitch);
        if (group == 0) patches[0][0] = patches[0][1] = PairOfOnes<T>::bits;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint32_t* at = from + (8 * eight + member) * kPitch + 16 * m;
          const uint32_t a[4] = {at[0], at[8], at[4 * kPitch], at[4 * kPitch + 8]};
#pragma unroll
          for (int ky = 0; ky < 7; ++ky) mma_16x8x16<T>(acc[m][ky], a, patches[ky]);
        }
      }
      // Into the other half of `staged`: the barrier before this row was passed when all had read it.
      if (more) {
        uint32_t* to = left + (row + 1 - first) % 2 * (kColumns * kPitch);
        write_square(to, to + kPitch, below, beside, next, next_beside);
        below = next, beside = next_beside;
      }
      __syncthreads();
    }
  }

  float* sums = reinterpret_cast<float*>(shared_memory());  // [kChannels, 56]
  for (int i = 0; i < kGroups; ++i) {
    if (turn == i)
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int ky = 0; ky < 7; ++ky)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            int own = 32 * half + 16 * m + group + 8 * (j / 2);
            float& sum = sums[own * kStemTaps + 8 * ky + 2 * member + j % 2];
            sum = i ? sum + acc[m][ky][j] : acc[m][ky][j];
          }
    __syncthreads();
  }
  float* to = partial + (int64_t(blockIdx.x) * size.channels + blockIdx.y * kChannels) * kStemTaps;
  for (int i = threadIdx.x; i < kChannels * kStemTaps; i += kThreads) to[i] = sums[i];
}

// One block of 64 threads for each channel: the gradients of the kernel, of gamma and of beta.
template <typename T>
__global__ void __launch_bounds__(64) stem_finish(StemBackward args, const float* products) {
  wait_for_previous_kernel();
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const int channel = blockIdx.x, channels = args.shape.channels, k = threadIdx.x;
  const bool is_tap = k < kStemTaps && k % 8 > 0;
  const double mean = args.statistics[channel], inverse = args.statistics[2 * channels + channel];
  const double sum = products[channel * kStemTaps], product = is_tap ? products[channel * kStemTaps + k] : 0;
  const double weight = is_tap ? to_float(static_cast<const T*>(args.kernel)[channel * kStemTaps + k]) : 0;
  const double grad_gamma = inverse * (block_sum_64(weight * product, scratch) - mean * sum);
  if (k == 0) {
    args.grad_gamma[channel] = float(grad_gamma);
    args.grad_beta[channel] = float(sum);
  }
  if (!is_tap) return;
  double gradient = product;
  if (args.batch_statistics)
    gradient -= sum * args.taps[k] + grad_gamma * inverse * args.taps[(1 + channel) * kStemTaps + k];
  gradient *= inverse * (args.gamma ? args.gamma[channel] : 1.0f);
  float* tap = args.grad_weight + weight_at(args.shape, channel, k);
  for (int i = 0; i < args.shape.inputs; ++i) tap[i * args.shape.plane_step] = float(gradient);
}

template <typename T, int kHalves>
cudaError_t backward(const StemBackward& args, cudaStream_t stream) {
  const StemShape& shape = args.shape;
  const StemSize size{int(shape.images), shape.height, shape.width, shape.channels};
  const int count = shape.channels * kStemTaps, blocks = stem_blocks(shape);
  float* products = static_cast<float*>(args.workspace);
  float* partial = products + count;
  const size_t staged = 2 * kColumns * (32 * kHalves + 8);
  const size_t shared = ((4 * kRows + 3) * kImagePitch + staged) * sizeof(uint32_t);
  cudaError_t error = launch(stem_products<T, kHalves>, dim3(blocks, shape.channels / (32 * kHalves)), dim3(kThreads),
                             shared, stream, false, 1, static_cast<const T*>(args.image),
                             static_cast<const T*>(args.grad_out), args.index, size, partial);
  if (error == cudaSuccess) error = launch_stem_sum(partial, blocks, count, products, stream);
  if (error != cudaSuccess) return error;
  return launch(stem_finish<T>, dim3(shape.channels), dim3(64), 2 * sizeof(double), stream, may_overlap(), 1, args,
                static_cast<const float*>(products));
}

}  // namespace

cudaError_t launch_stem_backward(const StemBackward& args, cudaStream_t stream) {
  const bool bfloat = args.shape.type == Type::kBFloat16;
  if (args.shape.channels % 64 == 0)
    return bfloat ? backward<__nv_bfloat16, 2>(args, stream) : backward<__half, 2>(args, stream);
  return bfloat ? backward<__nv_bfloat16, 1>(args, stream) : backward<__half, 1>(args, stream);
}

}  // namespace ngd_fast
