"""Anyone's recordings: a table with one row a trial, over files of every format that MNE reads."""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ngd_fast.artifacts.files import sha256
from ngd_fast.console import say
from ngd_fast.eeg.channels import channel_positions, import_mne
from ngd_fast.eeg.columns import number_column, numbers_in, read_table, require_column
from ngd_fast.eeg.raw import MONTAGE, Event, Recording, check_unit, name_channels, open_file
from ngd_fast.eeg.trials import Exclusions, Trial, TrialSource, scale_rating
from ngd_fast.errors import UserError

_MOMENTS = ("start", "stop", "baseline_start", "baseline_stop")  # columns, and fields of TrialRow


@dataclass
class TrialRow:
    """One row of the table; cells of moments as :func:`open_recordings` explains them, ratings already in [-1, 1]."""

    file: str
    start: str
    stop: str
    subject: int
    trial: int
    valence: float
    arousal: float
    where: str
    baseline_start: str = ""
    baseline_stop: str = ""


def open_recordings(
    table: str | Path,
    *,
    rating_range: tuple[float, float] | None = None,
    channels: Literal["common", "all"] = "common",
    bads: Literal["interpolate", "drop"] = "interpolate",
    scale: float = 1.0,
    montage: str | None = None,
) -> TrialSource:
    """The trials that a CSV lists, one a row: file, start, stop, subject, trial, and if there are any baseline_start,
    baseline_stop, valence and arousal (on ``rating_range``, mapped to [-1, 1]) and events (an events.tsv of the file).

    Files are named from the table's folder. start and stop are seconds from the file's first sample, or events: names
    of annotations, codes of a stim channel, trial_type or value of an events.tsv, which is also found by its BIDS name
    beside the file. ``NAME@3`` is the third of its name, ``event:7`` one whose name reads like a number. A stop is the
    first such event after the start; ``+60`` counts from the start, as ``-3`` does for the baseline; an empty one is
    the end of the event that starts the trial. In a file of epochs every epoch is an event, also named ``epoch``.

    ``channels``: keep those that all files have, or ``all``, rebuilding what a file lacks from its neighbours.
    ``bads``: what becomes of channels that a file marks as bad. ``scale`` multiplies signals whose unit the file has
    wrong. Positions are the files' own, else (or where ``montage`` is named) a montage's.

    Raises UserError for a table, file, event or trial that does not fit; nothing has been computed by then.
    """
    rows = _read_rows(Path(table), rating_range)
    folder = Path(table).parent
    name = Path(table).stem
    meta = {"dataset": name, "files": {Path(table).name: sha256(table)}, "rating_range": rating_range}
    sidecars = {row.file: events for row, events in rows if events}
    return source_of_rows(
        name,
        [row for row, _ in rows],
        lambda file: open_file(folder / file, folder / sidecars[file] if file in sidecars else None),
        meta,
        channels=channels,
        bads=bads,
        scale=scale,
        montage=montage,
    )


def source_of_rows(
    name: str,
    rows: Sequence[TrialRow],
    open_one: Callable[[str], Recording],
    meta: dict[str, Any],
    *,
    channels: str = "common",
    bads: str = "interpolate",
    scale: float = 1.0,
    montage: str | None = None,
) -> TrialSource:
    """What :func:`open_recordings` does once the rows are known; ``open_one`` opens a row's file."""
    import_mne()
    twice = [key for key, count in Counter((r.subject, r.trial) for r in rows).items() if count > 1]
    if twice:
        both = [row.where for row in rows if (row.subject, row.trial) == twice[0]][:2]
        raise UserError(f"{both[0]} and {both[1]} are both subject {twice[0][0]}, trial {twice[0][1]}")
    work: list[tuple[str, Recording, list[tuple]]] = []
    for file in dict.fromkeys(row.file for row in rows):
        recording = open_one(file)
        name_channels(recording, montage, bads)
        if recording.data.preload:  # what MNE can only read whole is read again when its turn comes
            recording.data = None
        spans = [(*_spans(recording, row), row) for row in rows if row.file == file]
        spans.sort(key=lambda span: span[1])
        work.append((file, recording, spans))
        for (_, (_, stop), before), (_, (start, _), after) in pairwise(spans):
            if start < stop and before.subject == after.subject:
                raise UserError(f"{before.where} and {after.where} overlap in {recording.path}")
    kept, positions = _reconcile([recording for _, recording, _ in work], channels, montage)
    meta |= {"sampling_rates": sorted({r.rate for _, r, _ in work}), "scale": scale, "channels": channels, "bads": bads}

    def trials(exclusions: Exclusions) -> Iterator[Trial]:
        for file, recording, spans in work:
            recording.data = recording.data or open_one(file).data
            for path in recording.files:
                meta["files"][(Path(file).parent / path.name).as_posix()] = sha256(path)
            for baseline, (start, stop), row in spans:
                stimulus = recording.read(kept, start, stop, scale)
                check_unit(stimulus, row.where, recording.path, scale)
                yield Trial(
                    subject=row.subject,
                    trial=row.trial,
                    stimulus=stimulus,
                    baseline=recording.read(kept, *baseline, scale) if baseline and source.with_baseline else None,
                    rate=recording.rate,
                    valence=row.valence,
                    arousal=row.arousal,
                    where=row.where,
                    eog=recording.read_eog(start, stop, scale) if source.with_eog else None,
                    bad=_within(recording.bad, start, stop),
                    baseline_bad=_within(recording.bad, *baseline) if baseline else (),
                )
            recording.data = None

    source = TrialSource(name, tuple(kept), len(rows), trials, meta, positions=positions)
    return source


