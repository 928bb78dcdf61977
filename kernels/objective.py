"""The whole objective in Triton: values and all gradients in three launches.

1. ``sums_kernel``: every program reads its share of the features once and leaves partial class sums; further programs
   normalise the prototypes. Cross entropy's divisor, the sum of the targets' weights, comes from here too.
2. ``classes_kernel``: adds the partial sums; the program that ends last turns them into D-Geo's terms and into one
   vector and one scalar for each class, from which the gradient of every row follows.
3. ``rows_kernel``: reads the features again and writes their gradient, once; the program that ends last adds the
   losses.

Triton 3.4 or newer; with TRITON_INTERPRET=1 set before Triton is imported everything runs on CPU tensors. Bit-identical
from run to run on one device.

Where it loses to the CUDA backend, and why:

- A program is one thread block, and Triton has no access to another block's shared memory: a small batch cannot be
  spread over a cluster, and three dependent launches do what a cluster does in one. (One launch of one program took
  142 us at B=128 on an H100 where three took 34 at B=1,024; it is gone.)
- The launcher is Python, tens of microseconds of the host a launch. Inside a CUDA graph they vanish.
- The compiler places operands. Whole rows with their gradients do not fit the registers it uses, so the row stage goes
  over a row in steps of 32 columns and reads it twice, the second time from the first-level cache; prototypes come from
  that cache for every tile instead of staying in shared memory.
- Float32 products are three TF32 products, half types a sum of two halves, so that tensor cores lose no digits.
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from ngd_fast.kernels.objective_rows import rows_kernel
from ngd_fast.kernels.objective_sums import classes_kernel, sums_kernel, workspace_size

_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
DTYPES = tuple(_TRITON_TYPES)
# Partial class sums are the largest part of the workspace, which must stay under 1 MB.
_PARTIAL_BYTES = 896 * 1024
_COLUMNS = 64


@triton.jit
def scale_kernel(grad_ptr, size, factor_ptr, BLOCK: tl.constexpr):
    """grad *= factor, in place; nothing is read or written but the factor where it is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(grad_ptr + i, mask=i < size).to(tl.float32)
        tl.store(grad_ptr + i, (value * factor).to(grad_ptr.dtype.element_ty), mask=i < size)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # The interpreter runs programs one after the other; a few of them show the same seams as many.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.lru_cache(maxsize=1024)
