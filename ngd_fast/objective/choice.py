"""Which backend a call takes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from ngd_fast.objective import backends
from ngd_fast.objective.settings import FUSED_KD_MODES

#: What the CUDA and Triton kernels are compiled for; the C++ backend has no such limits.
MAX_DIM, MAX_CLASSES, MAX_PROTOTYPES = 2048, 64, 256


class Inputs(NamedTuple):
    """Tensors of a call and D-Geo's weight, checked; None switches off what they are for."""

    features: Tensor | None = None
    logits: Tensor | None = None
    target: Tensor | None = None
    prototypes: Tensor | None = None
    prior: Tensor | None = None
    labels: Tensor | None = None
    teacher_logits: Tensor | None = None
    class_weight: Tensor | None = None
    geo_weight: Tensor | float | None = None


def first(inputs: Inputs) -> Tensor:
    """Features, or else logits. No property: torch.compile of PyTorch 2.8 knows none of a named tuple."""
    return inputs.features if inputs.features is not None else inputs.logits


def _why_not(name: str) -> str:
    if torch.compiler.is_compiling():
        from ngd_fast.objective import traced  # imports torch._dynamo, a second that eager users need not wait

        return traced.why_not(name)
    return backends.why_not(name)


def _unfit(name: str, inputs: Inputs, num_classes: int, kd_mode: str) -> str:
    """Why a fused backend cannot take these tensors, or not in this mode of KD; empty where it can."""
    device = first(inputs).device.type
    if name == "cpu" and device != "cpu":
        return f"takes CPU tensors, got {device}"
    if name == "cuda" and device != "cuda":
        return f"takes CUDA tensors, got {device}"
    if name == "triton":
        if device != "cuda" and not (device == "cpu" and backends.interpreting()):
            return f"takes CUDA tensors, got {device}"
        if any(t is not None and t.dtype == torch.float64 for t in inputs[:2]):
            return "has no float64"
    if name in ("triton", "cuda"):
        for what, size, limit in (
            ("features: D", 0 if inputs.features is None else inputs.features.shape[1], MAX_DIM),
            ("classes: C", num_classes, MAX_CLASSES),
            ("prototypes: K", 0 if inputs.prototypes is None else inputs.prototypes.shape[0], MAX_PROTOTYPES),
        ):
            if size > limit:
                return f"{what} = {size} is above its limit of {limit}"
    if kd_mode not in FUSED_KD_MODES and inputs.teacher_logits is not None:
        return f"has no kd_mode {kd_mode!r}; the reference has"
    if forward_ad._current_level >= 0:
        return "has no forward-mode derivative (take backend='reference')"
    if not torch.compiler.is_compiling():  # Dynamo does not know the question
        transforms = _functorch.get_interpreter_stack() or ()
        if any(transform.key() == _functorch.TransformType.Grad for transform in transforms):
            return "has no derivative by torch.func (take backend='reference')"
    if torch.is_grad_enabled():
        for what, tensor in zip(Inputs._fields, inputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad and what not in ("features", "logits"):
                return f"has no gradient by {what} (detach it, or take backend='reference')"
    return ""


def why_not(name: str, inputs: Inputs, num_classes: int, kd_mode: str) -> str:
    """Why a call cannot take fused backend ``name``, in one line; empty where it can."""
    return _why_not(name) or _unfit(name, inputs, num_classes, kd_mode)


def choose(backend: str | None, inputs: Inputs, num_classes: int, kd_mode: str = "mse") -> str:
    """The backend of a call: the one named, or else the fastest that is there, takes these tensors and has that mode.

    Raises ValueError for an unknown name, RuntimeError for a named backend that is not there or does not fit.
    """
    if backend is None:
        device = first(inputs).device.type
        for name in ("cpu",) if device == "cpu" else ("cuda", "triton") if device == "cuda" else ():
            if not why_not(name, inputs, num_classes, kd_mode):
                return name
        return "reference"
    reason = _why_not(backend)
    if reason:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    if backend != "reference":
        reason = _unfit(backend, inputs, num_classes, kd_mode)
        if reason:
            raise RuntimeError(f"backend {backend!r} cannot do this: {reason}")
    return backend
