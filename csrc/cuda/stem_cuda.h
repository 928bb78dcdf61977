// The first layers of a ResNet on grey images, on a GPU: 7x7 convolution of stride 2, batch norm, ReLU and 3x3
// max-pooling of stride 2, forward and backward. Plain pointers in, no ATen.
//
// A grey image has three equal channels, so the three planes of the kernel act as their sum: 49 taps instead of 147.
// The convolution's output (205 MB of bfloat16 at 128 images of 224 px and 64 channels) is never written:
// - The batch's mean and variance of a channel with taps w are w.m and w.Cov.w, where m and Cov are the mean and the
//   covariance of the image's 49-pixel patches. One pass over the image gives both for all channels.
// - The forward pass convolves, normalises and pools in registers and writes the pooled values (51 MB) and which of the
//   nine positions each came from (26 MB).
// - The backward pass rebuilds the gradient of the normalised values tile by tile and reduces it at once to its
//   products with the patches, S = sum g p^T [C, 49], and its sum s. Everything that batch norm adds to the gradients
//   follows from S, s, m and Cov.w, as the normalised values are linear in the patches.
// Floor at that size on an H200: 90 MB forward and 90 MB backward, 43 us at 4.23 TB/s; arithmetic, with padded tiles:
// 13 + 17 + 13 GFLOP of mma.sync.
//
// Sums cross blocks in a fixed order, so that results are bit-identical from run to run on the same card.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif
#include <cstdint>

#include "objective_cuda.h"

namespace ngd_fast {

// Taps as the kernels keep them: seven rows of eight, the first of each a zero. Of what is summed over positions,
// number 0 (the first row's zero tap) holds the sum with a one in the patch's place.
constexpr int kStemTaps = 56;

struct StemShape {
  int64_t images = 0;
  int height = 0, width = 0;         // multiples of 4 and of 16
  int channels = 0;                  // C, a multiple of 32
  int inputs = 0;                    // I, planes of the kernel, summed
  int plane_step = 0, tap_step = 0;  // of [C, I, 7, 7] in memory: between planes, between taps; the C lie end to end
  Type type = Type::kNone;           // of images, output and its gradient: bfloat16 or float16
};

struct StemForward {
  StemShape shape;
  const void* image = nullptr;      // [N, H, W]
  const float* weight = nullptr;    // [C, I, 7, 7]
  const float* gamma = nullptr;     // [C], null: ones
  const float* beta = nullptr;      // [C], null: zeros
  const float* mean = nullptr;      // [C], null: zeros; not read where batch_statistics
  const float* variance = nullptr;  // [C], null: ones (and epsilon 0); not read where batch_statistics
  bool batch_statistics = false;
  double epsilon = 0;
  void* kernel = nullptr;       // out, [C, 56]: the summed kernel, rounded
  float* statistics = nullptr;  // out, [5, C]: mean, unbiased variance, 1 / standard deviation, scale, shift
  float* taps = nullptr;        // out, [1 + C, 56]: m; then Cov.w of each channel. Only where batch_statistics
  void* out = nullptr;          // out, [N, H/4, W/4, C]
  uint8_t* index = nullptr;     // out, [N, H/4, W/4, C]: 0 to 8, or 9 where ReLU gave 0; null: not wanted
  void* workspace = nullptr;
};

struct StemBackward {
  StemShape shape;
  const void* image = nullptr;  // as forward
  const float* gamma = nullptr;
  bool batch_statistics = false;
  const void* kernel = nullptr;  // as forward left them
  const float* statistics = nullptr;
  const float* taps = nullptr;
  const uint8_t* index = nullptr;
  const void* grad_out = nullptr;  // [N, H/4, W/4, C]
  float* grad_weight = nullptr;    // out, [C, I, 7, 7]
  float* grad_gamma = nullptr;     // out, [C]
  float* grad_beta = nullptr;      // out, [C]
  void* workspace = nullptr;
};

// Whether the kernels take this shape.
bool stem_fits(const StemShape& shape);

// Bytes of workspace for either direction.
size_t stem_workspace(const StemShape& shape);

// images >= 1.
cudaError_t launch_stem_forward(const StemForward& args, cudaStream_t stream);
cudaError_t launch_stem_backward(const StemBackward& args, cudaStream_t stream);

}  // namespace ngd_fast
