"""Whether the fused kernels compute on this machine what they should: each against plain PyTorch, on random input."""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_fast.objective import backends, functional
from ngd_fast.student import stem

# Rows: less than a block of any kernel, the paper's batch, more than one cluster holds, and a large batch.
_ROWS = {"cpu": (37, 128, 1030), "cuda": (37, 128, 1030, 20_000), "interpreter": (37,)}


@dataclass(frozen=True)
class Finding:
    what: str
    case: str
    error: float
    """Of terms and gradients (or images), the largest; relative for terms above 1 and for gradients as vectors."""
    bound: float
    repeats: bool
    """Whether a second run gave the same bits."""
    fault: str = ""
    """Why it did not run at all; ``error`` is NaN then."""

    @property
    def ok(self) -> bool:
        return self.repeats and self.error <= self.bound  # a NaN is not


def check() -> Iterator[Finding]:
    """Run every kernel that this machine has; seconds on a CPU, with a GPU as long as Triton compiles."""
    for backend in backends.NAMES[1:]:
        if not backends.why_not(backend):
            yield from _objective(backend)
    if torch.cuda.is_available():
        yield from _gpu_only(torch.device("cuda"))


def _find(what: str, case: str, bound: float, measure: Callable[[], tuple[float, bool]]) -> Finding:
    """``measure`` gives error and repeats. A kernel that cannot be compiled or launched is a finding like others."""
    try:
        error, repeats = measure()
    except Exception as raised:  # Triton's compiler raises errors of its own kinds
        fault = next((line.strip() for line in str(raised).splitlines() if line.strip()), type(raised).__name__)
        return Finding(what, case, math.nan, bound, False, fault)
    return Finding(what, case, error, bound, repeats)


def _gpu_only(device: torch.device) -> Iterator[Finding]:
    if not stem.why_not_here(device):
        for dtype in (torch.bfloat16, torch.float16):
            yield _stem(device, dtype)
    if not backends.why_not("triton"):
        yield _views(device)


def _objective(backend: str) -> Iterator[Finding]:
    on_cpu = backend == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # Gradients are rounded to their dtype; terms stay float32.
        bound = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        for rows in _ROWS["interpreter" if on_cpu and backend == "triton" else device.type]:
            measure = functools.partial(_objective_error, rows, dtype, backend, device)
            yield _find(f"objective, {backend}", f"{_name(dtype)} {rows:,} x 256", bound, measure)


def _objective_error(rows: int, dtype: torch.dtype, backend: str, device: torch.device) -> tuple[float, bool]:
    case = _objective_case(rows, dtype)
    exact = _objective_run({k: v.double() if v.is_floating_point() else v for k, v in case.items()}, "reference")
    here = {name: tensor.to(device) for name, tensor in case.items()}
    got, again = _objective_run(here, backend), _objective_run(here, backend)
    terms = ((got[0] - exact[0]).abs() / exact[0].abs().clamp(min=1)).tolist()
    return _largest([*terms, *map(_relative, got[1:], exact[1:])]), all(map(torch.equal, got, again))


def _objective_case(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(rows)
    normal = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    return {
        "features": normal(rows, 256).to(dtype),
        "logits": (2 * normal(rows, 8)).to(dtype),
        "target": torch.randint(0, 8, (rows,), generator=rng),
        "prototypes": normal(25, 256),
        "prior": normal(25).softmax(0),
        "teacher_logits": 2 * normal(rows, 8),
        "class_weight": normal(8).abs() + 0.5,
    }


def _objective_run(case: dict[str, Tensor], backend: str) -> list[Tensor]:
    """Terms [6], and the gradients by features and logits; float64 on the CPU."""
    leaves = [case[name].clone().requires_grad_() for name in ("features", "logits")]
    given = {**case, "features": leaves[0], "logits": leaves[1]}
    # A cap and a margin at which every part of D-Geo acts.
    out = functional.ngd_objective(**given, geo_weight=0.5, var_cap=0.1, margin=1.3, backend=backend)
    # Scaled as by a GradScaler: float16 has few digits for the gradient of a mean over many rows.
    gradients = torch.autograd.grad(out.total * len(case["target"]), leaves)
    return [t.detach().double().cpu() for t in (torch.stack(list(out)), *gradients)]


def _stem(device: torch.device, dtype: torch.dtype) -> Finding:
    measure = functools.partial(_stem_error, device, dtype)
    return _find("grey stem, cuda", f"{_name(dtype)} 8 x 96 px, 64 channels", torch.finfo(dtype).eps / 2, measure)


def _stem_error(device: torch.device, dtype: torch.dtype) -> tuple[float, bool]:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
    with torch.no_grad():
        # Planes whose sum dtype holds exactly: the stem rounds it, and another kernel has its largest values elsewhere.
        conv.weight.copy_(conv.weight[:, :1].to(dtype) * torch.tensor([0.25, 0.5, 0.25]).view(3, 1, 1))
    images = torch.randn(8, 1, 96, 96).to(dtype)
    grad_out = torch.randn(8, 64, 24, 24).to(dtype)

    def layers(images: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        return F.max_pool2d(F.relu(norm(conv(images.expand(-1, 3, -1, -1)))), 3, 2, 1)

    def run(function: Callable, where: torch.device, dtype: torch.dtype, wide: torch.dtype) -> list[Tensor]:
        own = [copy.deepcopy(layer).to(where, wide) for layer in (conv, norm)]
        out = function(images.to(where, dtype), *own)
        wanted = (own[0].weight, own[1].weight, own[1].bias)
        gradients = torch.autograd.grad(out, wanted, grad_out.to(where, dtype))
        return [t.detach().double().cpu() for t in (out, *gradients, own[1].running_mean, own[1].running_var)]

    exact = run(layers, torch.device("cpu"), torch.float64, torch.float64)
    got, again = (run(stem.grey_stem, device, dtype, torch.float32) for _ in range(2))
    return _largest(list(map(_relative, got, exact))), all(map(torch.equal, got, again))


def _views(device: torch.device) -> Finding:
    """The resident feed's kernel, against the portable feed."""
    return _find("resident feed, triton", "float32 64 x 112 px", 1e-3, functools.partial(_views_error, device))


def _views_error(device: torch.device) -> tuple[float, bool]:
    from ngd_fast.faces.augment import AugmentConfig
    from ngd_fast.faces.dataset import Faces
    from ngd_fast.faces.feeds import make_feed

    rng = np.random.default_rng(0)
    faces = Faces(images=rng.integers(0, 256, (64, 48, 48), np.uint8), labels=rng.integers(0, 8, 64))
    options = {"batch_size": 64, "image_size": 112, "train": True, "seed": 1, "augment": AugmentConfig.strong()}

    def batch(kind: str, device: torch.device) -> list[Tensor]:
        made = next(iter(make_feed(faces, kind=kind, device=device, **options).epoch(1)))
        return [made.images.cpu(), made.labels.cpu()]

    expected = batch("torch", torch.device("cpu"))
    got, again = (batch("resident", device) for _ in range(2))
    error = (got[0] - expected[0]).abs().max().item() if torch.equal(got[1], expected[1]) else math.inf
    return error, all(map(torch.equal, got, again))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def _largest(errors: list[float]) -> float:
    """NaN where one is, which max passes over."""
    return float(np.max(errors))
