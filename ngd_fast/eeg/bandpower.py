"""Welch's power spectral density in batches on CPU or GPU, and the power within frequency bands.

Everything is computed in float64: an Emotiv channel rides on an offset of some 4000 uV, and float32 would leave 1e-3 uV
of noise in signals whose gamma band is not much larger.
"""

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from ngd_fast.config import Config
from ngd_fast.errors import UserError

DEFAULT_BANDS = {
    "delta": (0.5, 4.0),
    "theta": (4.0, 8.0),
    "alpha": (8.0, 13.0),
    "beta": (13.0, 30.0),
    "gamma": (30.0, 45.0),
}

# Samples (float64, with their segments about three times as much) that one batch may hold.
_BATCH_SAMPLES = 1 << 21


class PowerConfig(Config):
    """Which power is taken of a window.

    The feature of a band is its power in uV^2 (``absolute``) or its share of the power in all configured bands
    (``relative``); with ``log`` it is 10 log10 of that (dB). ``baseline`` sets it against the same quantity averaged
    over the windows of the trial's own baseline: ``difference`` of the features, ``ratio`` of the powers, or
    ``log_ratio``, 10 log10 of the ratio.
    """

    bands: dict[str, tuple[float, float]] = Field(DEFAULT_BANDS, min_length=1, description="name: [low, high) in Hz")
    segment_seconds: float = Field(
        1.0, gt=0, le=86_400, description="Welch segment; its inverse is the resolution in Hz"
    )
    segment_overlap: float = Field(0.5, ge=0, lt=1)
    kind: Literal["absolute", "relative"] = "absolute"
    log: bool = True
    baseline: Literal["none", "difference", "ratio", "log_ratio"] = "none"

    @model_validator(mode="after")
    def _check(self):
        for name, (low, high) in self.bands.items():
            if not 0 <= low < high:
                raise ValueError(f"band {name} must run from low to high, is [{low:g}, {high:g}]")
        return self


def split_windows(samples: int, rate: float, seconds: float, overlap: float) -> np.ndarray:
    """First samples, int64 [windows], of all whole windows of ``seconds`` in a signal of ``samples``.

    Consecutive windows share ``overlap`` (a fraction in [0, 1)) of their length; a rest at the end is left out.
    """
    length = round(seconds * rate)
    step = max(1, round(length * (1 - overlap)))
    return np.arange(0, samples - length + 1, step, dtype=np.int64)


def welch(signals, rate: float, segment: int, overlap: float = 0.5):
    """Power spectral density of signals [..., samples]: (frequencies [F] in Hz, density float64 [..., F] in unit^2/Hz).

    Segments of ``segment`` samples that share ``overlap`` of their length, mean removed, Hann window, periodograms
    averaged: ``scipy.signal.welch(signals, rate, nperseg=segment, noverlap=int(overlap * segment))`` to rounding.
    Takes arrays or tensors; returns tensors on the same device. Raises ValueError where a signal is shorter than a
    segment.
    """
    import torch

    signals = torch.as_tensor(signals)
    if not 2 <= segment <= signals.shape[-1]:
        raise ValueError(f"segment: must lie in [2, {signals.shape[-1]}] samples, is {segment}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap: must lie in [0, 1), is {overlap}")
    signals = signals.to(torch.float64)
    taper = torch.hann_window(segment, dtype=torch.float64, device=signals.device)
    pieces = signals.unfold(-1, segment, segment - int(overlap * segment))
    spectrum = torch.fft.rfft((pieces - pieces.mean(-1, keepdim=True)) * taper)
    density = (spectrum.real.square() + spectrum.imag.square()).mean(-2) / (rate * taper.square().sum())
    # One-sided: every bin but 0 Hz and the Nyquist frequency stands for its negative twin too.
    density[..., 1 : (segment + 1) // 2] *= 2
    return torch.arange(segment // 2 + 1, dtype=torch.float64, device=signals.device) * (rate / segment), density


def band_matrix(frequencies: np.ndarray, bands: dict[str, tuple[float, float]]) -> np.ndarray:
    """Integration of a density over bands as a matrix float64 [frequencies, bands] (density @ matrix = uV^2).

    The rule: a band is the sum of the bins with low <= f < high, times the bins' spacing. Bands that meet share no bin
    and leave none out, so their powers add up to the power of the whole range.
    Raises UserError for a band without any bin: the segment is too short for it.
    """
    frequencies = np.asarray(frequencies, np.float64)
    spacing = frequencies[1] - frequencies[0]
    # A bin meant to be at 4 Hz may be computed as 3.9999999999: the comparison allows for rounding.
    slack = 1e-9 * frequencies[-1]
    matrix = np.zeros((len(frequencies), len(bands)))
    for i, (name, (low, high)) in enumerate(bands.items()):
        inside = (frequencies >= low - slack) & (frequencies < high - slack)
        if not inside.any():
            raise UserError(
                f"band {name} [{low:g}, {high:g}) Hz holds no frequency: the spectrum has one every {spacing:g} Hz "
                f"up to {frequencies[-1]:g} Hz; take longer segments (power.segment_seconds) or other edges"
            )
        if high > frequencies[-1] + spacing:
            raise UserError(
                f"band {name} reaches {high:g} Hz, but the signal only {frequencies[-1]:g} Hz (half its sampling rate)"
            )
        matrix[inside, i] = spacing
    return matrix


def window_power(
    signals: np.ndarray, rate: float, starts: np.ndarray, window_seconds: float, config: PowerConfig, device="cpu"
) -> np.ndarray:
    """Band power of windows: float64 [windows, channels, bands] in uV^2.

    signals [channels, samples] in uV; starts as from :func:`split_windows`. The windows go through in batches of
    bounded memory.
    """
    import torch

    length, segment = round(window_seconds * rate), round(config.segment_seconds * rate)
    if not 2 <= segment <= length:
        raise UserError(
            f"power.segment_seconds {config.segment_seconds:g} must lie between two samples and a window of "
            f"{window_seconds:g} s"
        )
    matrix = torch.from_numpy(band_matrix(np.arange(segment // 2 + 1) * (rate / segment), config.bands)).to(device)
    result = np.empty((len(starts), len(signals), len(config.bands)))
    batch = max(1, _BATCH_SAMPLES // (length * max(1, len(signals))))
    for first in range(0, len(starts), batch):
        chosen = starts[first : first + batch]
        pieces = np.stack([signals[:, s : s + length] for s in chosen])
        _, density = welch(torch.from_numpy(pieces).to(device), rate, segment, config.segment_overlap)
        result[first : first + batch] = (density @ matrix).cpu().numpy()
    return result


def features_of_power(power: np.ndarray, baseline: np.ndarray | None, config: PowerConfig) -> np.ndarray:
    """Features [windows, channels, bands] of band power, against baseline power [channels, bands] where configured.

    Zero power under a logarithm or as a divisor gives -inf, inf or NaN: the caller excludes such windows and says so.
    """

    def share(p):
        return p / p.sum(axis=-1, keepdims=True) if config.kind == "relative" else p

    def decibel(p):
        return 10 * np.log10(p)

    with np.errstate(divide="ignore", invalid="ignore"):
        power = share(power)
        if config.baseline == "none":
            return decibel(power) if config.log else power
        if baseline is None:
            raise ValueError(f"baseline: power.baseline={config.baseline} needs the power of a baseline")
        baseline = share(baseline)
        if config.baseline == "difference":
            return decibel(power) - decibel(baseline) if config.log else power - baseline
        return power / baseline if config.baseline == "ratio" else decibel(power / baseline)
