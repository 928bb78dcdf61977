"""FER+ from its official files, in its own label modes: FER2013's pixels with the votes of ten annotators.

There are two label sources and they disagree on some images: ``fer2013new.csv``, row for row with ``fer2013.csv`` (the
number in a PNG's name is not the row's index), and ``label.csv`` in the folders FER2013Train, FER2013Valid and
FER2013Test, by PNG name, which FER+'s own trainer reads. Modes as in arXiv 1608.01041 and FER+'s reader; ``plurality``
is added.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ngd_fast.console import progress
from ngd_fast.errors import UserError
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.images import decode_image, map_images
from ngd_fast.faces.table import check_paths, find_column, read_cells, read_rows

LABEL_MODES = ("plurality", "majority", "probability", "crossentropy", "multi_target")
SPLITS = {"Training": "train", "PublicTest": "valid", "PrivateTest": "test"}
FOLDERS = {"train": "FER2013Train", "valid": "FER2013Valid", "test": "FER2013Test"}
SIDE = 48
VOTE_COLUMNS = (*CLASS_NAMES, "unknown", "nf")
"""Eight expressions, "unknown", and "no face" (NF)."""

OFFICIAL_ROWS = {
    "fer2013new.csv": {"train": 28709, "valid": 3589, "test": 3589},
    "label.csv": {"train": 28558, "valid": 3579, "test": 3573},
}
_SOFT_NEW, _SOFT_LABEL = {"train": 27956, "valid": 3505, "test": 3505}, {"train": 27947, "valid": 3508, "test": 3507}
EXPECTED_KEPT = {
    ("fer2013new.csv", "plurality"): {"train": 28389, "valid": 3553, "test": 3546},
    ("fer2013new.csv", "majority"): {"train": 25060, "valid": 3199, "test": 3153},
    ("fer2013new.csv", "probability"): _SOFT_NEW,
    ("fer2013new.csv", "crossentropy"): _SOFT_NEW,
    ("fer2013new.csv", "multi_target"): {"train": 27671, "valid": 3472, "test": 3472},
    ("label.csv", "majority"): {"train": 25045, "valid": 3191, "test": 3137},
    ("label.csv", "probability"): _SOFT_LABEL,
    ("label.csv", "crossentropy"): _SOFT_LABEL,
    ("label.csv", "multi_target"): {"train": 27667, "valid": 3472, "test": 3466},
}
"""Rows that each mode keeps of the full official files."""


def label_distribution(votes: Sequence[float], mode: str) -> tuple[np.ndarray, int] | None:
    """One row's ten vote counts -> (float32 [8] that sums to 1, label), or None where ``mode`` drops the row.

    Single votes are outliers in every mode. The label is the class with most votes, of equal ones the first.
    """
    counts = [vote if vote > 1 else 0 for vote in votes]
    total = sum(counts)
    top = max(counts)
    label = counts.index(top)
    if mode == "plurality":
        kept = counts[:8] if total and label < 8 else None
    elif mode == "majority":
        kept = [float(i == label) for i in range(8)] if label < 8 and top > 0.5 * total else None
    elif mode in ("probability", "crossentropy"):
        kept = _most_votes(counts, total)
    elif mode == "multi_target":
        chosen = [count >= 0.3 * total for count in counts]
        enough = sum(count for count, take in zip(counts, chosen) if take) > 0.5 * total
        kept = [float(take) for take in chosen[:8]] if enough and label < 8 else None
    else:
        raise ValueError(f"mode: must be one of {', '.join(LABEL_MODES)}, is {mode!r}")
    if kept is None:
        return None
    dist = np.array(kept, np.float64)
    return (dist / dist.sum()).astype(np.float32), label


def _most_votes(counts: Sequence[float], total: float) -> list[float] | None:
    """Expressions by votes, equal ones together, until they hold 75% of all votes or three are taken.

    The row is dropped when they hold no more than half, when ties make them more than three, and when "unknown" or
    "no face" comes first; where one of those comes later, what was taken before it stands.
    """
    remaining, kept = list(counts), [0.0] * 8
    taken, held = 0, 0.0
    while held < 0.75 * total and taken < 3:
        top = max(remaining)
        ties = [i for i, count in enumerate(remaining) if count == top]
        for i in ties:
            remaining[i] = 0
            if i < 8:
                kept[i] = top
                taken += 1
                held += top
        if ties[-1] >= 8:
            break
    return kept if sum(kept) > 0.5 * total and taken <= 3 else None


@dataclass
class _Voted:
    """Rows of one split as they come from the files."""

    names: list[str] = field(default_factory=list)
    votes: list[tuple[float, ...]] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)


def convert_ferplus(
    labels: Sequence[str | Path],
    fer2013: str | Path | None = None,
    *,
    label_mode: str = "plurality",
    eval_label_mode: str = "same",
    drop_ties: bool = False,
    image_root: str | Path | None = None,
) -> tuple[dict[str, Faces], list[str]]:
    """FER+'s official files -> ({"train": Faces, "valid": Faces, "test": Faces}, remarks on the number of rows).

    labels           fer2013new.csv (then ``fer2013`` is needed: joined row by row), and/or folders with label.csv
    fer2013          fer2013.csv with the pixels; with label.csv alone the PNGs beside it (or in ``image_root``) are
                     read instead; with both label sources, votes come from label.csv, names from fer2013new.csv
    label_mode       of the training split
    eval_label_mode  of validation and test; "same", or FER+'s own choice, "majority"
    drop_ties        leave out rows whose most votes several classes share; else the first of these is the label
    """
    for name, mode, known in (
        ("label_mode", label_mode, LABEL_MODES),
        ("eval_label_mode", eval_label_mode, ("same", *LABEL_MODES)),
    ):
        if mode not in known:
            raise ValueError(f"{name}: must be one of {', '.join(known)}, is {mode!r}")
    table, folders = _sort_labels(labels)
    if table is not None and fer2013 is None:
        raise UserError(f"{table}: holds votes but no pixels; give --fer2013 fer2013.csv")
    if fer2013 is not None and table is None:
        raise UserError(f"{fer2013}: its rows have no names; give fer2013new.csv beside the label.csv folders")
    splits = _read_joined(Path(fer2013), table) if table is not None else {}
    if folders:
        splits = {split: _read_folder(folder, splits.get(split), image_root) for split, folder in folders.items()}
    source = "label.csv" if folders else "fer2013new.csv"

    faces, remarks = {}, []
    for split, rows in splits.items():
        mode = label_mode if split == "train" or eval_label_mode == "same" else eval_label_mode
        faces[split], ties = _apply(rows, mode, f"FER+ {split}", drop_ties)
        kept = len(faces[split]) + (ties if drop_ties else 0)
        remarks.append(_compare(source, mode, split, len(rows.votes), kept))
        if ties:
            done = "left out" if drop_ties else "labelled by the first of its classes (--drop-ties leaves them out)"
            remarks.append(f"{split}: of these {ties} with equally many votes for several classes, each {done}")
    return faces, remarks


def _sort_labels(labels: Sequence[str | Path]) -> tuple[Path | None, dict[str, Path]]:
    """fer2013new.csv, and the folder of each split's label.csv."""
    table, folders = None, {}
    for path in map(Path, labels):
        if path.name == "label.csv":
            path = path.parent
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if path.is_file():
            if table is not None:
                raise UserError(f"{table} and {path}: two files of votes, wanted one")
            table = path
            continue
        inside = {split: path / name for split, name in FOLDERS.items() if (path / name / "label.csv").is_file()}
        if not inside and (path / "label.csv").is_file():
            inside = {split: path for split, name in FOLDERS.items() if path.name == name}
        if not inside:
            raise UserError(f"{path}: holds no label.csv, neither itself as one of {', '.join(FOLDERS.values())} "
                            "nor in folders of those names")  # fmt: skip
        for split in inside.keys() & folders.keys():
            raise UserError(f"{folders[split]} and {inside[split]} both hold the {split} split's labels, wanted one")
        folders |= inside
    if table is None and not folders:
        raise UserError("give --labels: fer2013new.csv, or the folders with label.csv")
    return table, folders


