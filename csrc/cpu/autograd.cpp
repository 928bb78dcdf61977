// ngd_fast::objective: objective_fwd with a gradient, for every device that has it, in eager mode and under torch.compile.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "autograd.h"

namespace ngd_fast {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using ForwardSignature = std::tuple<Tensor, Tensor, Tensor>(
    const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
    const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, int64_t, at::IntArrayRef,
    at::ArrayRef<double>, double, double, bool, bool);

// What a call has beside features and logits, and the gradients that its forward pass left.
struct Call : torch::CustomClassHolder {
  MaybeTensor target, prototypes, prior, labels, teacher_logits, class_weight, geo_weight, class_sums;
  int64_t num_classes;
  std::vector<int64_t> high_valence;
  std::vector<double> settings;
  double geo_weight_value, geo_grad_scale;
  bool want_features_grad, want_logits_grad;
  Tensor grad_features, grad_logits;
  int64_t changes_before = 0;

  // Counts the changes in place of what autograd does not save here: it grows by any of them.
  int64_t changes() const {
    int64_t sum = 0;
    for (const MaybeTensor* t : {&target, &prototypes, &prior, &labels, &teacher_logits, &class_weight, &geo_weight})
      if (t->has_value() && (*t)->defined() && !(*t)->is_inference()) sum += (*t)->_version();
    return sum;
  }

  // Terms; keeps the gradients.
  Tensor run(const MaybeTensor& features, const MaybeTensor& logits) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("ngd_fast::objective_fwd", "").typed<ForwardSignature>();
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor terms;
    std::tie(terms, grad_features, grad_logits) = op.call(
        features, logits, target, prototypes, prior, labels, teacher_logits, class_weight, geo_weight, class_sums,
        num_classes, high_valence, settings, geo_weight_value, geo_grad_scale, want_features_grad, want_logits_grad);
    return terms;
  }
};

Tensor total_of(const Tensor& terms) {
  // No autograd view: total has its own history, terms have none.
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return terms.select(0, 0);
}

// Real tensors are ours alone and are scaled where they lie, without asking the device for the factor. Traced ones (fake,
// functional, or under a dispatch mode) become a product that torch.compile fuses into what follows.
Tensor scaled(Tensor gradient, const Tensor& factor) {
  if (gradient.unsafeGetTensorImpl()->is_python_dispatch() || c10::impl::dispatch_mode_enabled() ||
      gradient.key_set().has(c10::DispatchKey::Functionalize))
    return (gradient * factor).to(gradient.scalar_type());
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ngd_fast::scale_", "")
                             .typed<void(Tensor&, const Tensor&)>();
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.call(gradient, factor);
  return gradient;
}

class Objective : public torch::autograd::Function<Objective> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const MaybeTensor& features,
                                                const MaybeTensor& logits, const c10::intrusive_ptr<Call>& call) {
    call->changes_before = call->changes();
    Tensor terms = call->run(features, logits);
    context->save_for_backward({features.value_or(Tensor()), logits.value_or(Tensor())});
    context->saved_data["call"] = c10::IValue::make_capsule(call);
    context->mark_non_differentiable({terms});
    context->set_materialize_grads(false);  // terms have none: zeros for them would cost a launch
    return {total_of(terms), terms};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grad_outputs) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "the fused objective has no second derivative (create_graph=True): its gradient was computed in the forward "
                "pass; use backend='reference'");
    auto capsule = context->saved_data["call"].toCapsule();
    auto& call = static_cast<Call&>(*capsule);
    const auto saved = context->get_saved_variables();  // raises where the graph has been freed
    if (!grad_outputs[0].defined()) return {Tensor(), Tensor(), Tensor()};
    // A second backward through a retained graph: the first one gave the gradients away.
    if ((call.want_features_grad && !call.grad_features.defined()) ||
        (call.want_logits_grad && !call.grad_logits.defined())) {
      TORCH_CHECK(call.changes() == call.changes_before,
                  "a second backward pass computes the objective again, but an input has been modified by an inplace operation");
      call.run(saved[0].defined() ? MaybeTensor(saved[0]) : MaybeTensor(),
               saved[1].defined() ? MaybeTensor(saved[1]) : MaybeTensor());
    }
    const Tensor factor = grad_outputs[0];
    Tensor features, logits;
    if (call.want_features_grad) features = scaled(std::exchange(call.grad_features, Tensor()), factor);
    if (call.want_logits_grad) logits = scaled(std::exchange(call.grad_logits, Tensor()), factor);
    return {features, logits, Tensor()};
  }
};

