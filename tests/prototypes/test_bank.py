"""Algorithm 1 and the bank's file."""

import numpy as np
import pytest
import torch

from ngd_fast import PrototypeBank
from ngd_fast.artifacts.files import load_npz, save_npz
from ngd_fast.errors import UserError
from ngd_fast.prototypes.bank import assign_bins, bin_centers


@pytest.fixture
def windows():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(300, 16)).astype(np.float32) + 1
    return features, generator.uniform(-1, 1, 300).astype(np.float32), generator.uniform(-1, 1, 300).astype(np.float32)


def plain_algorithm_1(features, valence, arousal, grid):
    """The paper's loop, written as it reads."""
    centers = [-1 + (2 * i + 1) / grid for i in range(grid)]
    members = {(i, j): [] for i in range(grid) for j in range(grid)}
    for feature, v, a in zip(features.astype(np.float64), valence, arousal):
        i = min(range(grid), key=lambda c: abs(v - centers[c]))
        j = min(range(grid), key=lambda c: abs(a - centers[c]))
        members[i, j].append(feature / np.linalg.norm(feature))
    means = {key: np.mean(rows, axis=0) for key, rows in members.items() if rows}
    prototypes, counts = [], []
    for i in range(grid):
        for j in range(grid):
            counts.append(len(members[i, j]))
            distance = {key: np.hypot(key[0] - i, key[1] - j) for key in means}
            near = [means[key] for key in means if np.isclose(distance[key], min(distance.values()))]
            prototypes.append(np.mean(near, axis=0))
    counts = np.array(counts)
    return np.stack(prototypes), (counts + 1) / (counts + 1).sum(), counts


@pytest.mark.parametrize("grid", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_build_follows_algorithm_1(windows, grid, n):
    features, valence, arousal = (array[:n] for array in windows)
    bank = PrototypeBank.build(features, valence, arousal, grid=grid)
    prototypes, prior, counts = plain_algorithm_1(features, valence, arousal, grid)
    np.testing.assert_allclose(bank.prototypes, prototypes, atol=1e-6)
    np.testing.assert_allclose(bank.prior, prior, atol=1e-7)
    np.testing.assert_array_equal(bank.counts.reshape(-1), counts)
    # The matrix says from where each prototype came, so it alone rebuilds the empty bins.
    mixed = bank.filled_from @ bank.prototypes.numpy() / bank.filled_from.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(mixed, bank.prototypes, atol=1e-6)
    np.testing.assert_array_equal(bank.filled_from[~bank.empty], np.eye(grid * grid)[~bank.empty])


def test_ratings_of_dreamer_and_mahnob_fall_into_the_bins_they_belong_to():
    five, nine = np.arange(1, 6), np.arange(1, 10)
    assert assign_bins((five - 3) / 2, 5).tolist() == [0, 1, 2, 3, 4]
    assert assign_bins(((nine - 5) / 4).astype(np.float32), 5).tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4]
    assert assign_bins((five - 3) / 2, 7).tolist() == [0, 1, 3, 5, 6]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tie_takes_the_lower_centre_in_both_precisions(dtype):
    assert assign_bins(np.array([-0.6, -0.2, 0.2, 0.6], dtype), 5).tolist() == [0, 1, 2, 3]
    assert assign_bins(np.array([0], dtype), 4).tolist() == [1]
    np.testing.assert_allclose(bin_centers(5), [-0.8, -0.4, 0, 0.4, 0.8], atol=1e-7)


def test_empty_bins_average_ties_and_beyond_the_radius_take_the_mean_of_all_windows():
    # Three windows in two opposite corners of 3x3: the middle is equally far from both.
    features = np.array([[1.0, 0], [1.0, 0], [0, 1.0]])
    rating = np.array([-1.0, -1.0, 1.0])
    bank = PrototypeBank.build(features, rating, rating, grid=3)
    np.testing.assert_allclose(bank.prototypes[4], [0.5, 0.5])
    assert np.flatnonzero(bank.filled_from[4]).tolist() == [0, 8]
    assert np.flatnonzero(bank.filled_from[1]).tolist() == [0]
    near = PrototypeBank.build(features, rating, rating, grid=3, fill_radius=1)
    np.testing.assert_allclose(near.prototypes[4], [2 / 3, 1 / 3], atol=1e-6)
    np.testing.assert_allclose(near.prototypes[1], [1, 0])


