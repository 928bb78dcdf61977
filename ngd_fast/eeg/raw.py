"""One recording opened by MNE: its electrodes, events and spans marked as bad; samples only when they are asked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ngd_fast.console import say
from ngd_fast.eeg.channels import find_channels, import_mne
from ngd_fast.eeg.columns import number_column, read_table, require_column
from ngd_fast.errors import UserError

MONTAGE = "standard_1005"  # of files without positions
_EPOCHS = ("-epo.fif", "_epo.fif", "-epo.fif.gz", "_epo.fif.gz")
_CHUNK = 1 << 20  # samples of a stim channel that are read at once
# uV by which one sample of EEG differs from the next. Drift and offsets, which may be a thousand times larger, do not
# show in it; numbers whose unit is wrong by a thousand or more do.
_STEP, _SMALLEST_STEP, _LARGEST_STEP = 3.0, 3e-3, 1e3


class Event(NamedTuple):
    """Seconds from the file's first sample; code of a stim channel or an events.tsv, or None."""

    onset: float
    duration: float
    name: str
    code: int | None = None


@dataclass
class Recording:
    """An opened file: ``data`` is MNE's Raw or Epochs (these with ``epoch`` samples each), or None while it is closed.

    names  the file's row of each electrode; bad: spans [first, last) of samples that its annotations call bad
    """

    path: Path
    data: Any
    rate: float
    samples: int
    events: list[Event]
    bad: list[tuple[int, int]]
    names: dict[str, int] = field(default_factory=dict)
    eog: list[int] = field(default_factory=list)
    bads: set[str] = field(default_factory=set)
    positions: dict[str, np.ndarray] | None = None
    epoch: int | None = None
    files: list[Path] = field(default_factory=list)

    def read(self, channels: Sequence[str], start: int, stop: int, scale: float) -> np.ndarray:
        """float64 [channels, stop - start] in uV; NaN where the file lacks a channel or marks it bad."""
        there = [i for i, name in enumerate(channels) if name in self.names and name not in self.bads]
        out = np.full((len(channels), stop - start), np.nan)
        if there:
            out[there] = self._read([self.names[channels[i]] for i in there], start, stop, scale)
        return out

    def read_eog(self, start: int, stop: int, scale: float) -> np.ndarray | None:
        """float64 [k, stop - start] in uV of the EOG channels; None where there are none."""
        return self._read(self.eog, start, stop, scale) if self.eog else None

    def _read(self, rows: Sequence[int], start: int, stop: int, scale: float) -> np.ndarray:
        picks = np.array(rows)
        order = np.argsort(picks)
        try:
            if self.epoch:
                epoch, first = divmod(start, self.epoch)
                signals = self.data[epoch].get_data(picks=picks[order])[0, :, first : first + stop - start]
            else:
                signals = self.data.get_data(picks=picks[order], start=start, stop=stop)
        except Exception as error:  # MNE meets a damaged file with whatever its parsing runs into
            raise UserError(f"{self.path}: cannot be read ({_brief(error)}); is it truncated?") from None
        out = np.empty((len(picks), stop - start))
        out[order] = signals * (1e6 * scale)
        return out


def open_file(path: Path, sidecar: Path | None = None, *, read=None, stim_mask: int = 0xFFFF) -> Recording:
    """Open a recording or a file of epochs and read its events, but no signal. Raises UserError.

    ``sidecar``: an events.tsv in place of the file's own events. ``read`` opens the path instead of mne.io.read_raw.
    """
    mne = import_mne()
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_file() and is_pickle(path):
        raise UserError(f"{path}: is a Python pickle, which can run any code when read; save it as FIF or EDF instead")
    try:
        if path.name.endswith(_EPOCHS):
            return _from_epochs(path, mne.read_epochs(path, preload=False, verbose="error"))
        raw = read(path) if read else mne.io.read_raw(path, preload=False, verbose="error")
        return _from_raw(path, raw, sidecar or _bids_events(path), stim_mask)
    except UserError:
        raise
    except Exception as error:  # MNE meets a damaged file with whatever its parsing runs into
        raise UserError(f"{path}: MNE cannot read it as a recording ({_brief(error)})") from None


def is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(2)
    return len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5


def _from_raw(path: Path, raw, sidecar: Path | None, stim_mask: int) -> Recording:
    rate = float(raw.info["sfreq"])
    own = [
        Event(float(onset) - raw.first_time, float(duration), str(name))
        for onset, duration, name in zip(raw.annotations.onset, raw.annotations.duration, raw.annotations.description)
    ]
    events = read_events(sidecar) if sidecar else own + _stim_events(raw, rate, stim_mask)
    bad = {e for e in own + events if e.name.lower().startswith("bad")}
    events = [e for e in events if e not in bad]
    spans = [(math.floor(e.onset * rate), math.ceil((e.onset + e.duration) * rate)) for e in sorted(bad)]
    # raw.filenames: data that lie beside a header.
    files = list(dict.fromkeys([path, *(Path(f) for f in raw.filenames if f is not None)]))
    return Recording(path, raw, rate, raw.n_times, events, spans, files=[f for f in files if f.is_file()])


