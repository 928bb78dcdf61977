"""DREAMER (Katsigiannis and Ramzan, 2018): 23 subjects x 18 clips, 14 Emotiv channels at 128 Hz, ratings 1 to 5."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import sha256
from ngd_fast.eeg.trials import Exclusions, Trial, TrialSource, scale_rating
from ngd_fast.errors import UserError

RATING_RANGE = (1, 5)


def open_dreamer(path: str | Path) -> TrialSource:
    """The trials of a ``DREAMER.mat`` as MATLAB saves it: v5 and v7 (read whole by scipy), or v7.3 (HDF5, read trial
    by trial). Subjects and trials count from 1. A subject may have fewer clips than others.

    Raises UserError for a file that is missing, damaged, no MATLAB file or not DREAMER; a trial whose fields cannot
    be used is left out and counted.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file (wanted DREAMER.mat)")
    try:
        with open(path, "rb") as file:
            head = file.read(520)
        root = _open_hdf5(path) if b"\x89HDF\r\n\x1a\n" in head[:8] + head[512:] else _open_mat5(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if root is None:
        raise UserError(f"{path}: not DREAMER: holds no variable named DREAMER")
    rates = _numbers(root.field("EEG_SamplingRate", path))
    if rates.size != 1 or not 0 < rates[0] < 100_000:
        raise UserError(f"{path}: DREAMER.EEG_SamplingRate must be one sampling rate in Hz, is {rates.tolist()}")
    rate = float(rates[0])
    channels = tuple(root.field("EEG_Electrodes", path).strings())
    subjects = root.field("Data", path).cells()
    if not channels or not subjects:
        raise UserError(f"{path}: DREAMER holds {len(channels)} electrodes and {len(subjects)} subjects")
    counts = [len(s.field("EEG", path).field("stimuli", path).cells()) for s in subjects]
    subjects.reverse()

    def trials(exclusions: Exclusions) -> Iterator[Trial]:
        # Each subject is let go once it is done: scipy has the whole file in memory, 2 GB of it for the real one.
        for number in range(1, len(subjects) + 1):
            subject = subjects.pop()
            if counts[number - 1] < max(counts):
                exclusions.add(
                    "clips that a subject lacks",
                    f"{path}: subject {number} has {counts[number - 1]} of {max(counts)} clips",
                    max(counts) - counts[number - 1],
                )
            yield from _subject_trials(path, number, subject, len(channels), rate, exclusions)

    meta = {"dataset": "DREAMER", "files": {path.name: sha256(path)}, "sampling_rate": rate}
    return TrialSource("dreamer", channels, sum(counts), trials, meta)


def _subject_trials(path, number, subject, channels, rate, exclusions) -> Iterator[Trial]:
    eeg = subject.field("EEG", path)
    stimuli, baselines = eeg.field("stimuli", path).cells(), eeg.field("baseline", path).cells()
    valence, arousal = (_numbers(subject.field(f"Score{name}", path)) for name in ("Valence", "Arousal"))
    for i, stimulus in enumerate(stimuli):
        where = f"{path.name}: subject {number}, clip {i + 1}"
        if i >= min(len(valence), len(arousal)):
            exclusions.add("trials without ratings", f"{where} has no rating")
            continue
        try:
            ratings = [scale_rating(score[i], *RATING_RANGE, where) for score in (valence, arousal)]
            samples = _samples(stimulus, channels, f"{where}, stimulus")
            baseline = _samples(baselines[i], channels, f"{where}, baseline") if i < len(baselines) else None
        except UserError as error:
            exclusions.add("unusable trials", str(error))
            continue
        yield Trial(number, i + 1, samples, baseline, rate, *ratings, where)


def _samples(node, channels: int, where: str) -> np.ndarray:
    """float64 [channels, samples] of a (samples x channels) matrix."""
    matrix = node.array()
    if matrix.ndim != 2 or matrix.shape[1] != channels or matrix.dtype.kind not in "fiu":
        raise UserError(f"{where}: must be a matrix of samples x {channels} channels, has shape {matrix.shape}")
    return np.ascontiguousarray(matrix.T, np.float64)


def _numbers(node) -> np.ndarray:
    """The node's numbers as they are, in one row."""
    values = node.array()
    if values.dtype.kind not in "fiu":
        raise UserError(f"{node.name}: must hold numbers")
    return values.ravel()


def _open_mat5(path: Path):
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["DREAMER"])
    except (
        Exception
    ) as error:  # a damaged file provokes anything inside the reader: zlib.error, IndexError, MemoryError
        detail = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: not a readable MATLAB file ({detail}); is it truncated?") from None
    return _Mat5Node(content["DREAMER"], "DREAMER") if "DREAMER" in content else None


class _Mat5Node:
    """A value as scipy.io.loadmat returns it: structs are [1, 1] record arrays, cells object arrays."""

    def __init__(self, value: np.ndarray, name: str):
        self.value, self.name = value, name

    def field(self, name: str, path: Path) -> "_Mat5Node":
        if self.value.dtype.names is None or name not in self.value.dtype.names or not self.value.size:
            raise UserError(f"{path}: not DREAMER: {self.name} has no field {name}")
        return _Mat5Node(self.value.ravel()[0][name], f"{self.name}.{name}")

    def cells(self) -> list["_Mat5Node"]:
        if self.value.dtype != object:
            return [self] if self.value.size else []
        return [_Mat5Node(v, f"{self.name}{{{i}}}") for i, v in enumerate(self.value.ravel(), 1)]

    def array(self) -> np.ndarray:
        return self.value

    def strings(self) -> list[str]:
        return [str(cell.value.ravel()[0]) if cell.value.size else "" for cell in self.cells()]


def _open_hdf5(path: Path):
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: MATLAB v7.3 files need h5py: pip install 'ngd-fast[eeg]'") from None
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: damaged MATLAB v7.3 file ({error})") from None
    return _Mat73Node(file["DREAMER"], "DREAMER") if "DREAMER" in file else None


class _Mat73Node:
    """A value in a MATLAB v7.3 file: structs are groups, cells datasets of references, matrices stored transposed."""

    def __init__(self, value, name: str):
        self.value, self.name = value, name

    def field(self, name: str, path: Path) -> "_Mat73Node":
        if not hasattr(self.value, "keys") or name not in self.value:
            raise UserError(f"{path}: not DREAMER: {self.name} has no field {name}")
        return _Mat73Node(self.value[name], f"{self.name}.{name}")

    def cells(self) -> list["_Mat73Node"]:
        if hasattr(self.value, "keys") or self.value.dtype.kind != "O":
            return [self]
        references = self.value[()].ravel()
        return [_Mat73Node(self.value.file[r], f"{self.name}{{{i}}}") for i, r in enumerate(references, 1)]

    def array(self) -> np.ndarray:
        try:
            return self.value[()].T
        except (OSError, AttributeError, TypeError) as error:  # a damaged chunk; a group where a matrix belongs
            raise UserError(f"{self.name}: cannot be read ({error})") from None

    def strings(self) -> list[str]:
        return ["".join(chr(int(c)) for c in _numbers(cell)) for cell in self.cells()]
