"""Blinks mixed into made-up signals, and taken out again."""

import numpy as np
import pytest

from ngd_fast.config import load_config
from ngd_fast.eeg.cleaning import clean
from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings
from ngd_fast.eeg.recordings import open_recordings
from ngd_fast.errors import UserError
from tests.eeg.test_recordings import CHANNELS, RATE, make_raw, write_table

mne = pytest.importorskip("mne")
# How strongly a blink shows at each electrode.
REACH = np.array([{"Fp1": 1.0, "Fp2": 1.0, "F3": 0.4, "F4": 0.4}.get(name, 0.05) for name in CHANNELS])


@pytest.fixture
def blinking():
    """(brain [12, samples], blinks [samples], both together), uV."""
    rng = np.random.default_rng(0)
    samples = 30 * RATE
    brain = 8 * rng.normal(size=(12, 12)) @ rng.laplace(size=(12, samples)) / 4
    blinks = np.zeros(samples)
    for start in range(RATE, samples - RATE, 2 * RATE):
        blinks[start : start + RATE // 2] = 150 * np.hanning(RATE // 2)
    return brain, blinks, brain + REACH[:, None] * blinks


def config(method):
    return load_config(EegConfig, overrides=[f"cleaning.ocular.method={method}", "cleaning.reference=null"]).cleaning


def share_of_blinks(signals, blinks):
    """|r| of the frontal channels with the blinks."""
    return max(abs(np.corrcoef(row, blinks)[0, 1]) for row in signals[:2])


@pytest.mark.parametrize(("method", "with_eog"), [("ica", True), ("ica", False), ("regression", True)])
def test_blinks_go_and_the_brain_stays(blinking, method, with_eog):
    brain, blinks, mixed = blinking
    eog = (blinks + np.random.default_rng(1).normal(size=len(blinks)))[None] if with_eog else None
    settings = config(method)
    cleaned, rate, removed = clean(mixed, RATE, CHANNELS, settings, eog=eog)
    expected, *_ = clean(brain, RATE, CHANNELS, settings.model_copy(update={"ocular": config("null").ocular}))
    assert removed >= 1 and rate == RATE and cleaned.shape == mixed.shape
    assert share_of_blinks(mixed, blinks) > 0.6
    assert share_of_blinks(cleaned, blinks) < 0.25
    behind = [CHANNELS.index(name) for name in ("P3", "P4", "O1", "O2")]
    assert min(np.corrcoef(cleaned[i], expected[i])[0, 1] for i in behind) > 0.9
    again, *_ = clean(mixed, RATE, CHANNELS, settings, eog=eog)
    np.testing.assert_array_equal(cleaned, again)  # the start of the ICA is seeded


def test_without_eyes_it_is_said(blinking):
    with pytest.raises(UserError, match=r"x: ocular.method=regression needs EOG channels"):
        clean(blinking[2], RATE, CHANNELS, config("regression"), where="x")
    with pytest.raises(UserError, match="ica needs EOG or frontal channels; there are O1, O2, P3, P4"):
        clean(blinking[2][:4], RATE, ["O1", "O2", "P3", "P4"], config("ica"), where="x")


def test_eog_channels_of_a_recording_are_used_and_the_file_remembers(tmp_path):
    make_raw([*CHANNELS, "EOG1"], positions=False).save(tmp_path / "a_raw.fif", verbose="error")
    table = write_table(tmp_path / "t.csv", ["a_raw.fif,2,10,1,1,9,1"])
    settings = load_config(EegConfig, overrides=["cleaning.ocular.method=regression"])
    maps = topomaps_from_recordings(open_recordings(table, rating_range=(1, 9)), settings)
    plain = topomaps_from_recordings(open_recordings(table, rating_range=(1, 9)), EegConfig())
    assert maps.channels.tolist() == list(CHANNELS) and not np.array_equal(maps.power, plain.power)
    (trial,) = maps.meta["quality"]["trials"]
    assert trial == {"subject": 1, "trial": 1, "windows": 4, "cut": 0, "rebuilt": [], "ocular": 1}
    assert maps.meta["config"]["cleaning"]["ocular"] == {"method": "regression", "correlation": 0.7, "seed": 0}
