import numpy as np
import pytest
import torch
from scipy import signal

from ngd_fast.eeg.bandpower import (
    DEFAULT_BANDS,
    PowerConfig,
    band_matrix,
    features_of_power,
    split_windows,
    welch,
    window_power,
)
from ngd_fast.errors import UserError


@pytest.mark.parametrize("rate", [128.0, 250.0, 511.5])
@pytest.mark.parametrize(("segment", "overlap"), [(128, 0.5), (127, 0.5), (64, 0.0), (100, 0.75), (2, 0.0)])
def test_welch_equals_scipy(rate, segment, overlap):
    # A white signal on the headset's offset of 4100 uV, which float32 arithmetic would drown in rounding.
    x = 4100 + np.random.default_rng(0).normal(scale=5, size=(3, 2, 300))
    frequencies, density = welch(x, rate, segment, overlap)
    expected_f, expected = signal.welch(x, rate, "hann", nperseg=segment, noverlap=int(overlap * segment))
    np.testing.assert_allclose(frequencies, expected_f, rtol=1e-12)
    np.testing.assert_allclose(density, expected, rtol=1e-6, atol=1e-12)


def test_welch_of_float32_is_computed_in_float64():
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    expected = signal.welch(x.double().numpy(), 128, nperseg=128)[1]
    np.testing.assert_allclose(welch(x, 128.0, 128)[1], expected, rtol=1e-9)


@pytest.mark.parametrize(("segment", "overlap"), [(301, 0.5), (1, 0.5), (64, 1.0)])
def test_welch_refuses_what_it_cannot_do(segment, overlap):
    with pytest.raises(ValueError, match=r"segment|overlap"):
        welch(np.zeros((2, 300)), 128.0, segment, overlap)


@pytest.mark.parametrize("segment", [128, 256, 200, 64])
def test_no_bin_is_lost_or_counted_twice(segment):
    frequencies = np.arange(segment // 2 + 1) * (128 / segment)
    matrix = band_matrix(frequencies, DEFAULT_BANDS)
    spacing = 128 / segment
    inside = (frequencies >= 0.5) & (frequencies < 45)
    np.testing.assert_allclose(matrix.sum(axis=1), inside * spacing)
    assert ((matrix > 0).sum(axis=1) <= 1).all()


@pytest.mark.parametrize(
    ("frequency", "band"), [(3.9, "delta"), (4.0, "theta"), (8.0, "alpha"), (13.0, "beta"), (30.0, "gamma")]
)
def test_a_bin_on_an_edge_belongs_to_the_band_above(frequency, band):
    frequencies = np.arange(0, 64, 0.1)
    row = band_matrix(frequencies, DEFAULT_BANDS)[np.argmin(np.abs(frequencies - frequency))]
    assert list(DEFAULT_BANDS)[int(np.argmax(row))] == band and (row > 0).sum() == 1


def test_band_power_of_a_sine_is_half_its_amplitude_squared():
    time = np.arange(128 * 8) / 128
    x = np.stack([6 * np.sin(2 * np.pi * 10 * time), 2 * np.sin(2 * np.pi * 20 * time)])
    power = window_power(x, 128.0, split_windows(x.shape[1], 128.0, 2.0, 0.0), 2.0, PowerConfig())
    assert power.shape == (4, 2, 5)
    np.testing.assert_allclose(power[:, 0, 2], 18, rtol=1e-6)
    np.testing.assert_allclose(power[:, 1, 3], 2, rtol=1e-6)
    assert power[:, 0, [0, 4]].max() < 1e-6


def test_window_power_equals_scipy_window_by_window(monkeypatch):
    x = 4100 + np.random.default_rng(1).normal(scale=20, size=(3, 1000))
    config = PowerConfig(segment_seconds=1.0)
    starts = split_windows(1000, 128.0, 2.0, 0.5)
    power = window_power(x, 128.0, starts, 2.0, config)
    for i, start in enumerate(starts):
        f, density = signal.welch(x[:, start : start + 256], 128, nperseg=128)
        for j, (low, high) in enumerate(config.bands.values()):
            expected = density[:, (f >= low) & (f < high)].sum(axis=1) * (f[1] - f[0])
            np.testing.assert_allclose(power[i, :, j], expected, rtol=1e-6)
    # Batches of one window give the same bits.
    monkeypatch.setattr("ngd_fast.eeg.bandpower._BATCH_SAMPLES", 1)
    np.testing.assert_array_equal(window_power(x, 128.0, starts, 2.0, config), power)


@pytest.mark.parametrize(
    ("samples", "seconds", "overlap", "expected"),
    [
        (1000, 2.0, 0.0, [0, 256, 512]),
        (1024, 2.0, 0.5, [0, 128, 256, 384, 512, 640, 768]),
        (256, 2.0, 0.9, [0]),
        (255, 2.0, 0.0, []),
    ],
)
def test_windows_are_whole_and_none_is_missed(samples, seconds, overlap, expected):
    assert split_windows(samples, 128.0, seconds, overlap).tolist() == expected


def test_a_band_without_bins_or_beyond_the_spectrum_is_said():
    with pytest.raises(UserError, match=r"band slow \[0.1, 0.9\) Hz holds no frequency: .* every 1 Hz"):
        band_matrix(np.arange(65.0), {"slow": (0.1, 0.9)})
    with pytest.raises(UserError, match="band fast reaches 100 Hz"):
        band_matrix(np.arange(65.0), {"fast": (30, 100)})
    for seconds in (2, 0.01):
        with pytest.raises(UserError, match=f"segment_seconds {seconds} must lie between two samples and a window"):
            window_power(np.zeros((2, 300)), 128.0, np.array([0]), 1.0, PowerConfig(segment_seconds=seconds))


def test_features_and_baselines_do_what_their_names_say():
    rng = np.random.default_rng(0)
    power, baseline = rng.uniform(1, 9, (4, 3, 5)), rng.uniform(1, 9, (3, 5))

    def feature(**changes):
        return features_of_power(power, baseline, PowerConfig(**changes))

    share, base_share = power / power.sum(-1, keepdims=True), baseline / baseline.sum(-1, keepdims=True)
    np.testing.assert_allclose(feature(log=False), power)
    np.testing.assert_allclose(feature(), 10 * np.log10(power))
    np.testing.assert_allclose(feature(kind="relative", log=False).sum(-1), 1)
    np.testing.assert_allclose(feature(log=False, baseline="difference"), power - baseline)
    np.testing.assert_allclose(feature(baseline="ratio"), power / baseline)
    np.testing.assert_allclose(feature(baseline="log_ratio"), 10 * np.log10(power / baseline))
    np.testing.assert_allclose(feature(baseline="difference"), feature(baseline="log_ratio"))
    np.testing.assert_allclose(feature(kind="relative", baseline="ratio"), share / base_share)
    with pytest.raises(ValueError, match="baseline"):
        features_of_power(power, None, PowerConfig(baseline="ratio"))


@pytest.mark.parametrize("bands", [{}, {"a": (8, 8)}, {"a": (-1, 4)}, {"a": (13, 8)}])
def test_bands_that_are_none_are_refused(bands):
    with pytest.raises(ValueError, match="band"):
        PowerConfig(bands=bands)


@pytest.mark.gpu
def test_gpu_gives_the_same_power():
    x = 4100 + np.random.default_rng(1).normal(scale=20, size=(14, 4000))
    starts = split_windows(4000, 128.0, 2.0, 0.0)
    cpu, gpu = (window_power(x, 128.0, starts, 2.0, PowerConfig(), device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu, cpu, rtol=1e-9)