def _from_epochs(path: Path, epochs) -> Recording:
    rate, length = float(epochs.info["sfreq"]), len(epochs.times)
    names = {code: name for name, code in epochs.event_id.items()}
    zero, rest = -epochs.tmin, (length - 1) / rate + epochs.tmin + 1 / rate
    events = [
        Event(i * length / rate + zero, rest, name, code)
        for i, code in enumerate(epochs.events[:, 2].tolist())
        for name in (names.get(code, str(code)), "epoch")
    ]
    return Recording(path, epochs, rate, len(epochs.events) * length, events, [], epoch=length, files=[path])


def _stim_events(raw, rate: float, mask: int) -> list[Event]:
    """Rises of the stim channels, read piece by piece, in the bits of ``mask``: BioSemi keeps its state above 16."""
    mne = import_mne()
    events = []
    for pick in mne.pick_types(raw.info, meg=False, stim=True):
        last = 0
        for start in range(0, raw.n_times, _CHUNK):
            chunk = raw.get_data(picks=[pick], start=start, stop=min(start + _CHUNK, raw.n_times))[0]
            codes = np.rint(np.nan_to_num(chunk)).astype(np.int64) & mask
            before = np.concatenate([[last if start else codes[0]], codes[:-1]])
            rises = np.flatnonzero(codes > before)
            events += [Event((start + i) / rate, 0.0, str(codes[i]), int(codes[i])) for i in rises.tolist()]
            last = codes[-1]
    return events


def _bids_events(path: Path) -> Path | None:
    stem = path.name.split("_eeg.")[0]
    sidecar = path.with_name(f"{stem}_events.tsv")
    return sidecar if stem != path.name and sidecar.is_file() else None


def read_events(path: Path) -> list[Event]:
    """Events of a BIDS events.tsv: named by trial_type (else by value), with the code in value."""
    table = read_table(path)
    onset = number_column(path, table, require_column(path, table, "onset", "onset"))
    duration = number_column(path, table, "duration") if "duration" in table.columns else np.zeros(len(table))
    codes = table["value"] if "value" in table.columns else [None] * len(table)
    names = table["trial_type"] if "trial_type" in table.columns else codes
    events = []
    for start, length, name, code in zip(onset, np.nan_to_num(duration), names, codes):
        try:
            number = int(float(code))
        except (TypeError, ValueError):
            number = None
        events.append(Event(float(start), float(length), str(name), number))
    return events


def name_channels(recording: Recording, montage: str | None, bads: str) -> None:
    """Find the electrodes among a file's channels by name and position; says which others are left out."""
    mne, info = import_mne(), recording.data.info
    eeg = mne.pick_types(info, meg=False, eeg=True, exclude=[])
    written = [info["ch_names"][i] for i in eeg]
    found = find_channels(written, montage or MONTAGE)
    own = np.array([info["chs"][i]["loc"][:3] for i in eeg]).reshape(-1, 3)
    has = np.isfinite(own).all(axis=1) & (np.linalg.norm(own, axis=1) > 0)
    # Heads are 6 to 13 cm about their centre; anything else is in other units or coordinates.
    if montage is None and has.any() and 0.06 < np.median(np.linalg.norm(own[has], axis=1)) < 0.13:
        found = [name or (label if there else None) for name, label, there in zip(found, written, has)]
        recording.positions = {name: own[i] for i, name in enumerate(found) if name and has[i]}
    for name, label, pick in zip(found, written, eeg.tolist()):
        if name in recording.names:
            raise UserError(f"{recording.path}: {info['ch_names'][recording.names[name]]} and {label} are both {name}")
        if name:
            recording.names[name] = pick
            if label in info["bads"]:
                recording.bads.add(name)
    eyes = [i for name, label, i in zip(found, written, eeg.tolist()) if not name and "EOG" in label.upper()]
    recording.eog = [*mne.pick_types(info, meg=False, eog=True, exclude=[]).tolist(), *eyes]
    lost = [label for name, label in zip(found, written) if not name and "EOG" not in label.upper()]
    if lost:
        say(f"{recording.path}: left out without a position: {', '.join(lost)}")
    if bads == "drop":
        for name in recording.bads:
            del recording.names[name]
        recording.bads = set()


def check_unit(signals: np.ndarray, where: str, path: Path, scale: float) -> None:
    with np.errstate(invalid="ignore"):
        step = float(np.nanmedian(np.std(np.diff(signals, axis=1), axis=1)))
    if step > 0 and math.isfinite(step) and not _SMALLEST_STEP < step < _LARGEST_STEP:
        factor = scale * 1000.0 ** round(math.log(_STEP / step, 1000))
        raise UserError(
            f"{where}: signals of {path} change by {step:.1g} uV from one sample to the next, EEG by some {_STEP:g}: "
            f"the file's unit is wrong (volts and microvolts mistaken?); --scale {factor:g} would mend it"
        )


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
