"""The module and the ramp."""

import math
from types import SimpleNamespace

import cases
import pytest
import torch

from ngd_fast import NGDObjective, functional
from ngd_fast.objective.schedule import Ramp


def test_module_is_the_function():
    case = cases.make(12, 16, 8, 25)
    bank = SimpleNamespace(prototypes=case["prototypes"], prior=case["prior"])
    settings = {name: case[name] for name in ("var_cap", "margin", "var_weight", "margin_weight", "geo_weight")}
    module = NGDObjective(bank, class_weight=case["class_weight"], kd_mode="kl", **settings)
    inputs = (case["features"], case["logits"], case["target"], case["teacher_logits"])
    expected = functional.ngd_objective(**case, kd_mode="kl")
    assert torch.equal(module(*inputs).total, expected.total)
    half = module(*inputs, ramp=0.5)
    as_tensor = module(*inputs, ramp=torch.tensor(0.5))
    geo = 0.5 * case["geo_weight"] * (0.8 * expected.geo_var + 0.6 * expected.geo_margin)
    assert float(half.total) == pytest.approx(float(expected.total - geo), rel=1e-6)
    assert float(as_tensor.total) == pytest.approx(float(half.total), rel=1e-6)


def test_module_keeps_the_bank():
    case = cases.make(2, 16, 8, 25)
    module = NGDObjective(prototypes=case["prototypes"], prior=case["prior"])
    other = NGDObjective(prototypes=torch.zeros(25, 16), prior=torch.ones(25) / 25)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.prototypes, case["prototypes"])
    assert module.bfloat16().prototypes.dtype == torch.float32  # a cast would round the bank
    assert torch.equal(module.prototypes, case["prototypes"])
    assert module.double().prototypes.dtype == torch.float64
    assert not list(module.parameters())


def test_module_without_a_bank():
    case = cases.make(6, 16)
    out = NGDObjective(geo_weight=None)(None, case["logits"], case["target"])
    assert out.proto == 0 and out.geo_margin == 0 and out.total == out.ce
    with pytest.raises(ValueError, match="prototypes, prior"):
        NGDObjective(prototypes=case["prototypes"])
    with pytest.raises(TypeError, match=r"bank: wanted what PrototypeBank.load\(path\) returns, got str"):
        NGDObjective("prototypes_5x5.npz")


@pytest.mark.parametrize(
    ("ramp", "error"),
    [
        ("0.5", TypeError),
        (float("nan"), ValueError),
        (torch.ones(1), ValueError),
        (torch.ones((), device="meta"), ValueError),
    ],
)
def test_a_bad_ramp_is_named(ramp, error):
    case = cases.make(6, 16)
    with pytest.raises(error, match="ramp: wanted"):
        NGDObjective()(case["features"], case["logits"], case["target"], ramp=ramp)


def test_ramp():
    late = Ramp()
    assert [late(epoch) for epoch in (0, 20, 40, 60, 99)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert late(30) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert Ramp("linear", 10, 20)(12.5) == pytest.approx(0.25)
    assert Ramp("constant")(0) == 1
    gated = Ramp(hard_gate=0.2)
    assert gated(30) == 0 and gated(33) == late(33) > 0.2 and gated(60) == 1
    assert Ramp(start=5, end=5)(5) == 1 and Ramp(start=5, end=5)(4.9) == 0
    values = [late(20 + 40 * i / 1000) for i in range(1001)]
    assert values == sorted(values)


@pytest.mark.parametrize("bad", [{"kind": "cosine"}, {"start": 61}, {"hard_gate": 1.5}, {"start": -1}])
def test_bad_ramp(bad):
    with pytest.raises(ValueError, match="wanted"):
        Ramp(**bad)