def plan(B: int, C: int, D: int, K: int, half: bool, multiprocessors: int) -> dict:
    """Block sizes and grids for a shape; no more than a few registers spill on sm_80 and sm_90 (tests/kernels looks).

    The plan fixes the order in which sums are added: same plan, same bits.
    """
    block_c = triton.next_power_of_2(C)
    block_d = min(256, max(16, triton.next_power_of_2(D)))
    # Small batches take small tiles, so that every multiprocessor has one; many prototypes leave room for no others.
    rows_b = 16 if 16 * multiprocessors >= B or K > 64 else 32
    sums_b = 16 if 16 * multiprocessors >= B else 64 if half and 64 * multiprocessors < B and C <= 16 else 32
    rows_tiles = max(1, triton.cdiv(B, rows_b))  # no rows have terms, too
    most_partials = max(8, min(_PARTIAL_BYTES // (4 * C * (D + 2)), multiprocessors))
    return {
        "block_c": block_c,
        "dot_c": max(16, block_c),
        "block_k": max(16, triton.next_power_of_2(K)),
        "sums_d": block_d,
        "rows_d": min(block_d, 32 if K <= 128 else 16),
        "sums_b": sums_b,
        "rows_b": rows_b,
        "classes": max(1, min(block_c, 16384 // (block_c * block_d))),
        "partials": min(most_partials, max(1, triton.cdiv(B, sums_b))),
        "rows_programs": min((3 if half else 2) * multiprocessors, rows_tiles),
        # Three blocks of halves then share a multiprocessor's registers; float32 needs more each.
        "rows_registers": 168 if half and rows_b == 32 and block_c <= 16 and K <= 32 else None,
        "programs": triton.next_power_of_2(3 * multiprocessors),
        "sums_warps": 4 if sums_b == 16 else 8,
    }


def _rows(tensor):
    """``tensor`` with neighbouring columns side by side. The stride of rows is free: broadcast rows are not copied."""
    return tensor if tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _row_stride(tensor) -> int:
    return 0 if tensor is None or tensor.dim() < 2 else tensor.stride(0)


def _on(device):
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _check(name, tensor):
    if tensor is not None and tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: the triton backend takes float32, bfloat16 or float16, got {tensor.dtype}")


def _high_valence_bits(high_valence) -> int:
    bits = 0
    for c in high_valence:
        bits |= 1 << c
    return bits - (1 << 64) if bits >> 63 else bits


def objective_fwd(
    features, logits, target, prototypes, prior, labels, teacher_logits, class_weight, geo_weight, class_sums,
    num_classes, high_valence, settings, geo_weight_value, geo_grad_scale, want_features_grad, want_logits_grad,
):  # fmt: skip
    """Terms and gradients of the objective; the arguments of ``ngd_fast::objective_fwd``, shapes already checked.

    Args:
        features: [B, D] float32, bfloat16 or float16, or None. Rows may be strided or broadcast, as all [B, ...] here.
        logits: [B, C] of those types, or None; teacher_logits: [B, C] floating, or None.
        target: [B] of any integer type (-100 is ignored), or [B, C] floating; labels: [B] integer, -1 leaves a row out.
        prototypes: [K, D], not normalised; prior: [K] or [B, K].
        class_sums: [C, D + 2] float32 (S | n | q), in place of those of this batch.
        geo_weight: 0-dim tensor in place of ``geo_weight_value``.
        settings: a named tuple of floats, ``Settings.packed`` of ngd_fast.objective; kd_mode: 0 mse,
            1 kl, 2 logitstd.

    Returns:
        terms [6] float32 (total, ce, kd, proto, geo_var, geo_margin; total is NaN where a target or label was out of
        range), grad_features and grad_logits, of the inputs' shape and type, or empty [0] where not wanted.
    """
    _check("features", features)
    _check("logits", logits)
    has_ce = logits is not None and target is not None
    has_kd = logits is not None and teacher_logits is not None
    has_proto = features is not None and prototypes is not None
    has_geo = features is not None and labels is not None
    features, logits, teacher_logits, prototypes, target, labels, prior, class_weight = map(
        _rows, (features, logits, teacher_logits, prototypes, target, labels, prior, class_weight)
    )
    # Kernels without features still want a tensor for the type of the rows.
    first = features if features is not None else logits
    device, B, C = first.device, first.shape[0], num_classes
    D = features.shape[1] if features is not None else 1
    K = prototypes.shape[0] if has_proto else 1
    if class_sums is not None:
        class_sums = class_sums.contiguous()
    soft = has_ce and target.dim() == 2
    want_x = want_features_grad and features is not None
    want_z = want_logits_grad and logits is not None
    flags = dict(
        HALF=first.dtype != torch.float32, HAS_CE=has_ce, SOFT_TARGET=soft, HAS_WEIGHT=class_weight is not None,
        HAS_KD=has_kd, KD_MODE=int(settings.kd_mode), T_SQUARED=settings.kd_scale_by_t2 != 0, HAS_PROTO=has_proto,
        PRIOR_ROWS=has_proto and prior.dim() == 2, HAS_GEO=has_geo, HAS_GEO_WEIGHT=geo_weight is not None,
        WANT_X=want_x, WANT_Z=want_z,
    )  # fmt: skip
    p = plan(B, C, D, K, first.dtype != torch.float32, _multiprocessors(device))
    own_sums = has_geo and class_sums is None
    weigh = has_ce and not soft
    new = functools.partial(torch.empty, device=device)
    terms = new(6, dtype=torch.float32)
    # No kernel reads features that only cross entropy and KD come with: their gradient is 0.
    new_x = new if has_proto or has_geo else functools.partial(torch.zeros, device=device)
    grad_x = new_x(features.shape, dtype=features.dtype) if want_x else new(0, dtype=first.dtype)
    grad_z = new(logits.shape, dtype=logits.dtype) if want_z else new(0, dtype=first.dtype)
    partials = p["partials"] if own_sums else 0
    workspace_ = new(workspace_size(C, D, K, p["programs"], partials), dtype=torch.float32)
    inputs = (
        first, _row_stride(first), logits, _row_stride(logits), target,
        _row_stride(target), labels, teacher_logits, _row_stride(teacher_logits), class_weight,
    )  # fmt: skip
    with _on(device):
        _launch_sums(
            p, first, labels, target, class_weight, prototypes, workspace_, C, D, K, own_sums, weigh, has_proto,
        )  # fmt: skip
        if has_geo:
            _launch_classes(
                p, first.dtype, class_sums, workspace_, geo_weight, geo_weight_value, geo_grad_scale, settings,
                C, D, K, _high_valence_bits(high_valence), reduce=own_sums, stage=True,
            )  # fmt: skip
        rows_kernel[(p["rows_programs"],)](
            *inputs, prior, _row_stride(prior), geo_weight, workspace_, terms, grad_x, grad_z, B, p["partials"],
            settings, geo_weight_value, C=C, D=D, K=K, BLOCK_C=p["block_c"], DOT_C=p["dot_c"], BLOCK_K=p["block_k"],
            BLOCK_D=p["rows_d"], BLOCK_B=p["rows_b"], **flags, STAGES=2, PROGRAMS=p["programs"], num_warps=4,
            maxnreg=p["rows_registers"],
        )  # fmt: skip
    return terms, grad_x, grad_z


def _launch_sums(
    p, features, labels, target, class_weight, prototypes, workspace_, C, D, K, own_sums, weigh, has_proto
):
    programs = p["partials"] if own_sums or weigh else 0
    bank_programs = triton.cdiv(K, 8) if has_proto else 0
    chunks = triton.cdiv(D, p["sums_d"]) if own_sums else 1
    sums_kernel[(max(1, programs + bank_programs), chunks)](
        features, _row_stride(features), labels, target, class_weight, prototypes, _row_stride(prototypes), workspace_,
        features.shape[0], programs,
        C=C, D=D, K=K, DOT_C=p["dot_c"], BLOCK_D=p["sums_d"], BLOCK_B=p["sums_b"], HALF=features.dtype != torch.float32,
        CLASS_SUMS=own_sums, NORMALISER=weigh, HAS_WEIGHT=class_weight is not None, HAS_PROTO=has_proto, STAGES=3,
        PROGRAMS=p["programs"], num_warps=p["sums_warps"],
    )  # fmt: skip


def _launch_classes(
    p, dtype, sums, workspace_, geo_weight, geo_weight_value, geo_grad_scale, settings, C, D, K, high_valence_bits,
    *, reduce, stage,
):  # fmt: skip
    classes_kernel[(triton.cdiv(C * (D + 2), _COLUMNS) if reduce else 1,)](
        sums, workspace_, geo_weight, geo_weight_value, geo_grad_scale, settings, p["partials"],
        C=C, D=D, K=K, BLOCK_C=p["block_c"], CLASSES=p["classes"], BLOCK_D=p["sums_d"],
        HIGH_VALENCE=high_valence_bits, REDUCE=reduce, STAGE=stage, HAS_GEO_WEIGHT=geo_weight is not None,
        COLUMNS=_COLUMNS, PARTIALS=64, PROGRAMS=p["programs"], HALF=dtype != torch.float32, DTYPE=_TRITON_TYPES[dtype],
        num_warps=8,
    )  # fmt: skip


def geo_sums(features, labels, num_classes: int):
    """Class sums of the L2-normalised rows: float32 [num_classes, D + 2] = (sum f | n | sum of squared norms).

    features: [B, D] float32, bfloat16 or float16; labels: [B] integers. Rows labelled outside [0, num_classes) are
    left out.
    """
    _check("features", features)
    features, labels = _rows(features), _rows(labels)
    (B, D), C, device = features.shape, num_classes, features.device
    sums = torch.empty(C, D + 2, dtype=torch.float32, device=device)
    p = plan(B, C, D, 1, features.dtype != torch.float32, _multiprocessors(device))
    workspace_ = torch.empty(workspace_size(C, D, 1, p["programs"], p["partials"]), dtype=torch.float32, device=device)
    with _on(device):
        _launch_sums(p, features, labels, None, None, None, workspace_, C, D, 1, True, False, False)
        _launch_classes(
            p, features.dtype, sums, workspace_, None, 0.0, 0.0, None, C, D, 1, 0, reduce=True, stage=False
        )  # fmt: skip
    return sums


def scale_(gradient, factor):
    """Multiply ``gradient`` (contiguous) in place by ``factor``, a 0-dim tensor on its device, without asking for its
    value."""
    if gradient.numel():
        with _on(gradient.device):
            scale_kernel[(triton.cdiv(gradient.numel(), 4096),)](
                gradient, gradient.numel(), factor, BLOCK=4096, num_warps=8
            )
    return gradient
