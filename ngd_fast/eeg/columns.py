"""Tables that people keep beside their EEG: reading a CSV, finding its columns by name or role, numbers in names."""

import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ngd_fast.artifacts.files import delimiter_of
from ngd_fast.artifacts.headers import FREE_BYTES, RATIO, require_proportion
from ngd_fast.errors import UserError

_MOST_COLUMNS = 10_000

USUAL = {
    "subject": ("subject", "subject_id", "subjectid", "participant", "participant_id", "sub"),
    "trial": ("trial", "trial_id", "game", "video", "clip", "session", "path", "stimulus"),
    "window": ("window", "window_index", "window_id", "epoch", "segment", "chunk"),
    "valence": ("valence", "feltvlnc", "scorevalence"),
    "arousal": ("arousal", "feltarsl", "scorearousal"),
}


def read_table(path: str | Path, text: Sequence[str] = ()):
    """A CSV's rows up to the last that holds anything; columns of names in ``text`` (any case) stay as written."""
    import pandas as pd

    try:
        _require_proportion(path)
        # By pandas, which also reads compressed files.
        delimiter = delimiter_of(",".join(map(str, pd.read_csv(path, nrows=0).columns)))
        names = pd.read_csv(path, nrows=0, sep=delimiter).columns
        as_text = {name: str for name in names if str(name).strip().lower() in text}
        with warnings.catch_warnings():
            # Without index_col=False a cell too many in every row would shift all columns by one.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                path, sep=delimiter, decimal="," if delimiter == ";" else ".", index_col=False, dtype=as_text
            )
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pd.errors.ParserWarning:
        raise UserError(f"{path}: its rows have more cells than its header has names") from None
    # ValueError: pandas' own for no CSV, and for a ZIP of several files; the last three: damaged compressed files.
    except (ValueError, OSError, EOFError, zlib.error, BadZipFile) as error:
        raise UserError(f"{path}: not a readable CSV ({' '.join(str(error).split())})") from None
    # Spreadsheets may write rows of empty cells below the table.
    filled = np.flatnonzero(table.notna().any(axis=1))
    if not len(filled):
        raise UserError(f"{path}: has a header but no rows")
    return table.iloc[: filled[-1] + 1]


def _require_proportion(path: str | Path) -> None:
    """Raise UserError for a compressed file that swells out of proportion, and for more columns than a table has."""
    from pandas.io.common import get_handle

    limit, read = max(FREE_BYTES, RATIO * os.path.getsize(path)), 0
    with get_handle(path, "r", encoding="utf-8", errors="replace", compression="infer") as opened:
        header = opened.handle.readline(limit)
        columns = 1 + header.count(delimiter_of(header))
        if columns > _MOST_COLUMNS:  # pandas takes minutes for a hundred thousand
            raise UserError(f"{path}: has {columns:,} columns, a table here at most {_MOST_COLUMNS:,}")
        while opened.compression["method"] and (block := opened.handle.read(1 << 20)):
            read += len(block)
            if read > limit:
                require_proportion(path, read)


def find_column(path, table, wanted: str | None, role: str) -> str | None:
    """The column of a role: the one named in the mapping, or the first with a usual name; None if there is none.

    Raises UserError where two columns of ``table`` (which ``path`` holds) have that name.
    """
    if wanted in table.columns:
        return wanted
    for name in [wanted] if wanted is not None else USUAL[role]:
        found = [c for c in table.columns if str(c).strip().lower() == name.strip().lower()]
        if len(found) > 1:
            raise UserError(f"{path}: {' and '.join(map(repr, found))} are two {role} columns; leave one out")
        if found:
            return found[0]
    return None


def require_column(path, table, wanted: str | None, role: str) -> str:
    column = find_column(path, table, wanted, role)
    if column is None:
        looked = wanted or ", ".join(USUAL[role])
        shown = ", ".join(map(str, table.columns[:8])) + (", ..." if len(table.columns) > 8 else "")
        raise UserError(f"{path}: no {role} column (looked for {looked}); it has {shown}")
    return column


def number_column(path, table, column) -> np.ndarray:
    """float64 [rows]; empty cells are NaN, text is a UserError."""
    import pandas as pd

    numbers = pd.to_numeric(table[column], errors="coerce")
    text = numbers.isna() & table[column].notna()
    if text.any():
        row = int(np.argmax(text))
        raise UserError(f"{path}: row {row + 2}, column {column} must be a number, is {table[column].iloc[row]!r}")
    return numbers.to_numpy(np.float64)


def numbers_in(path, table, column) -> np.ndarray:
    """int64 [rows]: the number in each name (``S01`` is 1, ``G1.pdf`` is 1)."""
    names = table[column].astype(str).str.strip()
    numbers = names.str.extract(r"(\d+)", expand=False)
    if numbers.isna().any():
        row = int(np.argmax(numbers.isna()))
        raise UserError(f"{path}: row {row + 2}, column {column} must hold a number, is {names.iloc[row]!r}")
    try:
        numbers = numbers.astype(np.int64)
    except OverflowError:
        raise UserError(f"{path}: column {column} holds numbers of more than 18 digits, such as {names[0]!r}") from None
    if names.groupby(numbers).nunique().max() > 1:
        number = int(names.groupby(numbers).nunique().idxmax())
        both = sorted(set(names[numbers == number]))[:2]
        raise UserError(f"{path}: column {column} has {both[0]!r} and {both[1]!r}, which are both number {number}")
    return numbers.to_numpy()
