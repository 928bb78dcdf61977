"""Several files of topomaps as one."""

import numpy as np
import pytest

from ngd_fast.eeg.join import load_maps
from ngd_fast.errors import UserError


def test_common_bands_and_channels_and_nobody_mistaken_for_someone_else(make_topomaps, tmp_path, capsys):
    a = make_topomaps(subject=[1, 1, 2, 2, 12, 12])
    b = make_topomaps(
        n=4,
        maps=np.random.default_rng(1).random((4, 3, 8, 8)),
        power=np.random.default_rng(1).normal(size=(4, 6, 3)),
        bands=["beta", "gamma", "alpha"],
        channels=["Z", "y", "EEG x-Ref", "w", "t", "s"],
        subject=[1, 1, 2, 2],
    )
    files = [a.save(tmp_path, "a"), b.save(tmp_path, "b")]
    joined, checksum, rows = load_maps(files)
    assert joined.subject.tolist() == [1, 1, 2, 2, 12, 12, 101, 101, 102, 102]
    assert joined.bands.tolist() == ["alpha", "beta"] and joined.channels.tolist() == ["w", "x", "y", "z"]
    np.testing.assert_array_equal(joined.maps[6:], b.maps[:, [2, 0]])
    np.testing.assert_array_equal(joined.power[6:], b.power[:, [3, 2, 1, 0]][:, :, [2, 0]])
    np.testing.assert_array_equal(joined.power[:6], a.power[:, 1:])
    assert rows["a"].tolist() == list(range(6)) and rows["b"].tolist() == [6, 7, 8, 9]
    assert joined.meta["joined"]["b"]["first_subject"] == 100
    assert "channels that all 2 files have: w, x, y, z" in capsys.readouterr().err
    assert checksum != load_maps(files[::-1])[1] and len(checksum) == 64
    alone, checksum, rows = load_maps(files[0])
    np.testing.assert_array_equal(alone.maps, a.maps)
    assert list(rows) == ["a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bands": ["low", "high"]}, "have no band in common"),
        ({"channels": list("abcde")}, "have no channel in common"),
        ({"maps": np.zeros((6, 2, 4, 4)), "mask": np.ones((4, 4))}, "8x8, .* 4x4; draw all with the same topomap.res"),
        ({"subject": [-1] * 6}, "must not be negative"),
        ({}, "are the same file"),
    ],
)
def test_files_that_do_not_go_together(make_topomaps, tmp_path, changes, message):
    files = [make_topomaps().save(tmp_path, "a"), make_topomaps(**changes).save(tmp_path, "b")]
    with pytest.raises(UserError, match=message):
        load_maps(files)
