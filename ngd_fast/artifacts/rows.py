"""Tables that are written row by row, for results that need not fit into memory: CSV, JSON lines, Parquet."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ngd_fast.errors import UserError

KINDS = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
_GROUP = 10_000
"""Rows of a Parquet file's row group, which are held until they are written."""


class _CSV:
    def __init__(self, path, columns):
        self._file = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115 (closed by close)
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(columns)

    def write(self, values: Sequence) -> None:
        self._writer.writerow(values)

    def close(self) -> None:
        self._file.close()


class _JSONLines:
    def __init__(self, path, columns):
        self._columns = list(columns)
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, values: Sequence) -> None:
        self._file.write(json.dumps(dict(zip(self._columns, values)), allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _Parquet:
    def __init__(self, path, columns):
        pa, pq = _arrow()
        types = {int: pa.int64(), float: pa.float64(), str: pa.string()}
        self._pa, self._held = pa, []
        self._schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
        self._writer = pq.ParquetWriter(path, self._schema)

    def write(self, values: Sequence) -> None:
        self._held.append(values)
        if len(self._held) >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        arrays = [self._pa.array(values, field.type) for values, field in zip(zip(*self._held), self._schema)]
        self._writer.write_table(self._pa.Table.from_arrays(arrays, schema=self._schema))
        self._held.clear()

    def close(self) -> None:
        if self._held:
            self._flush()
        self._writer.close()


def row_writer(path: str | Path, kind: str, columns: Mapping[str, type]):
    """Something with write(values in the order of ``columns``, None where there is none) and close().

    kind "csv", "jsonl" or "parquet"; columns {name: int, float or str}. Raises UserError where Parquet is missing.
    """
    return {"csv": _CSV, "jsonl": _JSONLines, "parquet": _Parquet}[kind](path, columns)


def read_rows(path: str | Path, kind: str) -> Iterator[dict]:
    """The rows again, one at a time. Those of a CSV are texts, and empty where there was None."""
    if kind == "parquet":
        for batch in _arrow()[1].ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    with open(path, encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file) if kind == "csv" else map(json.loads, file)


def _arrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"Parquet files need {error.name}: pip install pyarrow") from None
    return pyarrow, pyarrow.parquet
