"""EEG in BIDS (Pernet et al., 2019), read by MNE-BIDS; ratings from events.tsv or a table such as a phenotype's."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ngd_fast.artifacts.files import sha256
from ngd_fast.console import say
from ngd_fast.eeg.columns import number_column, numbers_in, read_table, require_column
from ngd_fast.eeg.raw import Recording, open_file
from ngd_fast.eeg.recordings import TrialRow, source_of_rows
from ngd_fast.eeg.trials import TrialSource, scale_rating
from ngd_fast.errors import UserError

_FORMATS = [".edf", ".bdf", ".vhdr", ".set"]  # those that BIDS allows, of each the file that names the others
_KEYS = ("stim_file", "trial_type")  # columns by which ratings may name a trial; else by its number within the subject


def open_bids(
    root: str | Path,
    task: str,
    *,
    rating_range: tuple[float, float] | None = None,
    events: Sequence[str] = (),
    ratings: str | Path | None = None,
    stop: str | None = None,
    baseline: float | None = None,
    **options,
) -> TrialSource:
    """The trials of a task: rows of every recording's events.tsv whose trial_type is among ``events``, or all that
    hold a valence and an arousal. They are numbered by subject, in the order of sessions, runs and onsets.

    Ratings come from columns valence and arousal there, or from the table ``ratings`` (participant_id; stim_file,
    trial_type or trial; valence, arousal), on ``rating_range``. A trial lasts as long as its event, or to ``stop``
    (an event's name, or ``+60``); its baseline is the ``baseline`` seconds before. channels.tsv says which channels
    are EEG and bad, electrodes.tsv where they sit. ``options``: those of :func:`source_of_rows`.

    Raises UserError for a root, task, event or rating that is not there.
    """
    root = Path(root)
    mne_bids = _import_mne_bids()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder (wanted the root of a BIDS dataset)")
    found = mne_bids.find_matching_paths(root, tasks=task, datatypes="eeg", suffixes="eeg", extensions=_FORMATS)
    paths = {p.fpath.relative_to(root).as_posix(): p for p in found}
    if not paths:
        tasks = ", ".join(mne_bids.get_entity_vals(root, "task")) or "none"
        raise UserError(f"{root}: no EEG of task {task}; there are the tasks {tasks}")
    subjects = _number_subjects(sorted({p.subject for p in paths.values()}))
    felt = _read_ratings(Path(ratings), rating_range, subjects) if ratings else None
    meta = {"dataset": root.name, "files": {}, "task": task, "rating_range": rating_range, "subjects": subjects}
    if ratings:
        meta["files"][Path(ratings).name] = sha256(ratings)
    rows: list[TrialRow] = []
    counts: dict[str, int] = defaultdict(int)
    for file, path in sorted(paths.items()):
        sidecar = path.find_matching_sidecar(suffix="events", extension=".tsv", on_error="ignore")
        if sidecar is None:
            say(f"{path.fpath}: left out, it has no events.tsv")
            continue
        table = read_table(sidecar)
        onset = number_column(sidecar, table, require_column(sidecar, table, "onset", "onset"))
        duration = number_column(sidecar, table, require_column(sidecar, table, "duration", "duration"))
        own = {n: number_column(sidecar, table, n) for n in ("valence", "arousal") if n in table.columns}
        for i in onset.argsort(kind="stable"):
            where = f"{sidecar}, row {i + 2}"
            pair = [float(own[n][i]) if n in own else math.nan for n in ("valence", "arousal")]
            rated = not any(map(math.isnan, pair))
            kind = str(table["trial_type"].iloc[i]) if "trial_type" in table.columns else ""
            if kind not in events if events else not rated:
                continue
            counts[path.subject] += 1
            number = counts[path.subject]
            if felt is not None:
                names = [("trial", number), *((k, str(table[k].iloc[i])) for k in _KEYS if k in table.columns)]
                pair = next(
                    (felt[k] for name in names if (k := (subjects[path.subject], *name)) in felt), [math.nan] * 2
                )
            elif rated:
                pair = _scaled(pair, rating_range, where)
            else:
                pair = [math.nan, math.nan]
            rows.append(
                TrialRow(
                    file=file,
                    start=f"{onset[i]}",
                    stop=stop or (f"+{duration[i]}" if duration[i] > 0 else ""),
                    baseline_start=f"-{baseline}" if baseline else "",
                    subject=subjects[path.subject],
                    trial=number,
                    valence=pair[0],
                    arousal=pair[1],
                    where=where,
                )
            )
    if not rows:
        wanted = f"of trial_type {', '.join(events)}" if events else "with valence and arousal (--event names others)"
        raise UserError(f"{root}: no event {wanted} in the events.tsv of task {task}")
    if felt is not None and all(math.isnan(row.valence) for row in rows):
        raise UserError(f"{ratings}: rates none of the {len(rows)} trials of {root}; does it name subjects and trials?")

    def open_one(file: str) -> Recording:
        return open_file(root / file, read=lambda _: mne_bids.read_raw_bids(paths[file], verbose="error"))

    return source_of_rows(root.name, rows, open_one, meta, **options)


def _import_mne_bids():
    try:
        import mne_bids
    except ImportError:
        raise UserError("reading BIDS needs MNE-BIDS: pip install 'ngd-fast[bids]'") from None
    return mne_bids


def _number_subjects(labels: Sequence[str]) -> dict[str, int]:
    """sub-07 is 7; where a label is no number, all are counted in alphabetical order, which the file of maps keeps."""
    if all(label.isdecimal() for label in labels) and len({int(label) for label in labels}) == len(labels):
        return {label: int(label) for label in labels}
    return {label: i for i, label in enumerate(labels, 1)}


def _scaled(pair, rating_range, where: str) -> list[float]:
    if rating_range is None:
        raise UserError(f"{where}: on which scale are the ratings given? Say it, for example --rating-range 1 9")
    return [scale_rating(r, *rating_range, f"{where}, {name}") for r, name in zip(pair, ("valence", "arousal"))]


def _read_ratings(path: Path, rating_range, subjects: dict[str, int]) -> dict[tuple, list[float]]:
    """{(subject, column that names the trial, its value): [valence, arousal] in [-1, 1]}."""
    table = read_table(path)
    labels = table[require_column(path, table, None, "subject")].astype(str).str.removeprefix("sub-")
    key = next((k for k in _KEYS if k in table.columns), "trial")
    column = require_column(path, table, None if key == "trial" else key, key)
    names = numbers_in(path, table, column).tolist() if key == "trial" else table[column].astype(str).tolist()
    columns = [number_column(path, table, require_column(path, table, n, n)) for n in ("valence", "arousal")]
    felt = {}
    for i, (label, name, *pair) in enumerate(zip(labels, names, *columns)):
        subject = subjects.get(label, next((n for s, n in subjects.items() if s.lstrip("0") == label), None))
        if subject is not None and not any(map(math.isnan, pair)):
            felt[subject, key, name] = _scaled(pair, rating_range, f"{path}, row {i + 2}")
    return felt
