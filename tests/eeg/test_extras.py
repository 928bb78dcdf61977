"""Where an optional package is absent, the message names the extra that brings it."""

import sys

import pytest

from ngd_fast.eeg.dreamer import open_dreamer
from ngd_fast.eeg.figure import draw_topomaps
from ngd_fast.eeg.mahnob import open_mahnob
from ngd_fast.eeg.topomap import make_operator
from ngd_fast.errors import UserError
from ngd_fast.synthetic.recordings import write_dreamer


@pytest.fixture
def without(monkeypatch):
    """A function that makes a package impossible to import."""

    def forbid(package):
        for name in [m for m in sys.modules if m.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return forbid


def test_mne(without, tmp_path):
    without("mne")
    for action in (lambda: make_operator(["F3", "F4", "O1", "O2"]), lambda: open_mahnob(tmp_path)):
        with pytest.raises(UserError, match=r"pip install 'ngd-fast\[eeg\]'"):
            action()


def test_h5py(without, tmp_path):
    without("h5py")
    (tmp_path / "D.mat").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600))
    with pytest.raises(UserError, match=r"v7.3 files need h5py: pip install 'ngd-fast\[eeg\]'"):
        open_dreamer(tmp_path / "D.mat")
    with pytest.raises(UserError, match=r"needs h5py"):
        write_dreamer(tmp_path / "E.mat", subjects=1, clips=1, seconds=2, baseline_seconds=2, version="v7.3")
    assert not (tmp_path / "E.mat").exists()


def test_matplotlib(without, make_topomaps, tmp_path):
    without("matplotlib")
    with pytest.raises(UserError, match=r"need matplotlib: pip install 'ngd-fast\[viz\]'"):
        draw_topomaps(make_topomaps(), tmp_path / "x")
    assert not list(tmp_path.iterdir())
