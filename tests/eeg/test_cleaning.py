import numpy as np
import pytest

from ngd_fast.eeg.cleaning import CleaningConfig, clean, find_bad_channels, interpolation_weights
from ngd_fast.eeg.mahnob import CHANNELS as GENEVA
from ngd_fast.eeg.topomap import channel_positions
from ngd_fast.errors import UserError

OFF = CleaningConfig(detrend=None, band_pass=None, notch=(), resample=None, reference=None)


def tones(*frequencies, rate=256.0, seconds=8):
    time = np.arange(int(rate * seconds)) / rate
    return np.stack([np.sin(2 * np.pi * f * time) for f in frequencies])


def strength(x, edge=256):
    return np.sqrt(2 * (x[:, edge:-edge] ** 2).mean(axis=1))


def test_everything_off_changes_nothing():
    x = np.random.default_rng(0).normal(size=(3, 500)).astype(np.float32)
    out, rate, _ = clean(x, 128.0, ["a", "b", "c"], OFF)
    np.testing.assert_array_equal(out, x)
    assert rate == 128.0 and out.dtype == np.float64


def test_input_is_left_alone():
    x = 4100 + np.random.default_rng(0).normal(size=(3, 500))
    before = x.copy()
    clean(x, 128.0, ["a", "b", "c"], CleaningConfig(notch=(50,)))
    np.testing.assert_array_equal(x, before)


def test_detrend_takes_offset_and_slope():
    x = 4100 + np.arange(1000.0)[None] * [[1.0], [-2.0]]
    out, *_ = clean(x, 128.0, ["a", "b"], OFF.model_copy(update={"detrend": "linear"}))
    assert np.abs(out).max() < 1e-8
    out, *_ = clean(x, 128.0, ["a", "b"], OFF.model_copy(update={"detrend": "constant"}))
    np.testing.assert_allclose(out.mean(axis=1), 0, atol=1e-9)


def test_band_pass_keeps_its_band_in_phase_and_takes_the_rest():
    x = tones(10, 1, 60)
    out, *_ = clean(x, 256.0, ["a", "b", "c"], OFF.model_copy(update={"band_pass": (4.0, 30.0)}))
    np.testing.assert_allclose(strength(out), [1, 0, 0], atol=0.01)
    np.testing.assert_allclose(out[0, 256:-256], x[0, 256:-256], atol=0.01)


@pytest.mark.parametrize(("edges", "kept"), [((4.0, None), [0, 1]), ((None, 4.0), [1, 0])])
def test_one_sided_band_pass(edges, kept):
    out, *_ = clean(tones(1, 20), 256.0, ["a", "b"], OFF.model_copy(update={"band_pass": edges}))
    np.testing.assert_allclose(strength(out), kept, atol=0.02)


def test_notch_takes_mains_and_leaves_its_neighbours():
    out, *_ = clean(tones(50, 40, 100), 256.0, ["a", "b", "c"], OFF.model_copy(update={"notch": (50.0, 100.0)}))
    np.testing.assert_allclose(strength(out), [0, 1, 0], atol=0.02)


@pytest.mark.parametrize("target", [128.0, 200.0, 512.0])
def test_resampling_keeps_tones_and_filters_what_would_fold_back(target):
    out, rate, _ = clean(tones(10, 122), 256.0, ["a", "b"], OFF.model_copy(update={"resample": target}))
    assert rate == target and out.shape[1] == pytest.approx(8 * target, abs=1)
    assert strength(out)[0] == pytest.approx(1, abs=0.01)
    if target < 244:
        assert strength(out)[1] < 0.03
    expected = np.sin(2 * np.pi * 10 * np.arange(out.shape[1]) / target)
    np.testing.assert_allclose(out[0, 200:-200], expected[200:-200], atol=0.01)


def test_references():
    x = np.random.default_rng(0).normal(size=(3, 100))
    average, *_ = clean(x, 128.0, ["Cz", "A1", "A2"], OFF.model_copy(update={"reference": "average"}))
    np.testing.assert_allclose(average, x - x.mean(axis=0))
    ears, *_ = clean(x, 128.0, ["Cz", "A1", "A2"], OFF.model_copy(update={"reference": ("a1", "A2")}))
    np.testing.assert_allclose(ears[0], x[0] - (x[1] + x[2]) / 2)


def test_short_signals_are_filtered_too():
    out, *_ = clean(tones(10, rate=128.0, seconds=1), 128.0, ["a"], CleaningConfig(reference=None))
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"band_pass": (0.3, 64.0)}, "band_pass 64 Hz is not below half the sampling rate of 128 Hz"),
        ({"notch": (100.0,)}, "notch 100 Hz"),
        ({"reference": ("TP9",)}, "no channel TP9; there are a, b"),
    ],
)
def test_settings_that_do_not_fit_the_recording(changes, message):
    with pytest.raises(UserError, match=message):
        clean(np.zeros((2, 500)), 128.0, ["a", "b"], OFF.model_copy(update=changes))


@pytest.mark.parametrize(
    "changes",
    [
        *({"band_pass": (None, None)}, {"band_pass": (30, 4)}, {"band_pass": (0, 4)}, {"notch": (-50,)}),
        *({"resample": 0}, {"resample": 0.01}, {"reference": ()}, {"reference": ("Cz",)}, {"reference": ("Cz", "CZ")}),
    ],
)
def test_settings_that_are_never_right(changes):
    with pytest.raises(ValueError):
        CleaningConfig(**changes)


def test_bad_channels_are_found():
    x = np.random.default_rng(0).normal(size=(6, 100))
    x[1] = 4100.0
    x[2, 50] = np.nan
    x[3, 0] = np.inf
    x[4] = np.nan
    assert find_bad_channels(x).tolist() == [False, True, True, True, True, False]


def test_interpolation_of_channels_equals_mne():
    mne = pytest.importorskip("mne")
    centre = np.array([0.0, 0.0, 0.04])
    builtin = mne.channels.get_builtin_montages()
    known = mne.channels.make_standard_montage("colin27_1020" if "colin27_1020" in builtin else "standard_1020")
    info = mne.create_info(list(GENEVA), 128.0, "eeg", verbose="error").set_montage(known, match_case=False)
    x = np.random.default_rng(0).normal(scale=1e-5, size=(32, 64))
    raw = mne.io.RawArray(x, info, verbose="error")
    raw.info["bads"] = ["Cz", "O2", "F7"]
    bad = np.array([c in raw.info["bads"] for c in GENEVA])
    raw.interpolate_bads(origin=centre, method={"eeg": "spline"}, verbose="error")
    weights = interpolation_weights(channel_positions(GENEVA) - centre, bad)
    np.testing.assert_allclose(weights @ x[~bad], raw.get_data()[bad], rtol=1e-6, atol=1e-12)