std::tuple<Tensor, Tensor> objective(
    const MaybeTensor& features, const MaybeTensor& logits, const MaybeTensor& target, const MaybeTensor& prototypes,
    const MaybeTensor& prior, const MaybeTensor& labels, const MaybeTensor& teacher_logits, const MaybeTensor& class_weight,
    const MaybeTensor& geo_weight, const MaybeTensor& class_sums, int64_t num_classes, at::IntArrayRef high_valence,
    at::ArrayRef<double> settings, double geo_weight_value, double geo_grad_scale) {
  auto call = c10::make_intrusive<Call>();
  call->target = target;
  call->prototypes = prototypes;
  call->prior = prior;
  call->labels = labels;
  call->teacher_logits = teacher_logits;
  call->class_weight = class_weight;
  call->geo_weight = geo_weight;
  call->class_sums = class_sums;
  call->num_classes = num_classes;
  call->high_valence = high_valence.vec();
  call->settings = settings.vec();
  call->geo_weight_value = geo_weight_value;
  call->geo_grad_scale = geo_grad_scale;
  const auto wants = [](const MaybeTensor& t) {
    return at::GradMode::is_enabled() && t.has_value() && t->defined() && t->requires_grad();
  };
  call->want_features_grad = wants(features);
  call->want_logits_grad = wants(logits);
  if (!call->want_features_grad && !call->want_logits_grad) {
    Tensor terms = call->run(features, logits);
    return {total_of(terms), terms};
  }
  auto outputs = Objective::apply(features, logits, call);
  return {outputs[0], outputs[1]};
}

}  // namespace

std::vector<Tensor> eager_objective(const MaybeTensor& features, const Tensor& logits, const Tensor& target,
                                    const MaybeTensor& prototypes, const MaybeTensor& prior, const MaybeTensor& labels,
                                    const MaybeTensor& teacher_logits, const MaybeTensor& class_weight,
                                    const MaybeTensor& geo_weight, double geo_weight_value, bool geo,
                                    const std::vector<int64_t>& high_valence, const std::vector<double>& settings) {
  // torch.func differentiates by its own means.
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return {};
  const bool grad = at::GradMode::is_enabled();
  const MaybeTensor given_target = target, given_logits = logits;
  for (const MaybeTensor* t : {&given_target, &prototypes, &prior, &labels, &teacher_logits, &class_weight, &geo_weight})
    if (*t && ((grad && (*t)->requires_grad()) || (*t)->device() != logits.device())) return {};
  for (const MaybeTensor* t : {&features, &given_logits})
    if (*t && ((grad && (*t)->requires_grad() && (*t)->scalar_type() == at::kHalf) || (*t)->device() != logits.device()))
      return {};
  const auto has = [](const MaybeTensor& t, int64_t dimensions) { return !t || t->dim() == dimensions; };
  // What objective_fwd would take too: a row for all rows, and what it would not look at.
  if (!has(features, 2) || logits.dim() != 2 || !has(teacher_logits, 2) || !has(class_weight, 1) || !has(geo_weight, 0) ||
      prototypes.has_value() != prior.has_value() || (!features && (prototypes || geo)) ||
      (geo_weight && !geo_weight->is_floating_point()) || (geo && !labels && target.dim() != 1))
    return {};
  const MaybeTensor used = !geo ? MaybeTensor() : labels ? labels : given_target;
  auto [total, terms] = objective(features, logits, target, prototypes, prior, used, teacher_logits, class_weight,
                                  geo_weight, MaybeTensor(), logits.size(1),
                                  geo ? at::IntArrayRef(high_valence) : at::IntArrayRef(), settings, geo_weight_value, 1.0);
  std::vector<Tensor> all{total};
  all.reserve(6);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  for (int i = 1; i < 6; ++i) all.push_back(terms.select(0, i));
  return all;
}

}  // namespace ngd_fast

TORCH_LIBRARY_IMPL(ngd_fast, CompositeImplicitAutograd, m) { m.impl("objective", TORCH_FN(ngd_fast::objective)); }
