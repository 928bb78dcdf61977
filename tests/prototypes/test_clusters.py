"""Banks of clusters: k-means, the file, and what needs a grid says so."""

import numpy as np
import pytest
import torch

from ngd_fast import PrototypeBank
from ngd_fast.errors import UserError
from ngd_fast.prototypes.analysis import compared, separation, silhouette
from ngd_fast.prototypes.clusters import build_clusters
from ngd_fast.prototypes.figures import draw_centers, draw_coverage


@pytest.fixture
def windows():
    """Four tight groups of 32-D features of very different lengths, each with its own ratings."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(4), (10, 20, 30, 40))
    directions = np.linalg.qr(rng.normal(size=(32, 4)))[0].T
    features = (directions[group] + rng.normal(0, 0.02, (100, 32))) * rng.uniform(0.1, 10, (100, 1))
    places = np.array([(0.9, 0.1), (-0.8, 0.2), (0.3, -0.7), (-0.1, 0.6)])
    ratings = (places[group] + rng.uniform(-0.1, 0.1, (100, 2))).astype(np.float32)
    return features.astype(np.float32), *ratings.T, group


def test_clusters_are_the_groups_their_means_shares_and_ratings(windows):
    features, valence, arousal, group = windows
    bank = build_clusters(features, valence, arousal, k=4, meta={"split": "all"})
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    for k, g in enumerate((1, 3, 2, 0)):  # from low to high valence
        mean = units[group == g].mean(axis=0)
        np.testing.assert_allclose(bank.prototypes[k], mean / np.linalg.norm(mean), atol=1e-6)
        np.testing.assert_allclose(bank.va[k], [valence[group == g].mean(), arousal[group == g].mean()], atol=1e-6)
        assert bank.counts[k] == (g + 1) * 10 and float(bank.prior[k]) == pytest.approx((g + 1) / 10)
    assert bank.layout == "kmeans 4" and not bank.empty.any() and bank.meta["split"] == "all"
    assert bank.prototypes.dtype == bank.prior.dtype == torch.float32 and bank.va.dtype == np.float32


@pytest.mark.parametrize("k", [2, 25])
def test_prototypes_have_norm_one_and_repeat(k):
    rng = np.random.default_rng(1)
    arguments = (rng.normal(size=(300, 256)), *rng.uniform(-1, 1, (2, 300)))
    bank, again, other = (build_clusters(*arguments, k=k, seed=seed) for seed in (5, 5, 6))
    torch.testing.assert_close(bank.prototypes.norm(dim=1), torch.ones(k))
    assert float(bank.prior.sum()) == pytest.approx(1, abs=1e-6) and bank.counts.sum() == 300
    assert bank.checksum == again.checksum != other.checksum
    assert (np.diff(bank.va[:, 0]) >= 0).all()


def test_save_and_load_keep_everything(windows, tmp_path):
    bank = build_clusters(*windows[:3], k=4)
    bank.save(tmp_path / "a.npz")
    loaded = PrototypeBank.load(tmp_path / "a.npz", embedding_dim=32)
    assert loaded.checksum == bank.checksum and loaded.meta == bank.meta and loaded.meta["layout"] == "kmeans"
    assert np.array_equal(loaded.va, bank.va) and torch.equal(loaded.prototypes, bank.prototypes)
    loaded.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_grids_file_is_what_it_was(windows, tmp_path):
    """No array and no word more: a bank of before has this checksum, and loads."""
    ratings = np.linspace(-1, 1, 9)
    bank = PrototypeBank.build(np.eye(9), ratings, ratings, grid=3)
    assert bank.checksum == "fc634f908400524f8ff5c0b981352a4ffc06b8b4aa352c310be7b0d8ae5e8277"
    bank.save(tmp_path / "g.npz")
    with np.load(tmp_path / "g.npz") as file:
        assert set(file) == {"prototypes", "prior", "counts", "centers", "filled_from", "meta", "sha256"}
    loaded = PrototypeBank.load(tmp_path / "g.npz")
    assert loaded.va is None and loaded.layout == "3x3" and loaded.grid == 3
    np.testing.assert_allclose(loaded.places[5], [0, 2 / 3], atol=1e-6)


def test_unrated_windows_are_left_out(windows):
    features, valence, arousal, group = windows
    gaps = np.where(group == 0, np.nan, valence)
    bank = build_clusters(features, gaps, arousal, k=3)
    assert bank.meta["unlabelled"] == 10 and bank.meta["windows"] == bank.counts.sum() == 90
    with pytest.raises(UserError, match="none of 100 windows"):
        build_clusters(features, valence * np.nan, arousal, k=3)


def test_errors_are_one_line(windows):
    features, valence, arousal, _ = windows
    for arguments, options, message in (
        ((features, valence, arousal), {"k": 1}, "k: must be an integer of at least 2, got 1"),
        ((features, valence, arousal), {"k": 2.0}, "k: must be an integer"),
        ((features, valence, arousal), {"seed": -1}, "seed: must be"),
        ((features, valence * 3, arousal), {}, "rating: must lie"),
        ((features[:, 0], valence, arousal), {}, "features: must be"),
    ):
        with pytest.raises(ValueError, match=message):
            build_clusters(*arguments, **options)
    same = np.repeat(features[:5], 20, axis=0)
    for rows, different, k in ((features, 100, 101), (same, 5, 6)):
        with pytest.raises(UserError, match=f"^k {k}: there are only {different} different windows .*$"):
            build_clusters(rows, valence, arousal, k=k)
    bank = build_clusters(features, valence, arousal, k=4)
    for ask in (lambda: bank.grid, lambda: silhouette(bank, features, np.stack([valence, arousal], 1))):
        with pytest.raises(UserError, match=r"^this bank has no grid: its prototypes are 4 clusters .*$"):
            ask()


def test_a_bank_of_clusters_holds_its_shape(windows):
    bank = build_clusters(*windows[:3], k=4)
    names = ("prototypes", "prior", "counts", "centers", "filled_from", "va")
    fields = {name: getattr(bank, name) for name in names}
    for name, value in (
        ("prototypes", bank.prototypes[:3]),
        ("counts", bank.counts.reshape(2, 2)),
        ("counts", bank.counts * [0, 1, 1, 1]),
        ("centers", np.zeros(2, np.float32)),
        ("va", bank.va[:, :1]),
        ("va", bank.va * np.float32("nan")),
        ("va", bank.counts),
        ("prior", bank.prior * 2),
    ):
        with pytest.raises(ValueError, match=name):
            PrototypeBank(**{**fields, name: value})


def test_banks_of_both_layouts_are_compared(windows):
    features, valence, arousal, _ = windows
    clusters = compared(build_clusters(features, valence, arousal, k=4))
    assert clusters["coverage"] == 1 and clusters["prototypes"] == 4 and clusters["layout"] == "kmeans 4"
    assert 0.9 < clusters["min_distance"] <= clusters["mean_distance"] < 1.1  # the directions are orthogonal
    grid = PrototypeBank.build(features, valence, arousal, grid=9)
    row, own = compared(grid), separation(grid)
    assert row["coverage"] == (~grid.empty).sum() / 81 < 0.5
    assert row["mean_distance"] == pytest.approx(1 - own["mean_cosine"])
    assert row["min_distance"] == pytest.approx(1 - own["max_cosine"]) and row["min_distance"] < 0.1
    single = compared(PrototypeBank.build(features[:1], valence[:1], arousal[:1]))
    assert single["coverage"] == 1 / 25 and single["mean_distance"] is None


def test_figures_are_drawn_and_repeat(windows, tmp_path):
    bank = build_clusters(*windows[:3], k=4)
    for draw in (draw_coverage, draw_centers):
        for name in ("a.png", "b.png"):
            draw(tmp_path / name, bank)
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
