"""The objective in plain PyTorch: the truth that every fused backend is held to, and the fallback where none fits.

NeuroGaze-Distill (arXiv 2509.11916), section 4.3 and Algorithm 2. Every function takes float32, float64, bfloat16 or
float16; halves are computed in float32, and autocast is off inside. Everything is differentiable twice, has no
data-dependent shape and asks the device nothing, so that it can be compiled and captured into a CUDA graph.
``functional`` checks arguments and documents them; here they are taken as right.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_fast.objective.checks import IGNORE_INDEX, NO_LABEL
from ngd_fast.objective.settings import Settings

#: Added to the variance of a row's logits for ``logitstd``, as layer normalisation does: a flat row stays flat, and
#: the gradient at a head that begins at zero stays below 320 times that of ``kl``.
STD_EPS = 1e-5
#: For ``dist``: a row or column of probabilities whose standard deviation is not above this over T counts as constant
#: (from T = 10 on 1e-6, below which float32 has only rounding): correlation 0, gradient 0. The spread of logits that
#: corresponds is the same at every T, and bounds the gradient.
PEARSON_EPS = 1e-5
#: A row whose norm is not above this counts as zero: it has f = 0 and gradient 0 (F.normalize's gradient there is
#: 1e12 times the upstream one, which no optimiser survives). Norms must stay below 1e19, whose square is float32's end.
NORM_EPS = 1e-12


class Terms(NamedTuple):
    """The terms as 0-dim tensors, unweighted but for ``total``; all differentiable."""

    total: Tensor
    ce: Tensor
    kd: Tensor
    proto: Tensor
    geo_var: Tensor
    geo_margin: Tensor


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def normalize(x: Tensor) -> Tensor:
    """x / ||x|| along the last dimension; 0, with gradient 0, where the norm is not above NORM_EPS."""
    square = x.square().sum(-1, keepdim=True)
    is_zero = square <= NORM_EPS**2
    return torch.where(is_zero, 0.0, x * torch.where(is_zero, 1.0, square).rsqrt())


def _nan_where_any(bad: Tensor, dtype: torch.dtype) -> Tensor:
    """0-dim: NaN if any element is true, else 0. Added to a term, it reports bad input without asking the device."""
    return torch.where(bad.any(), float("nan"), 0.0).to(dtype)


def cross_entropy(
    logits: Tensor, target: Tensor, class_weight: Tensor | None = None, label_smoothing: float = 0.055
) -> Tensor:
    """CE as F.cross_entropy averages it: over the weights of the targets (indices), over rows (distributions).

    A class of target probability 0 adds 0 even where its logit is -inf. Index -100 is ignored; any other index outside
    [0, C) makes the result NaN. No row at all gives NaN, as F.cross_entropy does.
    """
    num_classes = logits.shape[1]
    log_p = F.log_softmax(logits, dim=1)
    if target.is_floating_point():
        wanted = target.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / num_classes
        if class_weight is not None:
            wanted = wanted * class_weight
        return -torch.where(wanted == 0, 0.0, wanted * log_p).sum() / logits.shape[0]

    in_range = (target >= 0) & (target < num_classes)
    bad = ~in_range & (target != IGNORE_INDEX)
    counts = in_range.to(log_p.dtype).unsqueeze(1)  # a bool times a number would be float32
    one_hot = torch.zeros_like(log_p).scatter(1, torch.where(in_range, target, 0).unsqueeze(1), 1.0) * counts
    wanted = one_hot * (1 - label_smoothing) + counts * (label_smoothing / num_classes)
    if class_weight is not None:
        wanted, one_hot = wanted * class_weight, one_hot * class_weight
    loss = -torch.where(wanted == 0, 0.0, wanted * log_p).sum() / one_hot.sum()
    return loss + _nan_where_any(bad, loss.dtype)


def _kl(log_teacher: Tensor, log_p: Tensor) -> Tensor:
    """p_teacher (log p_teacher - log p), elementwise; 0 where p_teacher is."""
    p_teacher = log_teacher.exp()
    return torch.where(p_teacher == 0, 0.0, p_teacher * (log_teacher - log_p))


def _dkd(z: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float) -> Tensor:
    """``kd``'s mode dkd of logits that are divided by T already.

    1 - p is summed from the other classes' logarithms, so that it is exact where p rounds to 1. A target outside
    [0, C) has no term (CE reports it), nor has a distribution of zeros.
    """
    soft = target.is_floating_point()
    counts = target.amax(1) > 0 if soft else (target >= 0) & (target < z.shape[1])
    index = (target.argmax(1) if soft else target).unsqueeze(1)
    is_target = index == torch.arange(z.shape[1], device=z.device)
    nothing = torch.finfo(z.dtype).min  # finite, unlike -inf, where there is no other class

    def split(z: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(z, dim=1)
        of_target = torch.where(is_target, log_p, 0.0).sum(1)
        of_others = torch.where(is_target, nothing, log_p).logsumexp(1)
        return torch.stack([of_target, of_others], dim=1), F.log_softmax(torch.where(is_target, nothing, z), dim=1)

    (binary, others), (teacher_binary, teacher_others) = split(z), split(teacher)
    rows = alpha * _kl(teacher_binary, binary).sum(1) + beta * _kl(teacher_others, others).sum(1)
    return torch.where(counts, rows, 0.0).sum() / counts.sum()


def _correlation(p: Tensor, q: Tensor, dim: int, temperature: float) -> Tensor:
    """Mean of Pearson's correlation along ``dim``; 0, with gradient 0, for what is constant (PEARSON_EPS)."""

    def standardised(p: Tensor) -> Tensor:
        centred = p - p.mean(dim, keepdim=True)
        variance = centred.square().mean(dim, keepdim=True)
        is_constant = variance <= (PEARSON_EPS / min(temperature, 10.0)) ** 2
        return torch.where(is_constant, 0.0, centred * torch.where(is_constant, 1.0, variance).rsqrt())

    return (standardised(p) * standardised(q)).mean()


