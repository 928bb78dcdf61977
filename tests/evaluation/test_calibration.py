import json

import numpy as np
import pytest
import torch

from ngd_fast.artifacts.export import Deployable
from ngd_fast.artifacts.files import read_json, write_json, write_sums
from ngd_fast.artifacts.verify import verify
from ngd_fast.errors import UserError
from ngd_fast.evaluation.calibration import Calibration, calibration_scores, cross_fitted, fit_calibration
from ngd_fast.evaluation.predictions import Predictions, softmax
from ngd_fast.student.weights import load_student

from .conftest import call, draw, error_of


def drawn_from(logits, seed=0):
    """Labels that the softmax of ``logits`` is exactly right about."""
    p = softmax(logits)
    return (np.random.default_rng(seed).random(len(p))[:, None] > p.cumsum(1)).sum(1).clip(max=p.shape[1] - 1)


@pytest.fixture
def true_logits():
    return np.random.default_rng(0).normal(size=(20_000, 8)) * 2


def test_a_temperature_is_found_again(true_logits):
    labels = drawn_from(true_logits)
    fitted = fit_calibration(labels, true_logits * 3.0)
    assert 1 / fitted.scale[0] == pytest.approx(3.0, rel=0.03)
    after = fitted.apply(true_logits * 3.0)
    assert (after.argmax(1) == true_logits.argmax(1)).all()
    before, scores = calibration_scores(labels, true_logits * 3.0), calibration_scores(labels, after)
    assert before["ece"] > 0.1
    assert scores["ece"] < 0.015
    assert all(scores[name] < before[name] for name in scores)


def test_the_temperature_is_the_minimum(true_logits):
    labels = drawn_from(true_logits)
    best = fit_calibration(labels, true_logits * 0.4)
    nll = lambda scale: calibration_scores(labels, true_logits * 0.4 * scale)["nll"]  # noqa: E731
    assert nll(best.scale[0]) < min(nll(best.scale[0] * 1.02), nll(best.scale[0] / 1.02))


def test_vector_scaling_finds_factors_and_offsets(true_logits):
    labels = drawn_from(true_logits)
    scale, bias = np.linspace(0.5, 2, 8), np.linspace(-1, 1, 8)
    fitted = fit_calibration(labels, (true_logits - bias) / scale, "vector")
    np.testing.assert_allclose(fitted.scale, scale, rtol=0.06)
    np.testing.assert_allclose(fitted.bias - fitted.bias.mean(), bias - bias.mean(), atol=0.12)


def test_scores_agree_with_scikit_learn(true_logits):
    from sklearn.metrics import log_loss

    labels, logits = drawn_from(true_logits)[:500], true_logits[:500]
    scores = calibration_scores(np.append(labels, -1), np.vstack([logits, logits[:1]]))
    p = softmax(logits)
    assert scores["nll"] == pytest.approx(log_loss(labels, p, labels=range(8)), abs=1e-12)
    assert scores["brier"] == pytest.approx(((p - np.eye(8)[labels]) ** 2).sum(1).mean(), abs=1e-12)
    gap = 0.0
    for c in range(8):
        for k in range(15):
            rows = (p[:, c] > k / 15) & (p[:, c] <= (k + 1) / 15)
            gap += abs(p[rows, c].sum() - (labels[rows] == c).sum()) / len(p) / 8
    assert scores["classwise_ece"] == pytest.approx(gap, abs=1e-12)


def test_no_row_takes_part_in_its_own_fit():
    """Labels by chance: a fit that sees its rows would profit from them, a cross-fitted one cannot."""
    rng = np.random.default_rng(1)
    labels, logits = rng.integers(0, 8, 60), rng.normal(size=(60, 8))
    own = calibration_scores(labels, fit_calibration(labels, logits, "vector").apply(logits))["nll"]
    crossed = calibration_scores(labels, cross_fitted(labels, logits, "vector"))["nll"]
    assert own < np.log(8) < crossed


