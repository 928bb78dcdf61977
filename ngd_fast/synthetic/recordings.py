"""Made-up recordings in the files that DREAMER and MAHNOB-HCI hand out, for the demo and the tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ngd_fast.artifacts.files import atomic_path
from ngd_fast.errors import UserError
from ngd_fast.synthetic.signals import EMOTIV_CHANNELS, Subject, draw_ratings

_EMOTIV_RATE = 128
_EMOTIV_STEP = 0.5128  # uV, one unit of the headset's converter
_EMOTIV_OFFSET = 4100.0  # uV


def write_dreamer(
    path: str | Path,
    *,
    subjects: int = 23,
    clips: int = 18,
    seconds: float = 60.0,
    baseline_seconds: float = 61.0,
    seed: int = 0,
    version: str = "v5",
    noise: float = 1.0,
    with_ecg: bool = False,
) -> Path:
    """Write a ``DREAMER.mat`` with the real one's fields, types and shapes; returns its path.

    Each stimulus lasts ``seconds``. version "v5" is what scipy reads and writes, "v7.3" is HDF5 (needs h5py). Equal
    arguments give equal signals. ``noise`` scales what hides valence and arousal (1: a teacher finds them across
    subjects, but far from perfectly).
    """
    if version not in ("v5", "v7.3"):
        raise ValueError(f"version: must be 'v5' or 'v7.3', is {version!r}")
    path = Path(path)
    rng = np.random.default_rng(seed)
    valence, arousal = draw_ratings(rng, subjects, clips)
    data = [
        _dreamer_subject(rng, *ratings, seconds, baseline_seconds, noise, with_ecg) for ratings in zip(valence, arousal)
    ]
    dreamer = {
        "Data": data,
        "EEG_SamplingRate": np.array([[_EMOTIV_RATE]], np.uint8),
        "ECG_SamplingRate": np.array([[256]], np.uint16),
        "EEG_Electrodes": list(EMOTIV_CHANNELS),
        "noOfSubjects": np.array([[subjects]], np.uint8),
        "noOfVideoSequences": np.array([[clips]], np.uint8),
        "Disclaimer": "Made-up signals in DREAMER's format; no person was recorded.",
        "Provider": "ngd-fast",
        "Version": "1.0.2",
        "Acknowledgement": "The format is that of the DREAMER dataset.",
    }
    with atomic_path(path) as temporary:
        if version == "v5":
            from scipy.io import savemat

            savemat(temporary, {"DREAMER": _mat5(dreamer)}, appendmat=False, do_compression=True, oned_as="row")
        else:
            _write_mat73(temporary, "DREAMER", dreamer)
    return path


def _dreamer_subject(rng, valence, arousal, seconds, baseline_seconds, noise, with_ecg) -> dict[str, Any]:
    def emotiv(length, v, a):
        """(samples x channels), quantised, on the headset's offset with a slow drift."""
        eeg = head.record(length, _EMOTIV_RATE, v, a).T
        drift = np.cumsum(0.02 * rng.normal(size=eeg.shape), axis=0)
        return np.round((eeg + drift + offset) / _EMOTIV_STEP) * _EMOTIV_STEP

    # A felt rating in [-1, 1] becomes the number from 1 to 5 that the subject ticks; the signal follows what was felt.
    head = Subject(EMOTIV_CHANNELS, rng, noise)
    offset = _EMOTIV_OFFSET + 60 * rng.normal(size=len(EMOTIV_CHANNELS))
    subject = {
        "Age": np.array([[rng.integers(22, 34)]], np.uint8),
        "Gender": "female" if rng.random() < 0.4 else "male",
        "EEG": {
            "baseline": [emotiv(baseline_seconds, 0.0, 0.0) for _ in valence],
            "stimuli": [emotiv(seconds, v, a) for v, a in zip(valence, arousal)],
        },
    }
    if with_ecg:
        subject["ECG"] = {
            name: [2000 + 50 * rng.normal(size=(round(length * 256), 2)) for _ in valence]
            for name, length in (("baseline", baseline_seconds), ("stimuli", seconds))
        }
    for name, felt in (("Valence", valence), ("Arousal", arousal), ("Dominance", arousal)):
        subject[f"Score{name}"] = np.round(2 * felt + 3).astype(np.uint8)[:, None]
    return subject


def _mat5(value):
    """Lists become cells: DREAMER's are 1 x n of structs, n x 1 of matrices and strings."""
    if isinstance(value, Mapping):
        return {key: _mat5(item) for key, item in value.items()}
    if isinstance(value, list):
        cells = np.empty(_cell_shape(value), object)
        cells.ravel()[:] = 0
        for i, item in enumerate(value):
            cells.flat[i] = _mat5(item)
        return cells
    return value


def _cell_shape(items: Sequence) -> tuple[int, int]:
    return (len(items), 1) if isinstance(items[0], np.ndarray) else (1, len(items))


def _write_mat73(path: Path, name: str, value: Mapping[str, Any]) -> None:
    """MATLAB's v7.3 layout: an HDF5 file behind a 512-byte header, arrays transposed, cells as references."""
    try:
        import h5py
    except ImportError:
        raise UserError("writing a MATLAB v7.3 file needs h5py: pip install 'ngd-fast[eeg]'") from None

    def put(group, key, item):
        if isinstance(item, Mapping):
            child = group.create_group(key)
            child.attrs["MATLAB_class"] = np.bytes_("struct")
            for name, part in item.items():
                put(child, name, part)
            return child
        if isinstance(item, list):
            references = np.empty(_cell_shape(item)[::-1], h5py.ref_dtype)
            for i, part in enumerate(item):
                references.flat[i] = put(store, f"r{len(store)}", part).ref
            dataset = group.create_dataset(key, data=references, dtype=h5py.ref_dtype)
            dataset.attrs["MATLAB_class"] = np.bytes_("cell")
        elif isinstance(item, str):
            dataset = group.create_dataset(key, data=np.array([[ord(c)] for c in item], np.uint16))
            dataset.attrs["MATLAB_class"] = np.bytes_("char")
        else:
            dataset = group.create_dataset(key, data=item.T)
            dataset.attrs["MATLAB_class"] = np.bytes_({"float64": "double"}.get(item.dtype.name, item.dtype.name))
        return dataset

    with h5py.File(path, "w", userblock_size=512) as file:
        store = file.create_group("#refs#")
        put(file, name, value)
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, written by ngd-fast".ljust(116) + bytes(8) + b"\x00\x02IM")