def kd(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 5.0,
    mode: str = "mse",
    scale_by_t2: bool = False,
    target: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Logit distillation at a temperature T.

    ``mse``: mean over rows and classes of (z/T - z_teacher/T)^2. ``kl``: mean over rows of
    KL(softmax(z_teacher/T) || softmax(z/T)). ``logitstd``: the same of logits with mean 0 and variance 1 over a row's
    classes (arXiv 2403.01427). ``dkd`` and ``dist``: as in ``functional.ngd_objective``; ``target``, ``alpha`` and
    ``beta`` are for ``dkd``. ``scale_by_t2`` multiplies by T^2.
    """
    if mode == "mse":
        loss = ((logits - teacher_logits) / temperature).square().mean()
    elif mode == "dkd":
        loss = _dkd(logits / temperature, teacher_logits / temperature, target, alpha, beta)
    elif mode == "dist":
        p, q = (F.softmax(z / temperature, dim=1) for z in (logits, teacher_logits))
        loss = 2 - _correlation(p, q, 1, temperature) - _correlation(p, q, 0, temperature)
    else:
        if mode == "logitstd":
            logits, teacher_logits = (F.layer_norm(z, z.shape[1:], eps=STD_EPS) for z in (logits, teacher_logits))
        log_p = F.log_softmax(logits / temperature, dim=1)
        log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
        loss = _kl(log_teacher, log_p).sum() / logits.shape[0]
    return loss * temperature**2 if scale_by_t2 else loss


def proto_kd(features: Tensor, prototypes: Tensor, prior: Tensor, temperature: float = 0.90) -> Tensor:
    """Mean over rows of KL(prior || softmax(cos(f, p_k) / temperature)); prior is [K] or [B, K], its rows sum to 1."""
    cosine = normalize(features) @ normalize(prototypes).t()
    log_q = F.log_softmax(cosine / temperature, dim=1)
    return (torch.special.xlogy(prior, prior) - prior * log_q).sum() / features.shape[0]


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too: each rank's loss counts, as DDP's averaging then expects."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _SumOverRanks.apply(grad, ctx.group), None


def class_membership(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """[B, C] one-hot rows; all zero for a label outside [0, C)."""
    return (labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device)).to(dtype)


def geo_sums(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[C, D + 2]: for each class the sum of its normalised rows, their number, the sum of their squared norms."""
    f = normalize(features)
    ones = torch.ones_like(f[:, :1])
    columns = torch.cat([f, ones, f.square().sum(1, keepdim=True)], dim=1)
    columns = torch.where((labels >= 0).unsqueeze(1), columns, 0.0)  # a NaN row that is left out must not count
    return class_membership(labels, num_classes, f.dtype).t() @ columns


def d_geo(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    high_valence: Sequence[int],
    var_cap: float,
    margin: float,
    group=None,
) -> tuple[Tensor, Tensor]:
    """D-Geo's two terms, unweighted: (var, margin).

    var = sum over c in high_valence of max(0, sigma2_c - var_cap), with sigma2_c the mean squared distance to the class
    mean; it is summed over centred rows, not as a difference of large numbers. margin = sum over ordered pairs of
    different classes present of max(0, margin - ||mu_c - mu_c'||). At distance 0 and at a hinge's corner the gradient
    is 0. With ``group``, class means and sigma2 are those of all ranks' rows.
    """
    f = torch.where((labels >= 0).unsqueeze(1), normalize(features), 0.0)
    members = class_membership(labels, num_classes, f.dtype)
    bad = (labels >= num_classes) | ((labels < 0) & (labels != NO_LABEL) & (labels != IGNORE_INDEX))

    sums = torch.cat([members.t() @ f, members.sum(0).unsqueeze(1)], dim=1)
    if group is not None:
        sums = _SumOverRanks.apply(sums, group)
    count = sums[:, -1]
    mean = sums[:, :-1] / count.clamp_min(1).unsqueeze(1)
    squares = members.t() @ (f - members @ mean).square().sum(1)
    if group is not None:
        squares = _SumOverRanks.apply(squares, group)
    sigma2 = squares / count.clamp_min(1)
    var = f.new_zeros(())
    for c in high_valence:
        var = var + F.relu(sigma2[c] - var_cap)

    square_distance = (mean.unsqueeze(1) - mean.unsqueeze(0)).square().sum(2)
    is_zero = square_distance == 0
    distance = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, square_distance).sqrt())
    classes = torch.arange(num_classes, device=labels.device)
    present = count > 0
    is_pair = present.unsqueeze(1) & present.unsqueeze(0) & (classes.unsqueeze(1) != classes.unsqueeze(0))
    repulsion = torch.where(is_pair, F.relu(margin - distance), 0.0).sum()
    nan = _nan_where_any(bad, f.dtype)
    return var + nan, repulsion + nan


