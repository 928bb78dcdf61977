"""The rules that weights follow: bounded or not, and what they find."""

import numpy as np
import pytest
import torch

from ngd_fast.errors import UserError
from ngd_fast.flows import slow

SPECTRUM = torch.diag(torch.tensor([3, 2, 1.5, 0.6, 0.3, 0.1], dtype=torch.float64))


def start(m=3, d=6, seed=0, norm2=1.0):
    W = torch.randn(m, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return W * (norm2**0.5 / W.norm())


def flow(rule, W, steps=4000, gamma=0.02):
    for _ in range(steps):
        W = slow.update(rule, W, *slow.exact_moments(W, SPECTRUM), gamma)
    return W


def worst_sample(rule, W, gamma, generator):
    """W after the sample in the unit ball, of many, that makes it largest."""
    *_, rows = torch.linalg.svd(W)
    drawn = torch.randn(20, W.shape[1], dtype=torch.float64, generator=generator)
    units = torch.cat([rows, torch.nn.functional.normalize(drawn, dim=1)])
    samples = torch.cat([units, 0.7 * units, 0.4 * units])
    results = torch.vmap(lambda x: slow.update(rule, W, *slow.moments(W, x[None]), gamma))(samples)
    return results[results.flatten(1).norm(dim=1).nan_to_num(torch.inf).argmax()]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("norm2", [0.5, 2.0])
def test_the_trace_rule_stays_bounded_for_any_data(seed, norm2):
    W, generator = start(seed=seed, norm2=norm2), torch.Generator().manual_seed(seed)
    largest = 0.0
    for _ in range(150):
        W = worst_sample("trace", W, slow.STABLE, generator)
        largest = max(largest, W.square().sum().item())
    assert largest <= 2 + 1e-12


@pytest.mark.parametrize("rule", ["oja", "sanger"])
def test_oja_and_sanger_stay_bounded_there_too(rule):
    W, generator = start(norm2=2.0), torch.Generator().manual_seed(0)
    for _ in range(200):
        W = worst_sample(rule, W, slow.STABLE, generator)
    assert W.square().sum() < 4


@pytest.mark.parametrize("rule", ["trace", "oja", "sanger"])
def test_far_above_the_bound_they_diverge(rule):
    W, generator = start(norm2=2.0), torch.Generator().manual_seed(0)
    for _ in range(300):
        W = worst_sample(rule, W, 2.5, generator)
        if not W.norm() < 1e3:
            break
    assert not W.norm() < 1e3


def test_batches_are_bounded_as_samples_are():
    generator = torch.Generator().manual_seed(0)
    W = start(norm2=2.0)
    for _ in range(300):
        x = torch.nn.functional.normalize(torch.randn(5, 6, dtype=torch.float64, generator=generator), dim=1)
        W = slow.update("trace", W, *slow.moments(W, x), slow.STABLE)
        assert W.square().sum() <= 2 + 1e-12


def test_hebb_diverges_and_the_projection_cannot():
    assert flow("hebb", start(), steps=1000).norm() > 1e6
    W = flow("projected", start(), steps=300, gamma=50.0)
    torch.testing.assert_close(W @ W.T, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_trace_rule_keeps_one_direction_the_others_all():
    values = {rule: torch.linalg.svdvals(flow(rule, start())).numpy() for rule in ("trace", "oja", "sanger")}
    np.testing.assert_allclose(values["trace"], [1, 0, 0], atol=1e-9)
    np.testing.assert_allclose(values["oja"], [1, 1, 1], atol=1e-9)
    np.testing.assert_allclose(values["sanger"], [1, 1, 1], atol=1e-6)


def test_only_sanger_finds_the_eigenvectors_themselves():
    off = {}
    for rule in ("oja", "sanger"):
        W = flow(rule, start())
        C = W @ SPECTRUM @ W.T
        off[rule] = (C - C.diag().diag()).abs().max().item()
    assert off["sanger"] < 1e-6
    assert off["oja"] > 0.05


@pytest.mark.parametrize("rule", ["oja", "sanger", "projected"])
def test_the_principal_eigenspace_is_found(rule):
    x = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) @ SPECTRUM.sqrt()
    values, V = slow.eigenspace(x, 3)
    S = x.T @ x / 500
    torch.testing.assert_close(V @ S @ V.T, values[:3].diag(), atol=1e-10, rtol=0)
    W = start()
    for _ in range(4000):
        W = slow.update(rule, W, *slow.moments(W, x), 0.02)
    assert slow.principal_angles(W, V).max() < 1e-3
    assert slow.principal_angles(start(seed=1), V).max() > 10


def test_more_dimensions_than_points():
    x = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    values, V = slow.eigenspace(x, 3)
    wanted = torch.linalg.svdvals(x.double())
    torch.testing.assert_close(values, wanted.square() / 8)
    torch.testing.assert_close((x.double() @ V.T).square().sum(0), wanted[:3].square())
    torch.testing.assert_close(V @ V.T, torch.eye(3, dtype=torch.float64))


def test_a_lost_direction_is_ninety_degrees_off():
    V = torch.eye(6)[:3]
    W = torch.zeros(3, 6)
    W[0, 0], W[1, 4] = 1.0, 1e-9
    np.testing.assert_allclose(slow.principal_angles(W, V), [90, 90, 0], atol=1e-9)


def test_a_step_outside_the_stable_regime_is_refused_with_the_bound():
    slow.require_stable("trace", 0.125, 2.0)
    slow.require_stable("projected", 100.0, 2.0)
    with pytest.raises(UserError, match=r"gamma R\^2 is 4 at R = 2, and oja .* up to 0.5; use gamma=0.125 or less"):
        slow.require_stable("oja", 1.0, 2.0)
