"""Separation, the reach of rating scales, the sweep over grids, priors by class, figures."""

import sys

import numpy as np
import pytest
import torch

from ngd_fast import PrototypeBank
from ngd_fast.errors import UserError
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.prototypes.analysis import rating_levels, separation, silhouette, sweep_grids, unreachable_bins
from ngd_fast.prototypes.bank import assign_bins
from ngd_fast.prototypes.class_prior import VA_OF_LABEL, class_conditional_prior
from ngd_fast.prototypes.figures import draw_centers, draw_coverage


def test_a_five_level_scale_can_never_fill_24_of_the_49_bins_of_a_7x7_grid():
    assert unreachable_bins(5, 7) == 24
    # All 25 combinations of ratings, as often as one likes: the other 24 bins stay empty.
    ratings = np.stack(np.meshgrid(*[(np.arange(1, 6) - 3) / 2] * 2), axis=-1).reshape(-1, 2)
    bank = PrototypeBank.build(np.eye(25), ratings[:, 0], ratings[:, 1], grid=7)
    assert bank.empty.sum() == 24 and not bank.counts[[2, 4]].any() and not bank.counts[:, [2, 4]].any()
    assert [unreachable_bins(5, grid) for grid in (3, 5, 9)] == [0, 0, 56]
    assert [unreachable_bins(9, grid) for grid in (5, 7, 9)] == [0, 0, 0]


def test_scales_are_recognised():
    rng = np.random.default_rng(0)
    assert rating_levels((rng.integers(1, 6, 200) - 3) / 2) == 5
    assert rating_levels(((rng.integers(1, 10, 200) - 5) / 4).astype(np.float32)) == 9
    assert rating_levels(rng.uniform(-1, 1, 200)) is None


@pytest.fixture
def ordered():
    """Features whose direction follows the ratings, with noise."""
    rng = np.random.default_rng(1)
    ratings = (rng.integers(1, 6, (600, 2)) - 3) / 2
    features = np.concatenate([ratings, np.full((600, 1), 0.7)], axis=1) + rng.normal(0, 0.05, (600, 3))
    return features, ratings


def test_silhouette_and_separation_tell_order_from_noise(ordered):
    features, ratings = ordered
    bank = PrototypeBank.build(features, *ratings.T)
    measures = separation(bank)
    assert silhouette(bank, features, ratings) > 0.5 and measures["order"] > 0.8
    shuffled = np.random.default_rng(2).permutation(features)
    noise = PrototypeBank.build(shuffled, *ratings.T)
    assert silhouette(noise, shuffled, ratings) < 0 and abs(separation(noise)["order"]) < 0.3
    assert -1 <= measures["mean_cosine"] <= measures["max_cosine"] <= 1


def test_silhouette_is_the_mean_over_windows_of_own_and_nearest_other(ordered):
    features, ratings = (array[:40] for array in ordered)
    bank = PrototypeBank.build(features, *ratings.T, grid=3)
    units = torch.nn.functional.normalize(bank.prototypes.double(), dim=1).numpy()
    values = []
    for feature, (v, a) in zip(features, ratings):
        own = int(assign_bins(v, 3) * 3 + assign_bins(a, 3))
        distance = {k: 1 - feature @ units[k] / np.linalg.norm(feature) for k in range(9) if not bank.empty[k]}
        near, other = distance[own], min(d for k, d in distance.items() if k != own)
        values.append((other - near) / max(other, near))
    assert silhouette(bank, features, ratings) == pytest.approx(np.mean(values), abs=1e-6)
    corners = np.array([-1.0, 1.0])
    other = PrototypeBank.build(features[:2], corners, corners, grid=9)
    with pytest.raises(ValueError, match="not the bank's windows"):
        silhouette(other, features, ratings)
    single = PrototypeBank.build(features[:1], *ratings[:1].T)
    assert silhouette(single, features[:1], ratings[:1]) is None and separation(single) == {}


def test_the_sweep_counts_empty_bins_and_those_out_of_reach(ordered):
    rows = {row["grid"]: row for row in sweep_grids(*ordered)}
    assert list(rows) == list(range(3, 10)) and all(row["levels"] == 5 for row in rows.values())
    assert rows[5]["empty"] == 0 and rows[7]["empty"] == rows[7]["unreachable"] == 24
    assert rows[9]["unreachable"] == 56 and rows[3]["smallest"] > rows[5]["smallest"]


def test_class_priors_peak_at_their_places():
    prior = class_conditional_prior(CLASS_NAMES, 5)
    assert prior.shape == (8, 25) and prior.dtype == torch.float32 and (prior > 0).all()
    torch.testing.assert_close(prior.sum(dim=1), torch.ones(8))
    for name, row in zip(CLASS_NAMES, prior):
        valence, arousal = VA_OF_LABEL[name]
        assert int(row.argmax()) == int(assign_bins(valence, 5) * 5 + assign_bins(arousal, 5)), name
    # One step of the grid away along valence costs exp(-0.4^2 / (2 * 0.4^2)).
    neutral = prior[0].reshape(5, 5)
    assert float(neutral[3, 2] / neutral[2, 2]) == pytest.approx(np.exp(-0.5), abs=1e-5)
    assert (class_conditional_prior(CLASS_NAMES, 9, width=0.2) > 0).all()
    for arguments, name in (((["joy"], 5), "class_names"), (((), 5), "class_names")):
        with pytest.raises(ValueError, match=name):
            class_conditional_prior(*arguments)
    with pytest.raises(ValueError, match="width"):
        class_conditional_prior(CLASS_NAMES, 5, width=0.1)


@pytest.mark.parametrize("grid", [1, 5, 7])
def test_figures_are_drawn_and_repeat(ordered, tmp_path, grid):
    features, ratings = ordered
    bank = PrototypeBank.build(features, *ratings.T, grid=grid)
    for draw in (draw_coverage, draw_centers):
        for name in ("a.png", "b.png"):
            draw(tmp_path / name, bank)
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        assert (tmp_path / "a.png").stat().st_size > 5000


def test_without_matplotlib_the_extra_is_named(ordered, tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    features, ratings = ordered
    bank = PrototypeBank.build(features, *ratings.T)
    for draw in (draw_coverage, draw_centers):
        with pytest.raises(UserError, match=r"pip install 'ngd-fast\[viz\]'"):
            draw(tmp_path / "x.png", bank)