def _read_rows(path: Path, rating_range) -> list[tuple[TrialRow, str | None]]:
    table = read_table(path, text=_MOMENTS)
    lower = {str(column).strip().lower(): column for column in table.columns}
    for name in ("file", "start"):
        require_column(path, table, name, name)
    numbers = {role: _numbers(path, table, require_column(path, table, None, role)) for role in ("subject", "trial")}
    rated = [name for name in ("valence", "arousal") if name in lower]
    if rated and rating_range is None:
        raise UserError(
            f"{path}: on which scale are {' and '.join(rated)} given? Say it, for example --rating-range 1 9"
        )
    ratings = {name: number_column(path, table, require_column(path, table, name, name)) for name in rated}
    if len(rated) == 1:
        raise UserError(f"{path}: has a column {rated[0]} alone; valence and arousal go together")
    if not rated:
        say(f"{path}: holds no valence and arousal, so every window is unlabelled support")

    def cell(i: int, name: str) -> str:
        value = table[lower[name]].iloc[i] if name in lower else None
        return "" if value is None or value != value else str(value).strip()

    rows = []
    for i in range(len(table)):
        where = f"{path}, row {i + 2}"
        felt = [float(ratings[name][i]) if rated else math.nan for name in ("valence", "arousal")]
        if any(map(math.isnan, felt)):
            felt = [math.nan, math.nan]
        else:
            felt = [scale_rating(r, *rating_range, f"{where}, {name}") for r, name in zip(felt, ("valence", "arousal"))]
        for name in ("file", "start"):
            if not cell(i, name):
                raise UserError(f"{where}: {name} is empty")
        row = TrialRow(
            file=cell(i, "file"),
            **{name: cell(i, name) for name in _MOMENTS},
            **{role: int(column[i]) for role, column in numbers.items()},
            valence=felt[0],
            arousal=felt[1],
            where=where,
        )
        rows.append((row, cell(i, "events") or None))
    return rows


def _numbers(path: Path, table, column) -> np.ndarray:
    """int64 [rows]: the numbers in names; names without any (``anna``) are counted in alphabetical order."""
    names = table[column].astype(str).str.strip()
    if table[column].isna().any() or names.str.contains(r"\d").any():
        return numbers_in(path, table, column)
    known, codes = np.unique(names, return_inverse=True)
    say(f"{path}: column {column} numbered: {', '.join(f'{name} {i}' for i, name in enumerate(known, 1))}")
    return codes + 1


def _spans(recording: Recording, row: TrialRow):
    """(baseline or None, stimulus), each (first sample, the one after the last)."""
    start, event = _moment(recording, row.start, row.where, "start")
    if row.stop:
        stop, _ = _moment(recording, row.stop, row.where, "stop", after=start)
    elif event is not None and event.duration > 0:
        stop = start + event.duration
    else:
        raise UserError(f"{row.where}: has no stop, and its start no duration; +60 would be 60 s after the start")
    stimulus = _span(recording, start, stop, row.where, "the trial")
    if not row.baseline_start:
        return None, stimulus
    first, _ = _moment(recording, row.baseline_start, row.where, "baseline_start", relative_to=start)
    last = start
    if row.baseline_stop:
        last, _ = _moment(recording, row.baseline_stop, row.where, "baseline_stop", relative_to=start, after=first)
    return _span(recording, first, last, row.where, "the baseline"), stimulus


