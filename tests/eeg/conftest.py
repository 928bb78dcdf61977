"""Recordings in the real datasets' formats, small and made once."""

import numpy as np
import pytest

from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.synthetic.recordings import write_dreamer, write_mahnob


@pytest.fixture(scope="session")
def dreamer_mat(tmp_path_factory):
    return write_dreamer(
        tmp_path_factory.mktemp("dreamer") / "DREAMER.mat", subjects=3, clips=4, seconds=9.5, baseline_seconds=5, seed=1
    )


@pytest.fixture(scope="session")
def mahnob_sessions(tmp_path_factory):
    return write_mahnob(
        tmp_path_factory.mktemp("mahnob") / "Sessions", subjects=2, sessions=4, seconds=6, around_seconds=5, seed=5
    )


@pytest.fixture
def make_topomaps():
    """A function that makes small valid Topomaps; keywords replace fields."""

    def make(n=6, **changes):
        rng = np.random.default_rng(0)
        fields = {
            "maps": rng.random((n, 2, 8, 8)),
            "power": rng.normal(size=(n, 5, 2)),
            "valence": np.where(np.arange(n) % 3 == 2, np.nan, np.linspace(-1, 1, n)),
            "arousal": np.where(np.arange(n) % 3 == 2, np.nan, np.linspace(1, -1, n)),
            "subject": np.arange(n) // 2,
            "trial": np.zeros(n),
            "window": np.arange(n) % 2,
            "bands": ["alpha", "beta"],
            "channels": list("vwxyz"),
            "mask": np.ones((8, 8)),
            "meta": {"dataset": "test"},
        }
        return Topomaps(**{**fields, **changes})

    return make
