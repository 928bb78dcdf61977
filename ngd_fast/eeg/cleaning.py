"""Cleaning of whole trials, before they are cut into windows: detrend, filter, resample, re-reference, bad channels."""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from ngd_fast.config import Config
from ngd_fast.eeg.ocular import OcularConfig, remove_ocular
from ngd_fast.errors import UserError


class CleaningConfig(Config):
    """Every step can be switched off with null. They run in the order in which they stand here."""

    detrend: Literal["constant", "linear"] | None = "constant"
    band_pass: tuple[float | None, float | None] | None = Field(
        (0.3, 48.0), description="Hz; null for one edge makes it a high-pass or a low-pass"
    )
    notch: tuple[float, ...] = Field((), description="mains frequency and harmonics in Hz, for example [50]")
    filter_order: int = Field(4, ge=1, le=10, description="Butterworth order; run forwards and backwards, so no delay")
    resample: float | None = Field(None, ge=10, le=20_000, description="Hz")
    ocular: OcularConfig = Field(OcularConfig(), description="blinks and eye movements; off unless it has a method")
    reference: Literal["average"] | tuple[str, ...] | None = Field(
        "average", description="average of all channels, or of the channels named here, at least two"
    )

    @model_validator(mode="after")
    def _check(self):
        if self.band_pass is not None:
            low, high = self.band_pass
            if low is None and high is None:
                raise ValueError("band_pass needs at least one edge; write null to switch it off")
            if (low is not None and low <= 0) or (high is not None and high <= (low or 0)):
                raise ValueError("band_pass must be [low, high] with 0 < low < high")
        # One channel alone would become flat: it has no logarithm, and nothing to draw.
        if isinstance(self.reference, tuple) and len({name.lower() for name in self.reference}) < 2:
            raise ValueError("reference must name at least two channels, or be average or null")
        if any(f <= 0 for f in self.notch):
            raise ValueError("notch frequencies must be positive")
        return self


def find_bad_channels(signals: np.ndarray, flat_below: float = 1e-3) -> np.ndarray:
    """bool [channels]: signals [channels, samples] with a NaN or infinity, or that span less than ``flat_below`` uV."""
    span = np.ptp(signals, axis=1)  # NaN where any sample is
    return ~(span >= flat_below) | ~np.isfinite(span)


def clean(
    signals: np.ndarray,
    rate: float,
    channels: Sequence[str],
    config: CleaningConfig,
    *,
    eog: np.ndarray | None = None,
    where: str = "signals",
) -> tuple[np.ndarray, float, int]:
    """Cleaned signals float64 [channels, samples] (uV), their sampling rate, and how much of the eyes was taken out.

    Filters run over the whole signal, forwards and backwards; short signals are padded by reflection.
    Raises UserError for an edge above half the sampling rate or a reference channel that is not there.
    """
    from scipy import signal

    with_eog = config.ocular.method is not None and eog is not None
    out = np.vstack([signals, eog]).astype(np.float64) if with_eog else np.array(signals, np.float64)
    if config.detrend is not None:
        out = signal.detrend(out, type=config.detrend, overwrite_data=True)
    if config.band_pass is not None:
        out = _zero_phase(_band_pass(rate, config.band_pass, config.filter_order), out, rate)
    for frequency in config.notch:
        _check_edge("notch", frequency, rate)
        out = _zero_phase(signal.tf2sos(*signal.iirnotch(frequency, Q=30, fs=rate)), out, rate)
    if config.resample is not None and config.resample != rate:
        ratio = Fraction(config.resample / rate).limit_denominator(1000)
        out = signal.resample_poly(out, ratio.numerator, ratio.denominator, axis=1, padtype="line")
        rate = float(rate * ratio)
    removed = 0
    if config.ocular.method is not None:
        eyes = out[len(channels) :] if with_eog else None
        out, removed = remove_ocular(out[: len(channels)], eyes, rate, channels, config.ocular, where)
    if config.reference is not None:
        rows = slice(None) if config.reference == "average" else _reference_rows(channels, config.reference)
        out -= out[rows].mean(axis=0)
    return out, rate, removed


@lru_cache
def _band_pass(rate: float, edges: tuple[float | None, float | None], order: int) -> np.ndarray:
    from scipy import signal

    low, high = edges
    for edge in (low, high):
        if edge is not None:
            _check_edge("band_pass", edge, rate)
    if low is None:
        return signal.butter(order, high, "lowpass", fs=rate, output="sos")
    if high is None:
        return signal.butter(order, low, "highpass", fs=rate, output="sos")
    return signal.butter(order, (low, high), "bandpass", fs=rate, output="sos")


def _check_edge(name: str, frequency: float, rate: float) -> None:
    if frequency >= rate / 2:
        raise UserError(f"cleaning.{name} {frequency:g} Hz is not below half the sampling rate of {rate:g} Hz")


def _zero_phase(sos: np.ndarray, signals: np.ndarray, rate: float) -> np.ndarray:
    from scipy import signal

    # Three seconds of reflected signal at both ends (scipy's own padding suits no edge as low as 0.3 Hz).
    return signal.sosfiltfilt(sos, signals, axis=1, padlen=min(round(3 * rate), signals.shape[1] - 1))


def _reference_rows(channels: Sequence[str], reference: Sequence[str]) -> list[int]:
    index = {name.lower(): i for i, name in enumerate(channels)}
    missing = [name for name in reference if name.lower() not in index]
    if missing:
        raise UserError(f"cleaning.reference: no channel {', '.join(missing)}; there are {', '.join(channels)}")
    return [index[name.lower()] for name in reference]


def interpolation_weights(positions: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Weights [bad, good] that rebuild bad channels from good ones by spherical splines (Perrin et al., 1989).

    positions float [channels, 3] in metres about the centre of the head, bad bool [channels]. The same splines (order
    4, 50 Legendre terms, ridge 1e-5) as MNE's ``interpolate_bads``.
    """
    unit = positions / np.linalg.norm(positions, axis=1, keepdims=True)
    good, wanted = unit[~bad], unit[bad]
    count = len(good)
    system = np.ones((count + 1, count + 1))
    system[-1, -1] = 0.0
    system[:count, :count] = _spline(good @ good.T) + 1e-5 * np.eye(count)
    right = np.hstack([_spline(wanted @ good.T), np.ones((len(wanted), 1))])
    return right @ np.linalg.pinv(system)[:, :count]


def _spline(cosine: np.ndarray) -> np.ndarray:
    n = np.arange(1, 51)
    factors = (2 * n + 1) / ((n * (n + 1.0)) ** 4 * 4 * np.pi)
    return np.polynomial.legendre.legval(cosine, np.concatenate([[0.0], factors]))
