"""DREAMER (Katsigiannis and Ramzan, 2018): 23 subjects x 18 clips, 14 Emotiv channels at 128 Hz, ratings 1 to 5."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import sha256
from ngd_fast.artifacts.headers import require_proportion
from ngd_fast.eeg.mat5 import Mat5Reader
from ngd_fast.eeg.trials import Exclusions, Trial, TrialSource, scale_rating
from ngd_fast.errors import UserError, first_line

EMOTIV_CHANNELS = ("AF3", "F7", "F3", "FC5", "T7", "P7", "O1", "O2", "P8", "T8", "FC6", "F4", "F8", "AF4")
RATING_RANGE = (1, 5)
_DREAMERS_OWN = {"EEG_SamplingRate": 128.0, "EEG_Electrodes": list(EMOTIV_CHANNELS)}
_UNUSED = frozenset(("ECG", "Age", "Gender"))


def open_dreamer(path: str | Path) -> TrialSource:
    """The trials of a ``DREAMER.mat`` as MATLAB saves it: v5 and v7, read subject by subject from front to back, or
    v7.3 (HDF5), read trial by trial. Subjects and trials count from 1. A subject may have fewer clips than others.

    Raises UserError for a file that is missing, damaged, no MATLAB file or not DREAMER; a trial whose fields cannot
    be used is left out and counted. What is damaged behind the first subject of a v5 file shows when it is read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file (wanted DREAMER.mat)")
    try:
        with open(path, "rb") as file:
            head = file.read(520)
        subjects, total, about = (_open_hdf5 if b"\x89HDF\r\n\x1a\n" in head[:8] + head[512:] else _open_mat5)(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    channels, rate = about["EEG_Electrodes"], about["EEG_SamplingRate"]
    first = next(subjects, None)
    if not all(name.isprintable() for name in channels):
        raise UserError(f"{path}: DREAMER.EEG_Electrodes holds a name that cannot be printed")
    if not channels or first is None:
        raise UserError(f"{path}: DREAMER holds {len(channels)} electrodes and {total} subjects")
    clips = len(first.field("EEG", path).field("stimuli", path).cells())

    def trials(exclusions: Exclusions) -> Iterator[Trial]:
        counts = []
        for number, subject in enumerate(chain([first], subjects), 1):
            counts.append(len(subject.field("EEG", path).field("stimuli", path).cells()))
            yield from _subject_trials(path, number, subject, len(channels), rate, source.with_baseline, exclusions)
        for number, count in enumerate(counts, 1):
            if count < max(counts):
                exclusions.add(
                    "clips that a subject lacks",
                    f"{path}: subject {number} has {count} of {max(counts)} clips",
                    max(counts) - count,
                )

    meta = {"dataset": "DREAMER", "files": {path.name: sha256(path)}, "sampling_rate": rate}
    source = TrialSource("dreamer", tuple(channels), clips * total, trials, meta)
    return source


def _subject_trials(path, number, subject, channels, rate, with_baseline, exclusions) -> Iterator[Trial]:
    eeg = subject.field("EEG", path)
    stimuli = eeg.field("stimuli", path).cells()
    baselines = eeg.field("baseline", path).cells() if with_baseline else []
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


def _rate(node, path: Path) -> float:
    rates = _numbers(node)
    if rates.size != 1 or not 0 < rates[0] < 100_000:
        raise UserError(f"{path}: DREAMER.EEG_SamplingRate must be one sampling rate in Hz, is {rates.tolist()}")
    return float(rates[0])


def _open_mat5(path: Path):
    """(subjects one by one, their number, {EEG_SamplingRate, EEG_Electrodes}).

    The owners' file names rate and electrodes behind the data. They are then taken to be the headset's, which is
    checked when they are reached.
    """
    reader = Mat5Reader(path, "DREAMER")
    names, fields = reader.fields()
    for name in ("EEG_SamplingRate", "EEG_Electrodes", "Data"):
        if name not in names:
            raise UserError(f"{path}: not DREAMER: DREAMER has no field {name}")
    about = {}

    def read_about(name: str) -> None:
        if name in _DREAMERS_OWN:
            node = _Mat5Node(reader.value(), f"DREAMER.{name}")
            about[name] = _rate(node, path) if name == "EEG_SamplingRate" else node.strings()

    for name in fields:
        if name == "Data":
            break
        read_about(name)
    total, cells = reader.cells()
    taken = {**_DREAMERS_OWN, **about}

    def subjects() -> Iterator[_Mat5Node]:
        for i in cells:
            yield _Mat5Node(reader.value(skip=_UNUSED), f"DREAMER.Data{{{i + 1}}}")
        for name in fields:
            read_about(name)
        reader.finish()
        reader.close()
        for name, value in about.items():
            if value != taken[name]:
                raise UserError(
                    f"{path}: its {name} is {value}, DREAMER's {taken[name]}; save it with -v7.3 to have that used"
                )

    return subjects(), total, taken


class _Mat5Node:
    """A value as Mat5Reader returns it: structs are dicts, cells lists, text str."""

    def __init__(self, value, name: str):
        self.value, self.name = value, name

    def field(self, name: str, path: Path) -> "_Mat5Node":
        if not isinstance(self.value, dict) or name not in self.value:
            raise UserError(f"{path}: not DREAMER: {self.name} has no field {name}")
        return _Mat5Node(self.value[name], f"{self.name}.{name}")

    def cells(self) -> list["_Mat5Node"]:
        if not isinstance(self.value, list):
            return [self] if np.size(self.value) else []
        return [_Mat5Node(v, f"{self.name}{{{i}}}") for i, v in enumerate(self.value, 1)]

    def array(self) -> np.ndarray:
        return np.asarray(self.value)

    def strings(self) -> list[str]:
        return [str(cell.value) for cell in self.cells()]


def _open_hdf5(path: Path):
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: MATLAB v7.3 files need h5py: pip install 'ngd-fast[eeg]'") from None
    try:
        file = h5py.File(path, "r")
        known = "DREAMER" in file
    except Exception as error:  # a damaged file provokes OSError, KeyError, RuntimeError, ValueError
        raise UserError(f"{path}: damaged MATLAB v7.3 file ({first_line(error)})") from None
    if not known:
        raise UserError(f"{path}: not DREAMER: holds no variable named DREAMER")
    root = _Mat73Node(file, "/").field("DREAMER", path)
    rate = _rate(root.field("EEG_SamplingRate", path), path)
    channels, subjects = root.field("EEG_Electrodes", path).strings(), root.field("Data", path).cells()
    return iter(subjects), len(subjects), {"EEG_SamplingRate": rate, "EEG_Electrodes": channels}


class _Mat73Node:
    """A value in a MATLAB v7.3 file: structs are groups, cells datasets of references, matrices stored transposed."""

    def __init__(self, value, name: str):
        self.value, self.name = value, name

    def field(self, name: str, path: Path) -> "_Mat73Node":
        import h5py

        link = self._read(self.value.get, name, None, False, True) if hasattr(self.value, "keys") else None
        if not isinstance(link, h5py.HardLink):  # others may lead into other files
            raise UserError(f"{path}: not DREAMER: {self.name} has no field {name}")
        return _Mat73Node(self._read(self.value.__getitem__, name), f"{self.name}.{name}".removeprefix("/."))

    def _read(self, function, *arguments):
        try:
            return function(*arguments)
        except Exception as error:  # as above; MemoryError too
            raise UserError(f"{self.name}: cannot be read ({first_line(error)})") from None

    def cells(self) -> list["_Mat73Node"]:
        import h5py

        if hasattr(self.value, "keys") or self._read(h5py.check_ref_dtype, self.value.dtype) is not h5py.Reference:
            return [self]
        nodes = []
        for i, reference in enumerate(self._content().ravel(), 1):
            name = f"{self.name}{{{i}}}"
            nodes.append(_Mat73Node(self._read(self.value.file.__getitem__, reference), name))
        return nodes

    def array(self) -> np.ndarray:
        return self._content().T

    def _content(self) -> np.ndarray:
        import h5py

        data = self.value
        if not isinstance(data, h5py.Dataset) or self._read(lambda: data.is_virtual or data.external):
            raise UserError(f"{self.name}: cannot be read (no matrix of this file)")
        try:
            require_proportion(data.file.filename, data.size * data.dtype.itemsize if data.size else 0)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        return self._read(data.__getitem__, ())

    def strings(self) -> list[str]:
        return [self._read(lambda c: "".join(map(chr, _numbers(c).astype(int))), cell)[:100] for cell in self.cells()]