def objective(
    features: Tensor | None,
    logits: Tensor | None,
    target: Tensor | None,
    prototypes: Tensor | None,
    prior: Tensor | None,
    labels: Tensor | None,
    teacher_logits: Tensor | None,
    class_weight: Tensor | None,
    geo_weight: Tensor | float | None,
    *,
    num_classes: int,
    settings: Settings,
    group=None,
) -> Terms:
    """All terms; arguments as in ``functional.ngd_objective``.

    What is None switches its term off: logits CE and KD, teacher_logits KD, prototypes Proto-KD, labels or geo_weight
    D-Geo. A term that is off is 0.
    """
    dtype = accumulate_dtype(features, logits)
    device = (features if features is not None else logits).device
    s = settings
    with torch.autocast(device.type, enabled=False):
        features, logits, prototypes, prior, teacher_logits, class_weight = (
            None if t is None else t.to(dtype)
            for t in (features, logits, prototypes, prior, teacher_logits, class_weight)
        )
        zero = torch.zeros((), dtype=dtype, device=device)
        ce = kd_term = proto = geo_var = geo_margin = total = zero
        if logits is not None:
            total = ce = cross_entropy(logits, target, class_weight, s.label_smoothing)
            if teacher_logits is not None:
                options = (s.kd_temperature, s.kd_mode, s.kd_scale_by_t2, target, s.kd_alpha, s.kd_beta)
                kd_term = kd(logits, teacher_logits, *options)
                total = total + s.kd_weight * kd_term
        if prototypes is not None:
            proto = proto_kd(features, prototypes, prior, s.proto_temperature)
            total = total + s.proto_weight * proto
        if labels is not None and geo_weight is not None:
            geo_var, geo_margin = d_geo(features, labels, num_classes, s.high_valence, s.var_cap, s.margin, group)
            total = total + geo_weight * (s.var_weight * geo_var + s.margin_weight * geo_margin)
        return Terms(total.to(dtype), ce, kd_term, proto, geo_var, geo_margin)
