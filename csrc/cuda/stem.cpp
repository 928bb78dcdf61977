// The stem's operators for the dispatcher: checks, allocation, stream. Schemas: csrc/cpu/module.cpp.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include <optional>
#include <tuple>

#include "stem_cuda.h"

namespace ngd_fast {
namespace {

using Optional = std::optional<at::Tensor>;

StemShape shape_of(const at::Tensor& images, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == 7 && weight.size(3) == 7,
                    "weight: wanted shape [C, I, 7, 7], got ", weight.sizes());
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(1) == 1, "images: wanted shape [N, 1, H, W], got ",
                    images.sizes());
  // The dispatcher comes here for any tensor on a GPU; the others need not be there.
  TORCH_CHECK_VALUE(images.is_cuda(), "images: wanted a tensor on a GPU, got one on ", images.device());
  at::ScalarType type = images.scalar_type();
  TORCH_CHECK_TYPE(type == at::kBFloat16 || type == at::kHalf, "images: wanted bfloat16 or float16, got ", type);
  TORCH_CHECK_VALUE(images.is_contiguous(), "images: wanted a contiguous tensor");
  StemShape shape;
  shape.images = images.size(0);
  shape.height = int(images.size(2));
  shape.width = int(images.size(3));
  shape.channels = int(weight.size(0));
  shape.inputs = int(weight.size(1));
  const bool planes = weight.is_contiguous();
  TORCH_CHECK_VALUE(planes || weight.is_contiguous(at::MemoryFormat::ChannelsLast),
                    "weight: wanted a tensor that is contiguous or channels-last");
  shape.plane_step = planes ? 49 : 1;
  shape.tap_step = planes ? 1 : shape.inputs;
  shape.type = type == at::kHalf ? Type::kFloat16 : Type::kBFloat16;
  TORCH_CHECK_VALUE(stem_fits(shape),
                    "images, weight: wanted 1 to 2^20 images, a height that is a multiple of 4, a width ",
                    "that is one of 16, both up to 512, and 32 to 1024 channels in steps of 32; got ", images.sizes(),
                    " and ", shape.channels, " channels");
  return shape;
}

// A float32 tensor of this shape on the images' device; null where there is none.
const float* floats(const Optional& t, at::IntArrayRef sizes, const at::Tensor& images, const char* name) {
  if (!t.has_value()) return nullptr;
  TORCH_CHECK_VALUE(t->device() == images.device(), name, ": wanted a tensor on ", images.device(), ", got one on ",
                    t->device());
  TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, name, ": wanted float32, got ", t->scalar_type());
  TORCH_CHECK_VALUE(t->sizes() == sizes, name, ": wanted shape ", sizes, ", got ", t->sizes());
  TORCH_CHECK_VALUE(t->is_non_overlapping_and_dense(), name, ": wanted a dense tensor");
  return t->const_data_ptr<float>();
}

// The kernels move up to 16 bytes at once; a view may begin anywhere.
at::Tensor aligned(const at::Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : t.clone();
}

at::Tensor workspace_for(const StemShape& shape, const at::Tensor& images) {
  return at::empty({int64_t(stem_workspace(shape))}, images.options().dtype(at::kByte));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> stem_fwd(
    const at::Tensor& images, const at::Tensor& weight, const Optional& gamma, const Optional& beta,
    const Optional& mean, const Optional& variance, bool batch_statistics, double epsilon, bool want_index) {
  StemForward args;
  args.shape = shape_of(images, weight);
  c10::cuda::CUDAGuard guard(images.device());
  const int64_t channels = args.shape.channels;
  const at::Tensor own_images = aligned(images);
  args.image = own_images.const_data_ptr();
  args.weight = floats(weight, weight.sizes(), images, "weight");
  args.gamma = floats(gamma, {channels}, images, "gamma");
  args.beta = floats(beta, {channels}, images, "beta");
  args.mean = floats(mean, {channels}, images, "mean");
  args.variance = floats(variance, {channels}, images, "variance");
  args.batch_statistics = batch_statistics;
  args.epsilon = epsilon;

  const auto numbers = images.options().dtype(at::kFloat);
  const int64_t sizes[] = {images.size(0), channels, images.size(2) / 4, images.size(3) / 4};
  const auto bytes = images.options().dtype(at::kByte);
  at::Tensor out = at::empty(sizes, images.options(), at::MemoryFormat::ChannelsLast);
  at::Tensor index = want_index ? at::empty(sizes, bytes, at::MemoryFormat::ChannelsLast) : at::empty({0}, bytes);
  at::Tensor kernel = at::empty({channels, kStemTaps}, images.options());
  at::Tensor statistics = at::empty({5, channels}, numbers);
  at::Tensor taps = at::empty({batch_statistics ? 1 + channels : 0, kStemTaps}, numbers);
  at::Tensor workspace = workspace_for(args.shape, images);
  args.kernel = kernel.data_ptr();
  args.statistics = statistics.data_ptr<float>();
  args.taps = taps.data_ptr<float>();
  args.out = out.data_ptr();
  args.index = want_index ? index.data_ptr<uint8_t>() : nullptr;
  args.workspace = workspace.data_ptr();
  C10_CUDA_CHECK(launch_stem_forward(args, c10::cuda::getCurrentCUDAStream()));
  return {out, index, kernel, statistics, taps};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> stem_bwd(const at::Tensor& grad_out, const at::Tensor& images,
                                                        const at::Tensor& weight, const Optional& gamma,
                                                        const at::Tensor& index, const at::Tensor& kernel,
                                                        const at::Tensor& statistics, const at::Tensor& taps,
                                                        bool batch_statistics) {
  TORCH_CHECK_VALUE(grad_out.sizes() == index.sizes(), "grad_out: wanted shape ", index.sizes(), ", got ",
                    grad_out.sizes());
  StemBackward args;
  args.shape = shape_of(images, weight);
  c10::cuda::CUDAGuard guard(images.device());
  const int64_t channels = args.shape.channels;
  const at::Tensor own_images = aligned(images);
  const at::Tensor own_grad = aligned(grad_out.to(images.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast));
  at::Tensor grad_weight = at::empty_like(weight);  // in its layout: autograd would copy another
  at::Tensor grad_gamma = at::empty({channels}, weight.options()), grad_beta = at::empty({channels}, weight.options());
  args.image = own_images.const_data_ptr();
  args.gamma = floats(gamma, {channels}, images, "gamma");
  args.batch_statistics = batch_statistics;
  args.kernel = kernel.const_data_ptr();
  args.statistics = floats(statistics, {5, channels}, images, "statistics");
  args.taps = floats(taps, {batch_statistics ? 1 + channels : 0, kStemTaps}, images, "taps");
  args.index = index.const_data_ptr<uint8_t>();
  args.grad_out = own_grad.const_data_ptr();
  args.grad_weight = grad_weight.data_ptr<float>();
  args.grad_gamma = grad_gamma.data_ptr<float>();
  args.grad_beta = grad_beta.data_ptr<float>();
  at::Tensor workspace = workspace_for(args.shape, images);
  args.workspace = workspace.data_ptr();
  C10_CUDA_CHECK(launch_stem_backward(args, c10::cuda::getCurrentCUDAStream()));
  return {grad_weight, grad_gamma, grad_beta};
}

}  // namespace
}  // namespace ngd_fast

TORCH_LIBRARY_IMPL(ngd_fast, CUDA, m) {
  m.impl("stem_fwd", &ngd_fast::stem_fwd);
  m.impl("stem_bwd", &ngd_fast::stem_bwd);
}
