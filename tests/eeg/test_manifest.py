import csv
import dataclasses

import numpy as np
import pytest

from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.errors import UserError


def test_saved_topomaps_load_bit_for_bit(make_topomaps, tmp_path):
    topomaps = make_topomaps()
    path = topomaps.save(tmp_path, "set")
    assert path == tmp_path / "set_topomaps_all.npz"
    loaded = Topomaps.load(path)
    for field in dataclasses.fields(Topomaps):
        if field.name == "meta":
            assert loaded.meta == topomaps.meta
        else:
            a, b = getattr(topomaps, field.name), getattr(loaded, field.name)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_equal_topomaps_give_equal_bytes(make_topomaps, tmp_path):
    first = make_topomaps().save(tmp_path / "a", "set").read_bytes()
    assert first == make_topomaps().save(tmp_path / "b", "set").read_bytes()


def test_manifest_names_every_row_and_leaves_missing_ratings_empty(make_topomaps, tmp_path):
    topomaps = make_topomaps()
    topomaps.save(tmp_path, "set")
    with open(tmp_path / "set_topomaps_manifest.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["row", "subject", "trial", "window", "valence", "arousal"]
    assert [int(r["row"]) for r in rows] == list(range(6))
    assert [r["valence"] == "" for r in rows] == np.isnan(topomaps.valence).tolist()
    assert np.float32(rows[1]["arousal"]) == topomaps.arousal[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": np.zeros((6, 2, 8))}, "maps"),
        ({"maps": np.full((6, 2, 8, 8), 1.5)}, r"maps: must lie in \[0, 1\]"),
        ({"maps": np.where(np.arange(768).reshape(6, 2, 8, 8) == 500, np.nan, 0.5)}, "1 of 6 rows, first row 3"),
        ({"power": np.full((6, 5, 2), -np.inf)}, "power: NaN or infinite"),
        ({"valence": np.full(6, 1.01), "arousal": np.zeros(6)}, "valence"),
        ({"valence": np.zeros(6)}, "same rows"),
        ({"subject": np.zeros(5)}, "subject"),
        ({"bands": ["alpha"]}, "bands"),
        ({"mask": np.ones((4, 4))}, "mask"),
    ],
)
def test_topomaps_that_do_not_fit_are_refused(make_topomaps, changes, message):
    with pytest.raises(ValueError, match=message):
        make_topomaps(**changes)


def test_damaged_files_are_the_users_fault(make_topomaps, tmp_path):
    path = make_topomaps().save(tmp_path, "set")
    with pytest.raises(UserError, match="no such file"):
        Topomaps.load(tmp_path / "other_topomaps_all.npz")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="truncated"):
        Topomaps.load(path)
    np.savez(path, maps=np.zeros(3))
    with pytest.raises(UserError, match="lacks power"):
        Topomaps.load(path)


def test_nan_in_a_file_is_refused(make_topomaps, tmp_path):
    path = make_topomaps().save(tmp_path, "set")
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["maps"][2, 1, 3, 3] = np.nan
    np.savez(path, **arrays)
    with pytest.raises(UserError, match="NaN or infinite in 1 of 6 rows, first row 2"):
        Topomaps.load(path)


def test_subset_keeps_what_belongs_together(make_topomaps):
    topomaps = make_topomaps()
    part = topomaps.subset(topomaps.labelled)
    assert len(part) == 4 and not np.isnan(part.valence).any()
    np.testing.assert_array_equal(part.maps, topomaps.maps[[0, 1, 3, 4]])
