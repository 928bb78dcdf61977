"""What became of each trial, kept in the file of topomaps for its quality page (:mod:`ngd_fast.eeg.report`)."""

from typing import Any

import numpy as np

_SECONDS = 30  # of a trial that its spectrum is taken from
_HIGHEST = 64  # Hz


def mean_spectrum(signals: np.ndarray, rate: float) -> np.ndarray:
    """Density in uV^2/Hz at 0, 1, 2, ... Hz, mean over channels: of the first 30 s at most of signals [c, samples]."""
    length = round(rate)
    count = max(1, min(_SECONDS, signals.shape[1] // length))
    pieces = signals[:, : count * length].reshape(len(signals), count, -1)
    taper = np.hanning(pieces.shape[2] + 1)[:-1]
    spectrum = np.fft.rfft((pieces - pieces.mean(axis=2, keepdims=True)) * taper)[..., : _HIGHEST + 1]
    return 2 * (spectrum.real**2 + spectrum.imag**2).mean(axis=(0, 1)) / (rate * np.square(taper).sum())


class Quality:
    """Collects trials; :meth:`meta` is what the file keeps of them."""

    def __init__(self):
        self._trials: list[dict[str, Any]] = []
        self._spectra: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(
        self, trial, *, windows: int, cut: int, rebuilt, ocular: int, before: np.ndarray, after: np.ndarray
    ) -> None:
        """``rebuilt``: names of channels; ``ocular``: components taken out; spectra as of :func:`mean_spectrum`."""
        self._trials.append(
            {
                "subject": trial.subject,
                "trial": trial.trial,
                "windows": windows,
                "cut": cut,
                "rebuilt": list(rebuilt),
                "ocular": ocular,
            }
        )
        self._spectra.setdefault(trial.subject, []).append((before, after))

    def meta(self) -> dict[str, Any]:
        spectra = {}
        for subject, pairs in sorted(self._spectra.items()):
            bins = min(len(one) for pair in pairs for one in pair)
            mean = [np.mean([pair[side][:bins] for pair in pairs], axis=0) for side in (0, 1)]
            with np.errstate(divide="ignore"):
                spectra[str(subject)] = [np.round(10 * np.log10(np.maximum(m, 1e-12)), 2).tolist() for m in mean]
        return {"trials": sorted(self._trials, key=lambda t: (t["subject"], t["trial"])), "spectra_db": spectra}
