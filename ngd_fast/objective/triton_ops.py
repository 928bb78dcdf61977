"""The Triton kernels as operators, with fake kernels and autograd. Importing this module imports Triton."""

import torch
from torch import Tensor

from ngd_fast.kernels import objective as kernels
from ngd_fast.objective import fakes
from ngd_fast.objective.settings import Packed

_SCHEMA = (
    "(Tensor? features, Tensor? logits, Tensor? target, Tensor? prototypes, Tensor? prior, Tensor? labels, "
    "Tensor? teacher_logits, Tensor? class_weight, Tensor? geo_weight, Tensor? class_sums, int num_classes, "
    "int[] high_valence, float[] settings, float geo_weight_value, float geo_grad_scale, bool want_features_grad, "
    "bool want_logits_grad) -> (Tensor terms, Tensor grad_features, Tensor grad_logits)"
)



def _objective_fwd(*args):
    *tensors, num_classes, high_valence, settings, weight, scale, want_features_grad, want_logits_grad = args
    wants = (want_features_grad, want_logits_grad)
    return kernels.objective_fwd(*tensors, num_classes, high_valence, Packed(*settings), weight, scale, *wants)


objective_fwd = torch.library.custom_op(
    "ngd_fast::objective_fwd_triton", _objective_fwd, mutates_args=(), schema=_SCHEMA
)
objective_fwd.register_fake(fakes.objective_fwd)

geo_sums = torch.library.custom_op(
    "ngd_fast::geo_sums_triton",
    kernels.geo_sums,
    mutates_args=(),
    schema="(Tensor features, Tensor labels, int num_classes) -> Tensor",
)
geo_sums.register_fake(fakes.geo_sums)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    # Real tensors are ours alone and are scaled where they lie; torch.compile fuses the product into what follows.
    if type(gradient) is Tensor:
        return kernels.scale_(gradient, factor)
    return (gradient * factor).to(gradient.dtype)


def _setup_context(ctx, inputs, output):
    _, grad_features, grad_logits = output
    ctx.mark_non_differentiable(grad_features, grad_logits)
    ctx.set_materialize_grads(False)
    # Saved as autograd saves: it then notices a change of them, and a graph that has been freed.
    ctx.save_for_backward(*inputs[:2])
    ctx.others = inputs[2:]
    ctx.changes = _changes(ctx.others)
    ctx.gradients = (grad_features, grad_logits)


def _changes(inputs) -> int:
    """Counts the changes in place of tensors that autograd does not save: it grows by any of them."""
    return sum(t._version for t in inputs if type(t) is Tensor and not t.is_inference())


def _backward(ctx, grad_terms, *_):
    if torch.is_grad_enabled():
        raise RuntimeError(SECOND_DERIVATIVE)
    inputs = (*ctx.saved_tensors, *ctx.others)
    if grad_terms is None:
        return (None,) * len(inputs)
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:  # a second backward through a retained graph: the first one gave them away
        if _changes(ctx.others) != ctx.changes:
            raise RuntimeError(CHANGED_INPUT)
        gradients = objective_fwd(*inputs)[1:]
    *_, want_features_grad, want_logits_grad = inputs
    factor = grad_terms[0]
    return (
        _scaled(gradients[0], factor) if want_features_grad else None,
        _scaled(gradients[1], factor) if want_logits_grad else None,
        *(None,) * (len(inputs) - 2),
    )


CHANGED_INPUT = (
    "a second backward pass computes the objective again, but an input has been modified by an inplace operation"
)
SECOND_DERIVATIVE = (
    "the fused objective has no second derivative (create_graph=True): its gradient was computed in the forward pass; "
    "use backend='reference'"
)
objective_fwd.register_autograd(_backward, setup_context=_setup_context)


def objective(features: Tensor | None, logits: Tensor | None, *args) -> tuple[Tensor, Tensor]:
    """(total, terms [6]); arguments of objective_fwd without the wishes for gradients, which are the inputs' own."""
    wants = (t is not None and t.requires_grad and torch.is_grad_enabled() for t in (features, logits))
    terms, _, _ = objective_fwd(features, logits, *args, *wants)
    return terms[0], terms.detach()
