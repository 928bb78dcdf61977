"""Made-up topomaps whose patterns depend on valence and arousal, the same way in every subject."""

import numpy as np
import pytest

from ngd_fast.config import load_config
from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.teacher.config import TeacherConfig


def make_maps(*, subjects=8, trials=6, windows=8, size=16, bands=2, noise=0.15, seed=0, first_subject=1) -> Topomaps:
    rng = np.random.default_rng(seed)
    n = subjects * trials * windows
    subject, trial, window = (i.ravel() for i in np.indices((subjects, trials, windows)))
    ratings = rng.integers(0, 5, (2, subjects, trials))
    valence, arousal = (r[subject, trial] / 2 - 1 for r in ratings)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    patterns = np.stack([x, y])[:, None] * np.linspace(1, -1, bands)[:, None, None]
    head = rng.normal(size=(subjects, bands, size, size))[subject] * 0.3
    signal = valence[:, None, None, None] * patterns[0] + arousal[:, None, None, None] * patterns[1]
    maps = 0.5 + 0.15 * signal + 0.3 * head + noise * rng.normal(size=(n, bands, size, size))
    mask = x**2 + y**2 <= 1
    maps = np.clip(maps, 0, 1) * mask
    power = maps.reshape(n, bands, 4, size // 4, 4, size // 4).mean(axis=(3, 5)).reshape(n, bands, 16).swapaxes(1, 2)
    return Topomaps(
        maps=maps, power=power, valence=valence, arousal=arousal, subject=subject + first_subject, trial=trial,
        window=window, bands=["theta", "alpha", "beta", "gamma"][:bands], channels=[f"C{i}" for i in range(16)],
        mask=mask,
    )  # fmt: skip


@pytest.fixture(scope="session")
def maps() -> Topomaps:
    return make_maps()


@pytest.fixture(scope="session")
def support() -> Topomaps:
    other = make_maps(subjects=2, seed=9, first_subject=100)
    other.valence[:] = other.arousal[:] = np.nan
    return other


@pytest.fixture
def quick() -> TeacherConfig:
    overrides = ["optimizer.epochs=4", "optimizer.batch_size=64", "network.width=8", "input.context=1", "choice=best"]
    return load_config(TeacherConfig, overrides=overrides)