def test_unlabelled_windows_are_left_out_and_counted(windows):
    features, valence, arousal = windows
    gaps = valence.copy()
    gaps[100:] = np.nan
    bank = PrototypeBank.build(features, gaps, arousal)
    expected = PrototypeBank.build(features[:100], valence[:100], arousal[:100])
    assert torch.equal(bank.prototypes, expected.prototypes)
    assert bank.meta["unlabelled"] == 200 and bank.meta["windows"] == 100
    with pytest.raises(UserError, match="none of 300 windows"):
        PrototypeBank.build(features, valence * np.nan, arousal)


def test_bad_arguments_are_named(windows):
    features, valence, arousal = windows
    for arguments, keywords, name in (
        ((features[:, 0], valence, arousal), {}, "features"),
        ((features, valence[:-1], arousal), {}, "valence"),
        ((features, valence, arousal * 3), {}, "rating"),
        ((features * np.nan, valence, arousal), {}, "features"),
        ((features, valence, arousal), {"grid": 0}, "grid"),
        ((features, valence, arousal), {"grid": 5.0}, "grid"),
        ((features, valence, arousal), {"fill_radius": 0.5}, "fill_radius"),
    ):
        with pytest.raises(ValueError, match=name):
            PrototypeBank.build(*arguments, **keywords)


def test_save_and_load_keep_everything_bit_for_bit(windows, tmp_path):
    bank = PrototypeBank.build(*windows, meta={"split": "validation"})
    bank = bank.with_class_prior(torch.full((8, 25), 1 / 25), {"kind": "test"})
    bank.save(tmp_path / "a.npz")
    loaded = PrototypeBank.load(tmp_path / "a.npz", embedding_dim=16)
    for name in ("prototypes", "prior", "class_prior"):
        assert torch.equal(getattr(bank, name), getattr(loaded, name))
    for name in ("counts", "centers", "filled_from"):
        np.testing.assert_array_equal(getattr(bank, name), getattr(loaded, name))
    assert loaded.meta == bank.meta and loaded.checksum == bank.checksum
    loaded.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("name", ["prototypes", "prior", "counts", "filled_from", "meta"])
def test_a_changed_file_is_refused(windows, tmp_path, name):
    path = tmp_path / "bank.npz"
    PrototypeBank.build(*windows).save(path)
    arrays = load_npz(path)
    if name == "meta":
        arrays[name] = np.array(str(arrays[name]).replace("300", "301"))
    else:
        arrays[name].flat[0] += 1
    save_npz(path, arrays)
    with pytest.raises(UserError, match="changed since it was saved"):
        PrototypeBank.load(path)


def test_files_that_are_no_bank_are_refused(windows, tmp_path):
    path = tmp_path / "bank.npz"
    PrototypeBank.build(*windows).save(path)
    with pytest.raises(UserError, match="16 dimensions, the features have 256"):
        PrototypeBank.load(path, embedding_dim=256)
    arrays = load_npz(path)
    save_npz(tmp_path / "extra.npz", {**arrays, "other": np.zeros(1)})
    with pytest.raises(UserError, match="unknown array other"):
        PrototypeBank.load(tmp_path / "extra.npz")
    save_npz(tmp_path / "less.npz", {"prototypes": arrays["prototypes"]})
    with pytest.raises(UserError, match="lacks prior"):
        PrototypeBank.load(tmp_path / "less.npz")
    (tmp_path / "half.npz").write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="truncated"):
        PrototypeBank.load(tmp_path / "half.npz")
    with pytest.raises(UserError, match="no such file"):
        PrototypeBank.load(tmp_path / "absent.npz")


def test_a_bank_holds_its_shape_and_its_probabilities(windows):
    bank = PrototypeBank.build(*windows)
    fields = {name: getattr(bank, name) for name in ("prototypes", "prior", "counts", "centers", "filled_from")}
    for name, value in (
        ("prototypes", bank.prototypes[:24]),
        ("prototypes", bank.prototypes * float("nan")),
        ("prior", bank.prior * 2),
        ("counts", bank.counts[:4]),
        ("centers", bank.centers * 2),
        ("filled_from", bank.filled_from * 0),
        ("class_prior", torch.ones(8, 25)),
        ("class_prior", torch.full((8, 24), 1 / 24)),
    ):
        with pytest.raises(ValueError, match=name):
            PrototypeBank(**{**fields, name: value})