@pytest.mark.parametrize(
    "content",
    [{}, {"method": "temperature", "scale": [1.0], "bias": [0.0] * 2}, {"method": "vector", "scale": [1], "bias": [0]},
     {"method": "temperature", "scale": [0.0], "bias": [0.0]}, {"method": "x", "scale": [1.0], "bias": [0.0]},
     {"method": "temperature", "scale": ["a"], "bias": [0.0]}],
)  # fmt: skip
def test_a_file_that_is_no_calibration(tmp_path, content):
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is no calibration of 8 classes"):
        Calibration.load(tmp_path / "c.json", 8)


@pytest.mark.parametrize("factor", [0.0, 1e-4])
def test_logits_without_meaning_are_named(factor):
    labels = np.arange(80) % 8
    with pytest.raises(UserError, match="edge of"):
        fit_calibration(labels, factor * np.eye(8)[(labels + 1) % 8])


def test_one_class_alone():
    with pytest.raises(UserError, match="at least two classes"):
        fit_calibration(np.zeros(9, int), np.zeros((9, 8)))


@pytest.fixture
def finished(ckpt, tmp_path):
    """A run with a student and overconfident predictions of its validation faces."""
    import shutil

    folder = tmp_path / "B1_seed7"
    shutil.copytree(ckpt, folder)
    made = draw(signal=2.0)
    Predictions(made.logits * 3, made.labels, made.names, made.class_names, made.dataset).save(
        folder / "predictions_valid.npz"
    )
    write_sums(folder)
    return folder


def test_it_is_kept_with_the_run_and_used(finished, faces, tmp_path, capsys):
    out, raw = tmp_path / "calibrated", tmp_path / "raw"
    assert call("evaluate", "calibrate", finished) == 0
    shown = capsys.readouterr().out
    assert "temperature" in shown
    assert "classwise ECE" in shown
    kept = read_json(finished / "calibration.json")
    assert kept["after"]["ece"] < kept["before"]["ece"]
    assert verify(finished)[0].problems == verify(finished)[0].notes == []
    common = ["evaluate", "--ckpt", finished, "--npz", faces / "toy.npz", "--bootstrap", 0]
    assert call(*common, "--out", out) == call(*common, "--out", raw, "--raw") == 0
    logits = [Predictions.load(folder / "predictions.npz").logits for folder in (out, raw)]
    np.testing.assert_allclose(logits[0], logits[1] * kept["scale"][0], rtol=1e-6)
    assert read_json(out / "metrics.json")["calibration"] == "temperature"
    assert "calibration" not in read_json(raw / "metrics.json")
    # in predict and in what is exported too
    predict = ["predict", "--ckpt", finished, faces / "toy.npz", "--precision", "fp32"]
    assert call(*predict, "--out", tmp_path / "p.json") == 0
    first = json.loads((tmp_path / "p.json").read_text())[0]["probabilities"]
    np.testing.assert_allclose(list(first.values()), softmax(logits[0])[0], atol=2e-6)
    module, meta = load_student(finished)
    fitted = Calibration.load(finished / "calibration.json", 8)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        with_it, without = Deployable(module, meta, calibration=fitted)(images), Deployable(module, meta)(images)
    torch.testing.assert_close(with_it[1], without[1] * fitted.scale[0].astype(np.float32))
    torch.testing.assert_close(with_it[0], with_it[1].softmax(1))


def test_it_can_be_fitted_again(finished):
    assert call("evaluate", "calibrate", finished) == 0
    assert call("evaluate", "calibrate", finished, "--method", "vector") == 0
    assert len(read_json(finished / "calibration.json")["scale"]) == 8
    assert verify(finished)[0].problems == []


def test_that_of_other_weights_is_refused(finished, faces, capsys):
    assert call("evaluate", "calibrate", finished) == 0
    kept = read_json(finished / "calibration.json")
    write_json(finished / "calibration.json", kept | {"weights_sha256": "0" * 64})
    assert call("predict", "--ckpt", finished, faces / "toy.npz") == 2
    assert "is not the file that its run wrote" in error_of(capsys)
    write_sums(finished)
    assert call("predict", "--ckpt", finished, faces / "toy.npz") == 2
    assert "other weights" in error_of(capsys)
    assert call("predict", "--ckpt", finished, faces / "toy.npz", "--raw") == 0


def test_a_student_without_validation_predictions(ckpt, capsys):
    assert call("evaluate", "calibrate", ckpt) == 2
    assert "predictions_valid.npz" in error_of(capsys)