def _read_joined(fer2013: Path, table: Path) -> dict[str, _Voted]:
    splits: dict[str, _Voted] = {}
    pixels_rows, votes_rows = _read_pixels(fer2013), _read_votes(table)
    number = 0
    # Counting the rows beforehand would read the file twice; its size tells the official one (300 MB) from a part.
    official = fer2013.exists() and fer2013.stat().st_size > 2e8
    total = sum(OFFICIAL_ROWS["fer2013new.csv"].values()) if official else None
    bar = progress(votes_rows, desc="reading fer2013.csv", total=total, unit="row")
    for number, (line, usage, name, votes) in enumerate(bar, 1):
        pixels_line, pixels_usage, pixels = next(pixels_rows, (None, None, None))
        if pixels is None:
            raise UserError(f"{fer2013}: ends after {number - 1} rows, {table} goes on; is it truncated?")
        if usage != pixels_usage:
            raise UserError(f"{table}: line {line} is of {usage}, line {pixels_line} of {fer2013} of {pixels_usage}: "
                            "the files do not belong together row by row")  # fmt: skip
        rows = splits.setdefault(SPLITS[usage], _Voted())
        rows.names.append(name)
        rows.votes.append(votes)
        rows.pixels.append(pixels)
    if next(pixels_rows, None) is not None:
        raise UserError(f"{table}: ends after {number} rows, {fer2013} goes on; is it truncated?")
    if not splits:
        raise UserError(f"{table}: holds no rows")
    return splits


def _columns(path: Path, header: list[str], wanted: Sequence[str]) -> list[int]:
    missing = [name for name in wanted if name not in header]
    if missing:
        raise UserError(f"{path}: lacks the columns {', '.join(missing)}; its header is {','.join(header)[:120]}")
    return [find_column(path, header, (name,)) for name in wanted]


def _check_usage(usage: str, where: str) -> str:
    if usage not in SPLITS:
        raise UserError(f"{where}: Usage is {usage!r}, must be one of {', '.join(SPLITS)}")
    return usage


