// objective_fwd, geo_sums and scale_ for CPU tensors: checks and allocates; compute.h has the work.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "compute.h"

namespace ngd_fast::cpu {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Stands for an empty tensor, which may have no address: null means absent.
const int64_t kNothing = 0;

bool given(const MaybeTensor& t) { return t.has_value() && t->defined(); }

Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::kFloat32;
    case at::kDouble: return Type::kFloat64;
    case at::kHalf: return Type::kFloat16;
    case at::kBFloat16: return Type::kBFloat16;
    default: TORCH_CHECK_TYPE(false, name, ": wanted float32, bfloat16, float16 or float64, got ", t.scalar_type());
  }
}

// A tensor as a matrix of this shape; `owner` keeps the copy alive where its columns were not side by side.
Matrix matrix(const MaybeTensor& maybe, const char* name, int64_t rows, int64_t columns, std::vector<Tensor>& owner) {
  if (!given(maybe)) return {};
  const Tensor& t = *maybe;
  const bool fits = t.dim() == 2 ? t.size(0) == rows && t.size(1) == columns : t.dim() == 1 && t.size(0) == columns;
  TORCH_CHECK_VALUE(fits, name, ": wanted shape [", rows, ", ", columns, "], got ", t.sizes());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, ": wanted a CPU tensor, got one on ", t.device());
  const Tensor usable = columns > 1 && t.stride(-1) != 1 ? t.contiguous() : t;
  owner.push_back(usable);
  return {usable.numel() ? usable.const_data_ptr() : &kNothing, type_of(t, name), t.dim() == 2 ? usable.stride(0) : 0};
}

const int64_t* indices(const MaybeTensor& maybe, const char* name, int64_t rows, std::vector<Tensor>& owner) {
  if (!given(maybe)) return nullptr;
  TORCH_CHECK_TYPE(maybe->scalar_type() == at::kLong, name, ": wanted int64 class indices, got ", maybe->scalar_type());
  TORCH_CHECK_VALUE(maybe->dim() == 1 && maybe->size(0) == rows, name, ": wanted shape [", rows, "], got ", maybe->sizes());
  TORCH_CHECK_VALUE(maybe->device().is_cpu(), name, ": wanted a CPU tensor, got one on ", maybe->device());
  owner.push_back(maybe->contiguous());
  return rows ? owner.back().const_data_ptr<int64_t>() : &kNothing;
}

// Runs body(begin, end) over pieces of [0, count) of at least `grain`.
const auto parallel_for = [](int64_t count, int64_t grain, const auto& body) { at::parallel_for(0, count, grain, body); };

// The flags of a call, as errors.
void check(int flags, int classes) {
  TORCH_CHECK_INDEX(!(flags & kBadTarget), "target: holds a class outside 0 to ", classes - 1, " that is not ", kIgnoreIndex);
  TORCH_CHECK_INDEX(!(flags & kBadLabel), "labels: hold a class outside 0 to ", classes - 1, " that is not ", kNoLabel);
}

