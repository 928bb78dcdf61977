"""The public functions of the objective. Every argument is checked here, once for all backends; but not the values
that lie on a device.

``backend`` names who computes: "reference" (plain PyTorch), "cpu" (C++), "triton", "cuda", or None for the fastest that
fits the tensors. A named backend that is not there, or cannot do what is asked, raises RuntimeError with the reason.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ngd_fast.objective import checks, choice, ops, reference
from ngd_fast.objective.settings import MARGIN, VAR_CAP, Settings, make


class ObjectiveOutput(NamedTuple):
    """0-dim tensors, float32 (float64 where features or logits are); all but ``total`` unweighted and detached.

    A term that is switched off is 0.
    """

    total: Tensor
    ce: Tensor
    kd: Tensor
    proto: Tensor
    geo_var: Tensor
    geo_margin: Tensor


def ngd_objective(
    features: Tensor | None,
    logits: Tensor,
    target: Tensor,
    prototypes: Tensor | None = None,
    prior: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.055,
    kd_weight: float = 0.30,
    kd_temperature: float = 5.0,
    kd_mode: str = "mse",
    kd_scale_by_t2: bool = False,
    kd_alpha: float = 1.0,
    kd_beta: float = 8.0,
    proto_weight: float = 0.12,
    proto_temperature: float = 0.90,
    geo_weight: float | Tensor | None = 0.012,
    var_cap: float = VAR_CAP,
    margin: float = MARGIN,
    var_weight: float = 1.0,
    margin_weight: float = 1.0,
    high_valence: Sequence[int] = (1, 2),
    group=None,
    backend: str | None = None,
) -> ObjectiveOutput:
    """NeuroGaze-Distill's objective (arXiv 2509.11916, section 4.3, Algorithm 2): values and, by autograd, gradients.

        total = CE + kd_weight KD + proto_weight Proto-KD + geo_weight (var_weight var + margin_weight margin)

    Args:
        features: [B, D], L2-normalised inside: any positive scale of a row gives the same loss. A zero row is
            allowed and gets gradient 0. May be None where Proto-KD and D-Geo are both off.
        logits: [B, C]. -inf is allowed where the target's probability is 0.
        target: [B] int64 class indices (-100: no target, as in F.cross_entropy), or a distribution [B, C] with rows
            that sum to 1. CE is ``F.cross_entropy(logits, target, weight=class_weight,
            label_smoothing=label_smoothing)``, but a class of target probability 0 and logit -inf adds 0, not NaN.
        prototypes: [K, D], normalised inside. None switches Proto-KD off.
        prior: [K], or [B, K] for a prior of each row; not negative, rows sum to 1.
        labels: [B] int64 classes for D-Geo; -1 (or -100) leaves a row out. Default: ``target``, or its argmax.
        teacher_logits: [B, C]. None switches KD off.
        class_weight: [C], weights of CE.
        label_smoothing: in [0, 1], over classes.
        kd_weight, kd_temperature, kd_mode, kd_scale_by_t2: with T the temperature, "mse" is the mean over rows and
            classes of ((z - z_teacher)/T)^2, "kl" the mean over rows of KL(softmax(z_teacher/T) || softmax(z/T)),
            "logitstd" the same of logits brought to mean 0 and variance 1 over their row (arXiv 2403.01427; its code
            divides by the sample's standard deviation, as here T times sqrt(C/(C - 1)) does). The factor T^2 is a
            switch, off as in Algorithm 2. Two more modes only the reference computes:
            "dkd" (arXiv 2203.08679) is the mean of kd_alpha TCKD + kd_beta NCKD over the rows that have a target: TCKD
            the KL of [p_t, 1 - p_t], teacher to student, NCKD that of the softmaxes over the other classes; t is the
            target, or the first largest entry of a distribution.
            "dist" (arXiv 2205.10536) is (1 - the mean over rows of Pearson's correlation between the two softmaxes) +
            (1 - that over classes, along this process' batch); a row or column that is constant correlates with 0 and
            has gradient 0 (``reference.PEARSON_EPS``).
        kd_alpha, kd_beta: weights of "dkd". 1 and 8 are what its authors take on CIFAR-100 for a ResNet32x4, with T = 4
            and T^2; on ImageNet they take 1 and 0.5 at T = 1: the surer the teacher, the smaller kd_beta.
        proto_weight, proto_temperature: mean over rows of KL(prior || softmax(cos(f, p_k)/temperature)).
        geo_weight: a number, or a 0-dim tensor on the features' device, so that a captured graph follows the ramp. None
            switches D-Geo off.
        var_cap, var_weight, high_valence: var = sum over the classes ``high_valence`` of max(0, sigma2_c - var_cap),
            with sigma2_c the mean squared distance to the class mean. Default classes: happiness and surprise.
        margin, margin_weight: sum over ordered pairs of different classes present of max(0, margin - ||mu_c - mu_c'||).
        group: a torch.distributed process group, or True for the default one: D-Geo's class means are those of the
            global batch, and its gradient is multiplied by the world size, so that DDP's averaging gives the global
            gradient.
        backend: see the module. With None, what no fused backend does (a gradient by anything but features and logits,
            forward mode, torch.func.grad, a shape beyond its limits, "dkd", "dist") goes to the reference.

    dtypes: float32, bfloat16, float16 or float64, each tensor its own; computed in float32, or in float64 where
    features or logits are. Autocast changes nothing. Inputs are never written. Gradients have the dtype of their
    tensor; float16 that wants one is converted to float32 first, because the fused backends compute gradients before
    GradScaler's factor reaches them.

    B = 0 gives NaN for CE, KD, Proto-KD and total, as F.cross_entropy does, and 0 for D-Geo.

    A class index out of range makes its term and ``total`` NaN and adds no gradient; on the CPU, and everywhere if
    NGD_FAST_DEBUG=1 is set in the environment, it raises IndexError instead.

    Fused backends compute the gradient together with the value; a second derivative raises, except by the reference.

    Raises ValueError (shape, device, range), TypeError (type, dtype), IndexError (class index), RuntimeError (backend).
    """
    settings = make(
        label_smoothing,
        kd_weight,
        kd_temperature,
        kd_mode,
        kd_scale_by_t2,
        proto_weight,
        proto_temperature,
        var_cap,
        margin,
        var_weight,
        margin_weight,
        high_valence,
        kd_alpha,
        kd_beta,
    )
    return objective(
        settings,
        features,
        logits,
        target,
        prototypes,
        prior,
        labels=labels,
        teacher_logits=teacher_logits,
        class_weight=class_weight,
        geo_weight=geo_weight,
        group=group,
        backend=backend,
    )


def objective(
    settings: Settings,
    features: Tensor | None,
    logits: Tensor,
    target: Tensor,
    prototypes: Tensor | None = None,
    prior: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    class_weight: Tensor | None = None,
    geo_weight: float | Tensor | None = 0.012,
    group=None,
    backend: str | None = None,
) -> ObjectiveOutput:
    """``ngd_objective`` with its settings as one value, for those who call it often."""
    if group is None and not checks.DEBUG and not torch.compiler.is_compiling():
        constants = (target, prototypes, prior, labels, teacher_logits, class_weight, geo_weight)
        terms = ops.eager(backend, settings, features, logits, *constants)
        if terms is not None:
            return ObjectiveOutput(*terms)
    checks.floating("logits", logits, ("B", "C"))
    rows, num_classes = logits.shape
    device = logits.device
    if num_classes == 0:
        raise ValueError("logits: wanted at least one class, got shape [B, 0]")
    if isinstance(target, Tensor) and target.ndim == 2:
        checks.floating("target", target, (rows, num_classes), device=device)
    else:
        checks.indices("target", target, rows, device)
    if teacher_logits is not None:
        checks.floating("teacher_logits", teacher_logits, (rows, num_classes), device=device)
    if class_weight is not None:
        checks.floating("class_weight", class_weight, (num_classes,), device=device)
    if features is not None:
        checks.floating("features", features, (rows, "D"), device=device)
    elif prototypes is not None or geo_weight is not None:
        raise ValueError("features: None, but Proto-KD (prototypes) or D-Geo (geo_weight) needs them")
    if prototypes is not None:
        _check_prototypes(features, prototypes, prior)
    elif prior is not None:
        raise ValueError("prior: wanted None without prototypes, got a prior")
    if geo_weight is None:
        labels = None
    else:
        if isinstance(geo_weight, Tensor):
            checks.floating("geo_weight", geo_weight, (), device=device)
        else:
            checks.finite("geo_weight", geo_weight)
        if labels is None:
            labels = target if target.ndim == 1 else target.argmax(1)
        _check_geo(labels, rows, device, num_classes, settings)
    inputs = choice.Inputs(
        features, logits, target, prototypes, prior, labels, teacher_logits, class_weight, geo_weight
    )
    return _run(settings, inputs, num_classes, group, backend)


def proto_kd(
    features: Tensor, prototypes: Tensor, prior: Tensor, *, temperature: float = 0.90, backend: str | None = None
) -> Tensor:
    """Proto-KD alone (section 4.3): mean over rows of KL(prior || softmax(cos(f, p_k)/temperature)), 0-dim.

    features [B, D], prototypes [K, D], prior [K] or [B, K]; dtypes, backends and errors as in ``ngd_objective``.
    """
    checks.floating("features", features, ("B", "D"))
    _check_prototypes(features, prototypes, prior)
    checks.finite("temperature", temperature)
    checks.positive("temperature", temperature)
    settings = make(proto_weight=1.0, proto_temperature=temperature)
    inputs = choice.Inputs(features, prototypes=prototypes, prior=prior)
    return _run(settings, inputs, 1, None, backend).total


def d_geo(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int = 8,
    high_valence: Sequence[int] = (1, 2),
    var_cap: float = VAR_CAP,
    margin: float = MARGIN,
    var_weight: float = 1.0,
    margin_weight: float = 1.0,
    group=None,
    backend: str | None = None,
) -> Tensor:
    """D-Geo alone (section 4.3): var_weight var + margin_weight margin, 0-dim, differentiable.

    features [B, D], labels [B] int64 in [0, num_classes) or -1; the rest, dtypes, backends and errors as in
    ``ngd_objective``.
    """
    checks.floating("features", features, ("B", "D"))
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: wanted an integer of at least 1, got {num_classes!r}")
    settings = make(
        var_cap=var_cap,
        margin=margin,
        var_weight=var_weight,
        margin_weight=margin_weight,
        high_valence=high_valence,
    )
    _check_geo(labels, features.shape[0], features.device, num_classes, settings)
    inputs = choice.Inputs(features, labels=labels, geo_weight=1.0)
    return _run(settings, inputs, num_classes, group, backend).total


def _check_prototypes(features, prototypes, prior) -> None:
    checks.floating("prototypes", prototypes, ("K", features.shape[1]), device=features.device)
    k = prototypes.shape[0]
    if k == 0:
        raise ValueError("prototypes: wanted at least one, got shape [0, D]")
    if prior is None:
        raise ValueError(f"prior: wanted [{k}] or [B, {k}] beside prototypes, got None")
    checks.floating("prior", prior, (k,), (features.shape[0], k), device=features.device)


def _check_geo(labels, rows, device, num_classes, settings) -> None:
    checks.indices("labels", labels, rows, device)
    checks.known_classes("high_valence", settings.high_valence, num_classes)


def _run(settings: Settings, inputs: choice.Inputs, num_classes: int, group, backend) -> ObjectiveOutput:
    """Checked arguments to the backend that is to compute them."""
    group = ops.resolve_group(group)
    name = choice.choose(backend, inputs, num_classes, settings.kd_mode)
    reads_values = checks.DEBUG or (name == "reference" and choice.first(inputs).device.type == "cpu")
    if reads_values and not torch.compiler.is_compiling():
        checks.index_values(inputs.target, inputs.labels, num_classes)
    if name == "reference":
        # Unpacked and not sliced: torch.compile of PyTorch 2.8 cannot slice a named tuple.
        total, *others = reference.objective(*inputs, num_classes=num_classes, settings=settings, group=group)
        return ObjectiveOutput(total, *(term.detach() for term in others))
    total, terms = ops.objective(name, inputs, num_classes, settings, group)
    return ObjectiveOutput(total, *terms.unbind()[1:])
