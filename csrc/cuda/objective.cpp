// The operators' CUDA kernels for the dispatcher: checks, allocation, stream. Schemas: csrc/cpu/module.cpp.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include <optional>
#include <tuple>

#include "objective_cuda.h"

namespace ngd_fast {
namespace {

using Optional = std::optional<at::Tensor>;

Type type_of(const at::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Type::kFloat32;
    case at::kHalf:
      return Type::kFloat16;
    case at::kBFloat16:
      return Type::kBFloat16;
    case at::kDouble:
      return Type::kFloat64;
    default:
      TORCH_CHECK_TYPE(false, name, ": wanted float32, bfloat16, float16 or float64, got ", t.scalar_type());
  }
}

// Stands for an empty tensor, which has no address: null means absent. No kernel reads or writes it.
alignas(16) unsigned char nothing[16];

Tensor reference(const at::Tensor& t, const char* name) {
  return {t.numel() ? t.data_ptr() : nothing, type_of(t, name)};
}

// Collects a call's arguments as contiguous tensors of one device, and keeps them alive until the launch.
class Inputs {
 public:
  explicit Inputs(at::Device device) : device_(device) {}

  Tensor floating(const Optional& t, at::IntArrayRef shape, const char* name) {
    if (!t.has_value()) return {};
    return reference(keep(*t, shape, name), name);
  }

  // Small, and given in the type that is computed in (objective_cuda.h).
  Tensor small(const Optional& t, at::IntArrayRef shape, at::ScalarType type, const char* name) {
    if (!t.has_value()) return {};
    type_of(*t, name);
    return reference(keep(t->to(type), shape, name), name);
  }

  const int64_t* indices(const Optional& t, int64_t rows, const char* name) {
    if (!t.has_value()) return nullptr;
    TORCH_CHECK_TYPE(t->scalar_type() == at::kLong, name, ": wanted int64 class indices, got ", t->scalar_type());
    const at::Tensor& kept = keep(*t, {rows}, name);
    return rows ? kept.const_data_ptr<int64_t>() : reinterpret_cast<const int64_t*>(nothing);
  }

 private:
  const at::Tensor& keep(const at::Tensor& t, at::IntArrayRef shape, const char* name) {
    TORCH_CHECK_VALUE(t.device() == device_, name, ": wanted a tensor on ", device_, ", got one on ", t.device());
    TORCH_CHECK_VALUE(t.sizes() == shape, name, ": wanted shape ", shape, ", got ", t.sizes());
    kept_[count_] = t.contiguous();
    return kept_[count_++];
  }

  at::Device device_;
  at::Tensor kept_[12];
  int count_ = 0;
};

void check_sizes(int64_t dim, int64_t classes, int64_t prototypes) {
  TORCH_CHECK_VALUE(dim <= 2048, "features: wanted D of at most 2048, got ", dim);
  TORCH_CHECK_VALUE(classes >= 1 && classes <= 64, "num_classes: wanted 1 to 64, got ", classes);
  TORCH_CHECK_VALUE(prototypes <= 256, "prototypes: wanted at most 256, got ", prototypes);
}

// The dispatcher comes here for any tensor on a GPU; the others need not be there.
void check_cuda(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.is_cuda(), name, ": wanted a tensor on a GPU as the others, got one on ", t.device());
}