std::tuple<Tensor, Tensor, Tensor> objective_fwd(
    const MaybeTensor& features, const MaybeTensor& logits, const MaybeTensor& target, const MaybeTensor& prototypes,
    const MaybeTensor& prior, const MaybeTensor& labels, const MaybeTensor& teacher_logits, const MaybeTensor& class_weight,
    const MaybeTensor& geo_weight, const MaybeTensor& class_sums, int64_t num_classes, at::IntArrayRef high_valence,
    at::ArrayRef<double> settings, double geo_weight_value, double geo_grad_scale, bool want_features_grad, bool want_logits_grad) {
  TORCH_CHECK_VALUE(given(features) || given(logits), "features, logits: wanted at least one, got neither");
  TORCH_CHECK_VALUE(given(features) || !(given(prototypes) || given(labels)), "features: wanted beside prototypes or labels");
  TORCH_CHECK_VALUE(given(logits) || !given(target), "logits: wanted beside target");
  TORCH_CHECK_VALUE(given(target) || !given(logits), "target: wanted beside logits");
  TORCH_CHECK_VALUE(num_classes >= 1, "num_classes: wanted at least 1, got ", num_classes);
  const Tensor& first = given(features) ? *features : *logits;
  TORCH_CHECK_VALUE(first.dim() == 2, "features, logits: wanted [B, D] and [B, C], got ", first.sizes());

  std::vector<Tensor> owner;
  owner.reserve(12);
  std::vector<unsigned char> valence(size_t(num_classes), 0);
  Args args;
  args.rows = first.size(0);
  args.classes = int(num_classes);
  args.dim = given(features) ? int(first.size(1)) : 0;
  args.features = matrix(features, "features", args.rows, args.dim, owner);
  args.logits = matrix(logits, "logits", args.rows, num_classes, owner);
  args.teacher_logits = matrix(given(logits) ? teacher_logits : MaybeTensor(), "teacher_logits", args.rows, num_classes, owner);
  if (given(prototypes)) {
    TORCH_CHECK_VALUE(prototypes->dim() == 2 && prototypes->size(0) > 0, "prototypes: wanted [K, D], got ", prototypes->sizes());
    TORCH_CHECK_VALUE(given(prior), "prior: wanted beside prototypes");
    args.prototype_count = int(prototypes->size(0));
    args.prototypes = matrix(prototypes, "prototypes", args.prototype_count, args.dim, owner);
    args.prior = matrix(prior, "prior", args.rows, args.prototype_count, owner);
  }
  if (given(target)) {
    if (target->dim() == 2)
      args.target_distribution = matrix(target, "target", args.rows, num_classes, owner);
    else
      args.target = indices(target, "target", args.rows, owner);
    args.class_weight = matrix(class_weight, "class_weight", 1, num_classes, owner);
  }
  const bool twice = args.features.type == Type::kFloat64 || args.logits.type == Type::kFloat64;
  const auto accumulate = twice ? at::kDouble : at::kFloat;
  args.labels = indices(labels, "labels", args.rows, owner);
  for (int64_t c : high_valence) {
    TORCH_CHECK_VALUE(c >= 0 && c < num_classes, "high_valence: wanted classes from 0 to ", num_classes - 1, ", got ", c);
    valence[size_t(c)] = 1;
  }
  args.high_valence = valence.data();
  if (args.labels && given(class_sums))
    args.class_sums = matrix(class_sums->to(accumulate), "class_sums", num_classes, args.dim + 2, owner);
  TORCH_CHECK_VALUE(int64_t(settings.size()) == kSettingsCount, "settings: wanted ", kSettingsCount, " numbers, got ",
                    settings.size());
  args.unpack(settings.data());
  args.geo_weight = given(geo_weight) ? geo_weight->item<double>() : geo_weight_value;
  args.geo_grad_scale = geo_grad_scale;

  Tensor terms = at::empty({6}, first.options().dtype(accumulate));
  // Two tensors, because an operator's results must not be one and the same.
  Tensor grad_features = at::empty({0}, first.options()), grad_logits = at::empty({0}, first.options());
  if (want_features_grad && given(features)) {
    grad_features = at::empty({args.rows, args.dim}, features->options());
    args.grad_features = grad_features.mutable_data_ptr();
    if (!args.prototypes.data && !args.labels) grad_features.zero_();
  }
  if (want_logits_grad && given(logits)) {
    grad_logits = at::empty({args.rows, num_classes}, logits->options());
    args.grad_logits = grad_logits.mutable_data_ptr();
  }
  check(twice ? compute(parallel_for, args, terms.mutable_data_ptr<double>())
              : compute(parallel_for, args, terms.mutable_data_ptr<float>()),
        args.classes);
  return {terms, grad_features, grad_logits};
}

template <typename A>
void class_sums_into(const Args& args, A* to) {
  const int64_t width = padded(args.dim), stride = width + 2;
  const std::unique_ptr<A[]> sums(new A[size_t(args.classes * stride)]);
  double ignored;
  check(sum_rows(parallel_for, args, sums.get(), &ignored, [] {}), args.classes);
  for (int64_t c = 0; c < args.classes; ++c, to += args.dim + 2) {
    const A* from = sums.get() + c * stride;
    std::copy(from, from + args.dim, to);
    std::copy(from + width, from + stride, to + args.dim);
  }
}

Tensor geo_sums(const Tensor& features, const Tensor& labels, int64_t num_classes) {
  TORCH_CHECK_VALUE(features.dim() == 2, "features: wanted [B, D], got ", features.sizes());
  TORCH_CHECK_VALUE(num_classes >= 1, "num_classes: wanted at least 1, got ", num_classes);
  std::vector<Tensor> owner;
  Args args;
  args.rows = features.size(0);
  args.dim = int(features.size(1));
  args.classes = int(num_classes);
  args.features = matrix(features, "features", args.rows, args.dim, owner);
  args.labels = indices(labels, "labels", args.rows, owner);
  const bool twice = args.features.type == Type::kFloat64;
  Tensor sums = at::empty({num_classes, args.dim + 2}, features.options().dtype(twice ? at::kDouble : at::kFloat));
  if (twice)
    class_sums_into(args, sums.mutable_data_ptr<double>());
  else
    class_sums_into(args, sums.mutable_data_ptr<float>());
  return sums;
}

void scale_(Tensor& gradient, const Tensor& factor) {
  const double value = factor.item<double>();
  if (value != 1.0) gradient.mul_(value);
}

}  // namespace
}  // namespace ngd_fast::cpu

TORCH_LIBRARY_IMPL(ngd_fast, CPU, m) {
  m.impl("objective_fwd", TORCH_FN(ngd_fast::cpu::objective_fwd));
  m.impl("geo_sums", TORCH_FN(ngd_fast::cpu::geo_sums));
  m.impl("scale_", TORCH_FN(ngd_fast::cpu::scale_));
}
