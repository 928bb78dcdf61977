"""Inputs of the objective, runs of a backend, and how far two results are apart; needs only torch and pytest."""

from typing import NamedTuple

import pytest
import torch

from ngd_fast.objective import functional

#: A GPU machine runs every case for its backends too.
BACKENDS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("triton", marks=pytest.mark.gpu)]
#: Every term acts: features of one class are not tight, means are closer than the margin.
GEO = {"geo_weight": 0.5, "var_cap": 0.1, "margin": 1.3, "var_weight": 0.8, "margin_weight": 0.6}


class Result(NamedTuple):
    terms: torch.Tensor  # [6]
    features: torch.Tensor | None  # gradients
    logits: torch.Tensor | None


def make(
    rows=37, dim=256, classes=8, bank=25, *, dtype=torch.float32, seed=0, soft=False, prior_per_row=False, **given
):
    """Keyword arguments of ``ngd_objective`` on the CPU; ``given`` replaces or adds some."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    target = normal(rows, classes).softmax(1) if soft else torch.randint(0, classes, (rows,), generator=rng)
    prior = torch.rand(*((rows,) if prior_per_row else ()), bank, generator=rng) + 0.05
    case = {
        "features": normal(rows, dim).to(dtype),
        "logits": (2 * normal(rows, classes)).to(dtype),
        "target": target,
        "prototypes": normal(bank, dim),
        "prior": prior / prior.sum(-1, keepdim=True),
        "teacher_logits": (2 * normal(rows, classes)).to(dtype),
        "class_weight": torch.rand(classes, generator=rng) + 0.5,
        "high_valence": tuple(c for c in (1, 2) if c < classes),
        **GEO,
    }
    if soft:  # else the argmax would label the rows, which is another test's business
        case["labels"] = torch.randint(-1, classes, (rows,), generator=rng)
    case.update(given)
    return case


def mapped(case, change):
    """The case with ``change`` applied to its tensors."""
    return {name: change(value) if isinstance(value, torch.Tensor) else value for name, value in case.items()}


def device_of(backend):
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def run(case, backend, grad_output=1.0, compiled=None):
    """Terms and gradients by a backend, on its device; results are left there."""
    case = mapped(case, lambda t: t.detach().to(device_of(backend)) if device_of(backend) == "cuda" else t.detach())
    for name in ("features", "logits"):
        if case[name] is not None:
            case[name].requires_grad_()
    out = (compiled or functional.ngd_objective)(**case, backend=backend)
    (out.total * grad_output).backward()
    gradients = (None if case[name] is None else case[name].grad for name in ("features", "logits"))
    return Result(torch.stack([term.detach() for term in out]), *gradients)


def truth(case, grad_output=1.0):
    """The float64 reference on the same (rounded) inputs."""
    return run(mapped(case, lambda t: t.double() if t.is_floating_point() else t), "reference", grad_output)


def relative(actual, expected):
    """||actual - expected|| / ||expected||; the absolute error where expected is 0."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    size = expected.norm().item()
    return (actual - expected).norm().item() / (size or 1.0)


def assert_close(actual, expected, tolerance=1e-5):
    """Terms one by one (relative to 1 where they are smaller), gradients as vectors."""
    error = (actual.terms.cpu().double() - expected.terms).abs() / expected.terms.abs().clamp_min(1.0)
    assert error.max() <= tolerance, f"terms differ by {error.tolist()}"
    for name in ("features", "logits"):
        if getattr(expected, name) is not None:
            distance = relative(getattr(actual, name), getattr(expected, name))
            assert distance <= tolerance, f"gradient by {name} differs by {distance}"