at::Tensor allocate(size_t bytes, at::Device device) {
  return at::empty({int64_t(bytes)}, at::TensorOptions().dtype(at::kByte).device(device));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> objective_fwd(
    const Optional& features, const Optional& logits, const Optional& target, const Optional& prototypes,
    const Optional& prior, const Optional& labels, const Optional& teacher_logits, const Optional& class_weight,
    const Optional& geo_weight, const Optional& class_sums, int64_t num_classes, at::IntArrayRef high_valence,
    at::ArrayRef<double> settings, double geo_weight_value, double geo_grad_scale, bool want_features_grad, bool want_logits_grad) {
  TORCH_CHECK_VALUE(features.has_value() || logits.has_value(), "features, logits: wanted at least one of them");
  const at::Tensor& first = features.has_value() ? *features : *logits;
  TORCH_CHECK_VALUE(first.dim() == 2, "features, logits: wanted two dimensions, got shape ", first.sizes());
  TORCH_CHECK_VALUE(features.has_value() || (!prototypes.has_value() && !labels.has_value()),
                    "features: wanted where prototypes or labels are given");
  TORCH_CHECK_VALUE(logits.has_value() == target.has_value(), "logits, target: wanted both or neither");
  TORCH_CHECK_VALUE(logits.has_value() || !teacher_logits.has_value(), "logits: wanted where teacher_logits are given");
  TORCH_CHECK_VALUE(prototypes.has_value() == prior.has_value(), "prototypes, prior: wanted both or neither");
  TORCH_CHECK_VALUE(!prototypes.has_value() || prototypes->dim() == 2, "prototypes: wanted two dimensions, got shape ",
                    prototypes->sizes());
  int64_t rows = first.size(0), dim = features.has_value() ? first.size(1) : 0;
  int64_t count = prototypes.has_value() ? prototypes->size(0) : 0;
  check_sizes(dim, num_classes, count);
  TORCH_CHECK_VALUE(!prototypes.has_value() || count >= 1, "prototypes: wanted at least one");
  check_cuda(first, features.has_value() ? "features" : "logits");
  c10::cuda::CUDAGuard guard(first.device());

  // float64 anywhere: all in float64; the general path then wants the features so too.
  bool exact = (features.has_value() && features->scalar_type() == at::kDouble) ||
               (logits.has_value() && logits->scalar_type() == at::kDouble);
  Optional wide = features;
  if (exact && features.has_value()) wide = features->to(at::kDouble);

  Inputs inputs(first.device());
  ObjectiveArgs args;
  args.rows = rows;
  args.dim = int(dim);
  args.classes = int(num_classes);
  args.prototype_count = int(count);
  args.features = inputs.floating(wide, {rows, dim}, "features");
  args.logits = inputs.floating(logits, {rows, num_classes}, "logits");
  args.teacher_logits = inputs.floating(teacher_logits, {rows, num_classes}, "teacher_logits");
  if (target.has_value() && target->is_floating_point())
    args.target_distribution = inputs.floating(target, {rows, num_classes}, "target");
  else
    args.target = inputs.indices(target, rows, "target");
  args.labels = inputs.indices(labels, rows, "labels");
  const at::ScalarType type = exact ? at::kDouble : at::kFloat;
  args.prototypes = inputs.small(prototypes, {count, dim}, type, "prototypes");
  args.prior_per_row = prior.has_value() && prior->dim() == 2;
  args.prior = args.prior_per_row ? inputs.small(prior, {rows, count}, type, "prior")
                                  : inputs.small(prior, {count}, type, "prior");
  args.class_weight = inputs.small(class_weight, {num_classes}, type, "class_weight");
  args.geo_weight = inputs.small(geo_weight, {}, type, "geo_weight");
  args.class_sums = inputs.small(class_sums, {num_classes, dim + 2}, type, "class_sums");
  for (int64_t c : high_valence) {
    TORCH_CHECK_INDEX(c >= 0 && c < num_classes, "high_valence: wanted classes in [0, ", num_classes, "), got ", c);
    args.high_valence |= uint64_t(1) << c;
  }
  TORCH_CHECK_VALUE(int64_t(settings.size()) == kSettingsCount, "settings: wanted ", kSettingsCount, " numbers, got ",
                    settings.size());
  args.unpack(settings.data());
  args.geo_weight_value = geo_weight_value;
  args.geo_grad_scale = geo_grad_scale;

  auto options = first.options();
  at::Tensor terms = at::empty({6}, options.dtype(type));
  want_features_grad = want_features_grad && features.has_value();
  want_logits_grad = want_logits_grad && logits.has_value();
  at::Tensor grad_features = want_features_grad ? at::empty({rows, dim}, wide->options()) : at::empty({0}, options);
  at::Tensor grad_logits =
      want_logits_grad ? at::empty({rows, num_classes}, logits->options()) : at::empty({0}, options);
  args.terms = reference(terms, "terms");
  if (want_features_grad) args.grad_features = reference(grad_features, "features");
  if (want_logits_grad) args.grad_logits = reference(grad_logits, "logits");

  at::Tensor workspace = allocate(objective_workspace(args), first.device());
  args.workspace = workspace.data_ptr();
  C10_CUDA_CHECK(launch_objective(args, c10::cuda::getCurrentCUDAStream()));
  if (want_features_grad && exact) grad_features = grad_features.to(features->scalar_type());
  return {terms, grad_features, grad_logits};
}

at::Tensor geo_sums(const at::Tensor& features, const at::Tensor& labels, int64_t num_classes) {
  TORCH_CHECK_VALUE(features.dim() == 2, "features: wanted two dimensions, got shape ", features.sizes());
  check_sizes(features.size(1), num_classes, 0);
  check_cuda(features, "features");
  c10::cuda::CUDAGuard guard(features.device());
  int64_t rows = features.size(0), dim = features.size(1);
  Inputs inputs(features.device());
  ObjectiveArgs args;
  args.rows = rows;
  args.dim = int(dim);
  args.classes = int(num_classes);
  args.features = inputs.floating(features, {rows, dim}, "features");
  args.labels = inputs.indices(labels, rows, "labels");
  bool exact = features.scalar_type() == at::kDouble;
  at::Tensor sums = at::empty({num_classes, dim + 2}, features.options().dtype(exact ? at::kDouble : at::kFloat));
  args.terms = reference(sums, "sums");
  at::Tensor workspace = allocate(geo_sums_workspace(args), features.device());
  args.workspace = workspace.data_ptr();
  C10_CUDA_CHECK(launch_geo_sums(args, c10::cuda::getCurrentCUDAStream()));
  return sums;
}

void scale_(at::Tensor& gradient, const at::Tensor& factor) {
  check_cuda(gradient, "gradient");
  TORCH_CHECK_VALUE(gradient.is_contiguous(), "gradient: wanted a contiguous tensor");
  TORCH_CHECK_VALUE(factor.numel() == 1 && factor.device() == gradient.device(), "factor: wanted one number on ",
                    gradient.device(), ", got shape ", factor.sizes(), " on ", factor.device());
  if (gradient.numel() == 0) return;
  c10::cuda::CUDAGuard guard(gradient.device());
  C10_CUDA_CHECK(launch_scale(reference(gradient, "gradient"), gradient.numel(), reference(factor, "factor"),
                              c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace ngd_fast

TORCH_LIBRARY_IMPL(ngd_fast, CUDA, m) {
  m.impl("objective_fwd", &ngd_fast::objective_fwd);
  m.impl("geo_sums", &ngd_fast::geo_sums);
  m.impl("scale_", &ngd_fast::scale_);
}

// Importing the Python module runs the registration above.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("SETTINGS") = ngd_fast::kSettings;
  m.attr("KD_MODES") = ngd_fast::kKdModes;
}
