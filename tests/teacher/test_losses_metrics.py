"""CCC as a loss and as a metric, and the bootstrap over subjects."""

import numpy as np
import pytest
import torch

from ngd_fast.teacher.losses import concordance, regression_loss
from ngd_fast.teacher.metrics import evaluate_va, mean_ccc


def lin(x, y):
    """Lin (1989), as printed."""
    return 2 * np.cov(x, y, bias=True)[0, 1] / (np.var(x) + np.var(y) + (np.mean(x) - np.mean(y)) ** 2)


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    target = rng.uniform(-1, 1, (200, 2))
    return 0.5 * target + 0.1 + rng.normal(0, 0.4, (200, 2)), target, rng.integers(0, 7, 200)


def test_loss_is_lins_coefficient_and_mean_squared_error(pairs):
    prediction, target, _ = pairs
    p, t = torch.tensor(prediction), torch.tensor(target)
    expected = [lin(prediction[:, i], target[:, i]) for i in range(2)]
    np.testing.assert_allclose(concordance(p, t), expected, atol=1e-7)
    assert concordance(t, t).min() > 1 - 1e-6
    loss = regression_loss(p, t, ccc_weight=2.0, mse_weight=3.0)
    np.testing.assert_allclose(loss, 2 * (1 - np.mean(expected)) + 3 * np.mean((prediction - target) ** 2), atol=1e-6)
    p = p[:20].requires_grad_()
    assert torch.autograd.gradcheck(lambda p: regression_loss(p, t[:20]), (p,))


def test_loss_of_constants_is_finite_with_a_finite_gradient():
    p = torch.zeros(6, 2, requires_grad=True)
    for target in (torch.zeros(6, 2), torch.rand(6, 2)):
        loss = regression_loss(p, target)
        (gradient,) = torch.autograd.grad(loss, p)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    with pytest.raises(ValueError, match="prediction"):
        concordance(p, torch.zeros(5, 2))


def test_metrics_equal_numpys(pairs):
    prediction, target, subject = pairs
    metrics = evaluate_va(prediction, target, subject)
    for i, dimension in enumerate(("valence", "arousal")):
        block = metrics[dimension]
        assert block["ccc"] == pytest.approx(lin(prediction[:, i], target[:, i]), abs=1e-12)
        assert block["pearson"] == pytest.approx(np.corrcoef(prediction[:, i], target[:, i])[0, 1], abs=1e-12)
        assert block["rmse"] == pytest.approx(np.sqrt(np.mean((prediction[:, i] - target[:, i]) ** 2)), abs=1e-12)
        assert block["n"] == 200 and block["subjects"] == 7
    assert mean_ccc(metrics) == pytest.approx((metrics["valence"]["ccc"] + metrics["arousal"]["ccc"]) / 2)


def test_intervals_are_those_of_resampled_subjects(pairs):
    prediction, target, subject = pairs
    rng = np.random.default_rng(3)
    draws = rng.multinomial(7, np.full(7, 1 / 7), size=200)
    values = []
    for draw in draws:
        rows = np.concatenate([np.repeat(np.flatnonzero(subject == s), times) for s, times in enumerate(draw)])
        values.append(lin(prediction[rows, 0], target[rows, 0]))
    block = evaluate_va(prediction, target, subject, bootstrap=200, seed=3)["valence"]
    np.testing.assert_allclose(block["ci"]["ccc"], np.quantile(values, (0.025, 0.975)), atol=1e-10)


def test_undefined_metrics_are_absent(pairs):
    _, target, subject = pairs
    block = evaluate_va(np.full((200, 2), 0.1), target, subject)["valence"]
    assert block["ccc"] == 0 and "pearson" not in block and "pearson" not in block["ci"]
    assert "ci" not in evaluate_va(target, target, np.zeros(200))["valence"]
    for bad, name in ((target * np.nan, "finite"), (target[:, 0], "prediction")):
        with pytest.raises(ValueError, match=name):
            evaluate_va(bad, target, subject)
