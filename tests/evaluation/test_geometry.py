import numpy as np
import pytest

from ngd_fast.artifacts.files import read_json
from ngd_fast.evaluation.geometry import describe_features, effective_rank, principal_angles, random_angles
from ngd_fast.evaluation.predictions import Predictions
from ngd_fast.prototypes.bank import PrototypeBank

from .conftest import call, draw, error_of

RNG = np.random.default_rng(0)


def test_effective_rank_of_equal_directions():
    features = RNG.normal(size=(20_000, 3)) @ np.linalg.qr(RNG.normal(size=(16, 3)))[0].T
    assert effective_rank(features) == pytest.approx(3, abs=0.01)
    assert effective_rank(RNG.normal(size=(50_000, 16))) == pytest.approx(16, abs=0.05)
    assert effective_rank(np.outer(RNG.normal(size=50), np.ones(16))) == pytest.approx(1)


def test_angles_to_the_prototypes_span():
    basis = np.linalg.qr(RNG.normal(size=(32, 32)))[0]
    prototypes = RNG.normal(size=(6, 5)) @ basis[:5]
    inside = RNG.normal(size=(500, 5)) @ basis[:5] + 1e-4 * RNG.normal(size=(500, 32))
    outside = RNG.normal(size=(500, 5)) @ basis[5:10] + 1e-4 * RNG.normal(size=(500, 32))
    assert principal_angles(inside, prototypes).max() < 0.1
    assert principal_angles(outside, prototypes).min() > 89
    assert len(principal_angles(inside, prototypes)) == 5
    # between: one shared direction of five
    mixed = RNG.normal(size=(500, 5)) @ basis[4:9]
    angles = principal_angles(mixed, prototypes)
    assert angles[0] < 1
    assert angles[1] > 89
    assert len(principal_angles(inside, np.ones((6, 32)))) == 0, "one point has no directions"


def test_random_subspaces_are_what_random_features_have():
    expected = random_angles(64, 5, draws=50)
    found = np.mean([principal_angles(RNG.normal(size=(200, 64)), RNG.normal(size=(6, 64))) for _ in range(30)], axis=0)
    np.testing.assert_allclose(found, expected, atol=3)


def test_tight_classes_are_read_off_and_noise_is_not():
    labels = np.repeat(np.arange(8), 40)
    centers = np.eye(8, 16)
    close = centers[labels] + 0.02 * RNG.normal(size=(320, 16))
    noise = RNG.normal(size=(320, 16))
    made = [
        describe_features(Predictions(np.zeros((320, 8)), labels, list(map(str, range(320))), tuple("abcdefgh"), "d",
                                      features=f))
        for f in (close, noise)
    ]  # fmt: skip
    assert made[0]["linear_probe"] == made[0]["knn"] == 1.0
    assert made[1]["linear_probe"] < 0.25
    assert made[0]["within_variance"] < 0.01 < made[1]["within_variance"]
    assert made[0]["margin_min"] == pytest.approx(np.sqrt(2), abs=0.05)
    assert "angle_mean" not in made[0]


def test_the_command(suite, tmp_path, capsys):
    bank = tmp_path / "bank.npz"
    features, ratings = RNG.normal(size=(300, 16)), RNG.uniform(-1, 1, (300, 2))
    PrototypeBank.build(features, ratings[:, 0], ratings[:, 1]).save(bank)
    assert call("evaluate", "geometry", suite, "--bank", bank, "--out", tmp_path / "viz") == 0
    shown = capsys.readouterr()
    assert "effective rank" in shown.out
    assert "random subspaces" in shown.err
    made = read_json(tmp_path / "viz" / "feature_geometry.json")
    assert [r["seed"] for r in made["B3"]] == [1, 2]
    assert made["B3"][0]["within_variance"] < made["B0"][0]["within_variance"]
    assert (tmp_path / "viz" / "feature_geometry.png").exists()


def test_features_and_prototypes_of_other_dimensions(suite, tmp_path, capsys):
    PrototypeBank.build(RNG.normal(size=(9, 4)), np.zeros(9), np.zeros(9)).save(tmp_path / "bank.npz")
    assert call("evaluate", "geometry", suite, "--bank", tmp_path / "bank.npz", "--out", tmp_path) == 2
    assert "16 dimensions, the prototypes 4" in error_of(capsys)


def test_runs_without_features(tmp_path, capsys, run):
    made = draw()
    bare = Predictions(made.logits, made.labels, made.names, made.class_names, made.dataset)
    bare.save(run / "predictions_valid.npz")
    (run / "SHA256SUMS.txt").unlink()
    assert call("evaluate", "geometry", run, "--out", tmp_path) == 2
    assert "kept no predictions with features" in error_of(capsys)
