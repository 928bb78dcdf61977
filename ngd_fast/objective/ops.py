"""The fused operators: ``torch.ops.ngd_fast.objective_fwd`` and ``geo_sums`` (C++ and CUDA), ``objective_fwd_triton``.

``objective_fwd`` returns terms and gradients in one pass. ``ngd_fast::objective``, written in C++
(csrc/cpu/autograd.cpp), is what has a gradient: its backward scales what ``objective_fwd`` left. This module adds what
only Python can: the shapes for torch.compile, and the class sums of a global batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from ngd_fast.objective import backends, checks, fakes
from ngd_fast.objective.choice import Inputs, first
from ngd_fast.objective.settings import FUSED_KD_MODES, Settings

if not backends.why_not("cpu"):
    from ngd_fast import _C

    torch.library.register_fake("ngd_fast::objective_fwd", fakes.objective_fwd)
    torch.library.register_fake("ngd_fast::geo_sums", fakes.geo_sums)


def resolve_group(group):
    """The process group meant by ``group``; None for one process.

    Raises ValueError where torch.distributed has not been initialised, TypeError for anything that is no group.
    """
    if group is None or group is False:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: wanted an initialised process group (torch.distributed.init_process_group first)")
    if group is True:
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: wanted a process group that this rank is in, True or None, got {group!r}")
    return group


def _global_sums(geo_sums, features: Tensor, labels: Tensor, num_classes: int, group) -> Tensor:
    # No gradient passes here: objective_fwd computes that of the local rows from the global sums.
    with torch.no_grad():
        sums = geo_sums(features, labels, num_classes)
        dist.all_reduce(sums, group=group)
    return sums


def _safe_from_underflow(tensor: Tensor | None) -> Tensor | None:
    """float16 that wants a gradient, as float32.

    The kernels compute gradients before the loss is scaled, as GradScaler does it. In float16 those of a mean over many
    rows would be lost by then; in float32 they are rounded to float16 only after the scaling.
    """
    if tensor is None or tensor.dtype != torch.float16 or not (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor
    return tensor.float()


def eager(
    backend: str | None, settings: Settings, features, logits, target, prototypes, prior, labels, teacher_logits,
    class_weight, geo_weight,
) -> list[Tensor] | None:  # fmt: skip
    """The six terms of an eager call by the extension of the tensors' device, whose own checks are all that is asked.

    None where another backend is meant or needed, or anything is wrong: then the checked way is gone, which says what.
    """
    try:
        device = logits.device.type
        if device not in ("cpu", "cuda") or backend not in (None, device) or backends.why_not(device):
            return None
        if forward_ad._current_level >= 0 or (teacher_logits is not None and settings.kd_mode not in FUSED_KD_MODES):
            return None
        number = 0.0
        if geo_weight.__class__ is float:
            number, weight = geo_weight, None
            checks.finite("geo_weight", number)
        else:
            weight = geo_weight
        return _C.objective(
            features, logits, target, prototypes, prior, labels, teacher_logits, class_weight, weight, number,
            geo_weight is not None, settings.high_valence, settings.packed,
        ) or None  # fmt: skip
    except Exception:
        return None


def objective(backend: str, inputs: Inputs, num_classes: int, settings: Settings, group) -> tuple[Tensor, Tensor]:
    """(total, terms [6]) by a fused backend; total is differentiable by features and logits."""
    features, logits, *constants, geo_weight = inputs
    labels = inputs.labels
    features, logits = _safe_from_underflow(features), _safe_from_underflow(logits)
    if backend == "triton":
        from ngd_fast.objective import triton_ops

        op, geo_sums = triton_ops.objective, triton_ops.geo_sums
    else:
        op, geo_sums = torch.ops.ngd_fast.objective.default, torch.ops.ngd_fast.geo_sums.default
    class_sums, geo_grad_scale = None, 1.0
    if group is not None and labels is not None:
        class_sums = _global_sums(geo_sums, features, labels, num_classes, group)
        geo_grad_scale = float(dist.get_world_size(group))
    compiling = torch.compiler.is_compiling()
    if isinstance(geo_weight, float) and compiling:
        # As a number it would be compiled in, and each epoch of a ramp would compile again, up to Dynamo's limit.
        geo_weight = geo_weight * first(inputs).new_ones((), dtype=torch.float64)  # torch.full would compile it in too
    is_tensor = isinstance(geo_weight, Tensor)
    return op(
        features,
        logits,
        *constants,
        geo_weight if is_tensor else None,
        class_sums,
        num_classes,
        () if labels is None else settings.high_valence,
        settings.pack() if compiling else settings.packed,
        0.0 if is_tensor or geo_weight is None else geo_weight,
        geo_grad_scale,
    )
