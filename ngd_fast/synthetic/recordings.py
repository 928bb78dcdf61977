"""Made-up recordings in the files that DREAMER and MAHNOB-HCI hand out, for the demo and the tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ngd_fast.artifacts.files import atomic_path, write_text
from ngd_fast.eeg.dreamer import EMOTIV_CHANNELS
from ngd_fast.errors import UserError
from ngd_fast.synthetic.signals import BIOSEMI_CHANNELS, Subject, draw_ratings

_EMOTIV_RATE = 128
_EMOTIV_STEP = 0.5128  # uV, one unit of the headset's converter
_EMOTIV_OFFSET = 4100.0  # uV

_BDF_LIMIT = 262144  # uV, the range of BioSemi's 24 bits
_OTHER_SIGNALS = (*(f"EXG{i}" for i in range(1, 9)), "GSR1", "GSR2", "Erg1", "Erg2", "Resp", "Temp")


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

    with h5py.File(path, "w", userblock_size=512, locking=False) as file:
        store = file.create_group("#refs#")
        put(file, name, value)
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, written by ngd-fast".ljust(116) + bytes(8) + b"\x00\x02IM")


def write_mahnob(
    folder: str | Path,
    *,
    subjects: int = 4,
    sessions: int = 8,
    seconds: float = 20.0,
    around_seconds: float = 30.0,
    rate: int = 256,
    unrated: float = 0.15,
    seed: int = 0,
    noise: float = 1.0,
) -> Path:
    """Write MAHNOB-HCI's ``Sessions`` into ``folder``: ID/session.xml and ID/Part_P_S_TrialK_emotion.bdf.

    Each BDF has 47 signals, among them 32 EEG channels and Status, whose first event starts the clip of ``seconds``
    and whose second ends it, with ``around_seconds`` before and after. The share ``unrated`` of the sessions has no
    ratings. ``rate`` in Hz; times are whole seconds (a BDF consists of one-second records). Returns ``folder``.
    """
    if any(s != int(s) for s in (seconds, around_seconds)):
        raise ValueError(f"seconds, around_seconds: must be whole, are {seconds} and {around_seconds}")
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    for number, felt in enumerate(zip(*draw_ratings(rng, subjects, sessions)), 1):
        head = Subject(BIOSEMI_CHANNELS, rng, noise)
        for trial, (valence, arousal) in enumerate(zip(*felt), 1):
            # Real ids are not contiguous.
            session = folder / str(130 * (number - 1) + 2 * trial)
            ratings = f'feltArsl="{round(4 * arousal + 5)}" feltVlnc="{round(4 * valence + 5)}" '
            write_text(
                session / "session.xml",
                '<?xml version="1.0" encoding="utf-8"?>\n'
                f'<session sessionId="{session.name}" isStim="1" experimentType="emotion elicitation" '
                f'{ratings if rng.random() >= unrated else ""}cutNr="{trial}" cutLenSec="{seconds:g}" '
                f'mediaFile="{trial}.avi">\n  <subject id="{number}" gender="made-up"/>\n</session>\n',
            )
            parts = [(around_seconds, 0.0, 0.0), (seconds, valence, arousal), (around_seconds, 0.0, 0.0)]
            eeg = np.concatenate([head.record(length, rate, v, a) for length, v, a in parts if length], axis=1)
            signals, status = _biosemi(rng, eeg, rate, round(around_seconds * rate), round(seconds * rate))
            path = session / f"Part_{number}_S_Trial{trial}_emotion.bdf"
            write_bdf(path, [*BIOSEMI_CHANNELS, *_OTHER_SIGNALS], signals, status, rate)
    return folder


def _biosemi(rng, eeg: np.ndarray, rate: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """All analogue signals float64 [46, samples] in uV, unreferenced as BioSemi records them, and Status [samples]."""
    samples = eeg.shape[1]
    common = 30 * np.sin(2 * np.pi * 50 * np.arange(samples) / rate) + 20 * rng.normal(size=samples)
    offset = 8000 * rng.normal(size=(len(eeg), 1))
    others = 100 * rng.normal(size=(len(_OTHER_SIGNALS), samples))
    # Bit 16 marks a new epoch, bit 20 that the electrodes' common mode is in range.
    status = np.full(samples, 1 << 20)
    status[0] |= 1 << 16
    for event in (start, start + length):
        status[event : event + rate // 8] |= 16
    return np.concatenate([eeg + common + offset, others]), status


def write_bdf(path: Path, names: Sequence[str], signals: np.ndarray, status: np.ndarray, rate: int) -> None:
    """A BDF file (BioSemi's 24-bit EDF) of signals [n, samples] in uV and Status, in records of one second."""
    count, records = len(names) + 1, signals.shape[1] // rate
    analogue = ("active electrode", "uV", -_BDF_LIMIT, _BDF_LIMIT, -(1 << 23), (1 << 23) - 1, "HP: DC; LP: 52 Hz")
    trigger = ("triggers and status", "Boolean", -(1 << 23), (1 << 23) - 1, -(1 << 23), (1 << 23) - 1, "No filtering")
    rows = [(name, *analogue, rate, "") for name in names] + [("Status", *trigger, rate, "")]

    def text(value, width: int) -> bytes:
        return str(value).ljust(width)[:width].encode("ascii")

    header = b"\xffBIOSEMI" + text("made-up subject", 80) + text("made-up recording", 80)
    header += text("01.01.09", 8) + text("12.00.00", 8) + text(256 * (count + 1), 8) + text("24BIT", 44)
    header += text(records, 8) + text(1, 8) + text(count, 4)
    for column, width in enumerate((16, 80, 8, 8, 8, 8, 8, 80, 8, 32)):
        header += b"".join(text(row[column], width) for row in rows)

    step = 2 * _BDF_LIMIT / ((1 << 24) - 1)
    digital = np.empty((count, records, rate), "<i4")
    limit = 1 << 23
    digital[:-1] = np.clip(np.rint((signals + _BDF_LIMIT) / step) - limit, -limit, limit - 1).reshape(-1, records, rate)
    digital[-1] = status.reshape(records, rate)
    # Little-endian 32-bit numbers without their highest byte are the 24 bits that BDF wants.
    content = digital.transpose(1, 0, 2).copy().view(np.uint8).reshape(records, count, rate, 4)[..., :3]
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        file.write(content.tobytes())