def _span(recording: Recording, start: float, stop: float, where: str, part: str) -> tuple[int, int]:
    first, last = round(start * recording.rate), round(stop * recording.rate)
    if not 0 <= first < last <= recording.samples:
        length = recording.samples / recording.rate
        raise UserError(
            f"{where}: {part} from {start:g} to {stop:g} s does not lie in {recording.path}, which lasts {length:g} s"
        )
    if recording.epoch and first // recording.epoch != (last - 1) // recording.epoch:
        raise UserError(f"{where}: {part} from {start:g} to {stop:g} s reaches over the end of an epoch")
    return first, last


def _moment(
    recording: Recording, cell: str, where: str, column: str, *, after: float | None = None, relative_to=None
) -> tuple[float, Event | None]:
    """Seconds of a cell, and the event that it names."""
    try:
        number = float(cell.replace(",", "."))
    except ValueError:
        number = None
    if number is not None:
        if not math.isfinite(number):
            raise UserError(f"{where}: {column} must be seconds or an event, is {cell}")
        base = relative_to if relative_to is not None else after
        return (base + number if cell[0] in "+-" and base is not None else number), None
    name, at, place = cell.rpartition("@")
    if not at or not place.isdecimal():
        name, place = cell, ""
    name = name.removeprefix("event:").strip()
    same = [e for e in recording.events if name in (e.name, str(e.code))]
    if not same:
        counts = Counter(e.name for e in recording.events)
        near = difflib.get_close_matches(name, counts, n=3, cutoff=0.0) + list(counts)
        shown = ", ".join(f"{n} ({counts[n]})" for n in list(dict.fromkeys(near))[:6])
        raise UserError(f"{where}: {column}: no event {name} in {recording.path}; there are {shown or 'none at all'}")
    if place:
        if not 1 <= int(place) <= len(same):
            raise UserError(f"{where}: {column}: {recording.path} has {len(same)} events {name}, not {place}")
        return same[int(place) - 1].onset, same[int(place) - 1]
    if after is not None:
        later = [e for e in same if e.onset > after]
        if not later:
            raise UserError(f"{where}: {column}: no event {name} after {after:g} s in {recording.path}")
        return later[0].onset, later[0]
    if len(same) > 1:
        raise UserError(
            f"{where}: {column}: {recording.path} has {len(same)} events {name}; say which, from {name}@1 to "
            f"{name}@{len(same)}"
        )
    return same[0].onset, same[0]


def _reconcile(recordings: Sequence[Recording], mode: str, montage: str | None) -> tuple[list[str], np.ndarray]:
    """The channels of all recordings (``common``) or of any (``all``), and their positions float64 [channels, 3]."""
    every = list(dict.fromkeys(name for r in recordings for name in r.names))
    common = [name for name in every if all(name in r.names for r in recordings)]
    kept = every if mode == "all" else common
    if not common:
        raise UserError(
            f"{recordings[0].path} and the other files have no electrode in common; it has "
            f"{', '.join(list(recordings[0].names)[:8]) or 'none'}"
        )
    if len(common) < len(every):
        rest = ", ".join(name for name in every if name not in common)
        what = "rebuilt where a file lacks them" if mode == "all" else "left out, not in every file"
        say(f"{len(common)} channels are common to all {len(recordings)} files; {what}: {rest}")
    rates = Counter(r.rate for r in recordings)
    if len(rates) > 1:
        said = ", ".join(f"{count} at {rate:g} Hz" for rate, count in sorted(rates.items()))
        say(f"files differ in sampling rate ({said}); band power in Hz does not, cleaning.resample makes them one")
    if all(r.positions and all(n in r.positions for n in kept if n in r.names) for r in recordings):
        # Heads differ by millimetres: one operator from the mean of the positions that were measured.
        return kept, np.array([np.mean([r.positions[n] for r in recordings if n in r.names], axis=0) for n in kept])
    return kept, channel_positions(kept, montage or MONTAGE)


def _within(spans, start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """Spans of samples that touch [start, stop), counted from start."""
    return tuple((first - start, last - start) for first, last in spans if first < stop and last > start)