def _read_pixels(path: Path) -> Iterator[tuple[int, str, np.ndarray]]:
    header, rows = read_rows(path)
    pixels_column, usage_column = _columns(path, header, ("pixels", "usage"))
    for line, cells in rows:
        where = f"{path}: line {line}"
        with warnings.catch_warnings():
            # NumPy only warns of text that is no number; what it read before it fails the check of the length.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                pixels = np.fromstring(cells[pixels_column], dtype=np.int64, sep=" ")
            except ValueError:
                pixels = np.empty(0, np.int64)
        if pixels.size != SIDE * SIDE:
            raise UserError(f"{where}: has {pixels.size} pixels, must have {SIDE * SIDE}; is the file truncated?")
        if pixels.min() < 0 or pixels.max() > 255:
            raise UserError(f"{where}: has a pixel outside 0 to 255")
        yield line, _check_usage(cells[usage_column], where), pixels.astype(np.uint8).reshape(SIDE, SIDE)


def _read_votes(path: Path) -> Iterator[tuple[int, str, str, tuple[float, ...]]]:
    header, rows = read_rows(path)
    usage_column, name_column, *vote_columns = _columns(path, header, ("usage", "image name", *VOTE_COLUMNS))
    for line, cells in rows:
        where = f"{path}: line {line}"
        yield (
            line,
            _check_usage(cells[usage_column], where),
            cells[name_column].strip(),
            _votes(cells, vote_columns, where),
        )


def _votes(cells: Sequence[str], columns: Sequence[int], where: str) -> tuple[float, ...]:
    try:
        votes = tuple(float(cells[column]) for column in columns)
    except (ValueError, IndexError):
        votes = (-1.0,)
    if not all(0 <= vote < 1000 for vote in votes):
        raise UserError(f"{where}: must hold ten vote counts, holds {','.join(cells)[:120]}")
    return votes


def _read_folder(folder: Path, joined: _Voted | None, image_root) -> _Voted:
    """One split's label.csv (no header: name, perhaps the face's box, ten counts), pixels from PNGs or fer2013.csv."""
    path = folder / "label.csv"
    rows = _Voted()
    for line, cells in read_cells(path):
        where = f"{path}: line {line}"
        if len(cells) not in (11, 12):
            raise UserError(f"{where}: must hold a name and ten vote counts, holds {','.join(cells)[:120]}")
        rows.names.append(cells[0].strip())
        rows.votes.append(_votes(cells, range(len(cells) - 10, len(cells)), where))
    if not rows.names:
        raise UserError(f"{path}: holds no rows")
    if joined is not None:
        # Four names stand for two rows; in FER+'s own folders the later picture overwrote the earlier.
        by_name = dict(zip(joined.names, joined.pixels))
        missing = [name for name in rows.names if name not in by_name]
        if missing:
            raise UserError(
                f"{path}: {len(missing)} of {len(rows.names)} names are not in fer2013new.csv, first {missing[0]}"
            )
        rows.pixels = [by_name[name] for name in rows.names]
        return rows
    root = folder if image_root is None else Path(image_root)
    root = root / folder.name if (root / folder.name).is_dir() else root
    paths = [str(root / name) for name in rows.names]
    check_paths(paths, str(path))
    rows.pixels = map_images(lambda p: decode_image(p, grey=True, side=SIDE), paths, desc=f"reading {folder.name}")
    return rows


def _is_tied(votes: Sequence[float]) -> bool:
    return max(votes) > 1 and list(votes).count(max(votes)) > 1


def _apply(rows: _Voted, mode: str, source: str, drop_ties: bool) -> tuple[Faces, int]:
    """The rows that ``mode`` keeps, and how many of them are tied."""
    results = [label_distribution(votes, mode) for votes in rows.votes]
    kept = [i for i, result in enumerate(results) if result is not None]
    tied = {i for i in kept if _is_tied(rows.votes[i])}
    if drop_ties:
        kept = [i for i in kept if i not in tied]
    if not kept:
        raise UserError(f"{source}: label mode {mode} keeps none of its {len(results)} rows")
    faces = Faces(
        images=np.stack([rows.pixels[i] for i in kept]),
        label_dist=np.stack([results[i][0] for i in kept]),
        labels=np.array([results[i][1] for i in kept]),
        names=[rows.names[i] for i in kept],
        source=source,
    )
    return faces, len(tied)


def _compare(source: str, mode: str, split: str, rows: int, kept: int) -> str:
    """One line on the number of rows: as known, not as known (begins with "warning"), or not comparable."""
    text = f"{split}: {source}, {mode}: kept {kept} of {rows} rows"
    if rows != OFFICIAL_ROWS[source][split]:
        return f"{text} (not the full official file of {OFFICIAL_ROWS[source][split]} rows, so not compared)"
    known = EXPECTED_KEPT.get((source, mode), {}).get(split)
    if known is None:
        return f"{text} (no known number to compare with)"
    return f"{text}, as known" if kept == known else f"warning: {text}, but {known} are known: are the files changed?"
