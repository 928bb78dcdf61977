"""MATLAB's v5 files from front to back: what is not asked for is passed over, no more than one value is held at once.

The format: MathWorks, "MAT-File Format", level 5. scipy's reader takes a variable whole, which for DREAMER.mat is twice
its 2 GB.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ngd_fast.artifacts.headers import require_proportion
from ngd_fast.errors import UserError

try:  # inflates twice as fast, and is most of the time that a file takes
    from isal import isal_zlib as zlib
except ImportError:
    import zlib

_TYPES = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
    16: "u1",
    17: "u2",
}
_CLASSES = dict(zip(range(6, 16), ("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")))
_MATRIX, _COMPRESSED, _CELL, _STRUCT, _CHAR = 14, 15, 1, 2, 4
_PIECE = 1 << 18


class Mat5Reader:
    """One variable of a v5 file, opened at its beginning.

    Raises UserError for a file that is damaged, or that lacks the variable.
    """

    def __init__(self, path: str | Path, variable: str):
        self.path = Path(path)
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._size = self.path.stat().st_size
        head = self._file.read(128)
        if len(head) < 128 or head[126:128] not in (b"IM", b"MI"):
            raise self._damaged("no MATLAB file of version 5")
        self._order = "<" if head[126:128] == b"IM" else ">"
        following = 128
        while following < self._size:
            self._file.seek(following)
            self._inflate, self._left, self._rest, self.position = None, 8, b"", 0
            kind, size = self._numbers("u4", 2)
            following += 8 + size
            if following > self._size:
                raise self._damaged("a variable is longer than the file")
            self._left, self.position = size, 0
            if kind == _COMPRESSED:
                self._inflate = zlib.decompressobj()
            elif kind == _MATRIX:  # its tag, read already, is read again
                self._file.seek(-8, 1)
                self._left += 8
            else:
                continue
            self._class, self._shape, name, self._end = self._header()
            if name == variable:
                return
        raise UserError(f"{self.path}: holds no variable named {variable}")

    def close(self) -> None:
        self._file.close()

    def fields(self) -> tuple[list[str], Iterator[str]]:
        """Names of a struct's fields, and an iterator that stands before the value of each in turn."""
        if self._class != _STRUCT or math.prod(self._shape) != 1:
            return [], iter(())
        width = int(self._element()[0])
        packed = self._element().tobytes()
        names = [packed[i : i + width].split(b"\0")[0].decode("latin-1") for i in range(0, len(packed), max(1, width))]
        return names, self._visit(names)

    def cells(self) -> tuple[int, Iterator[int]]:
        """The number of a cell array's cells, and an iterator that stands before each in turn."""
        count = math.prod(self._shape) if self._class == _CELL else 0
        return count, self._visit(range(count))

    def _visit(self, items) -> Iterator:
        for item in items:
            self._class, self._shape, _, end = self._header()
            yield item
            self._skip(end - self.position)

    def value(self, skip: frozenset[str] = frozenset(), depth: int = 0) -> Any:
        """The value that comes next: an array, a str, a list of cells, or a dict of a struct's fields but ``skip``."""
        if depth > 50:
            raise self._damaged("values in values, 50 deep")
        if self._class == _STRUCT:
            return {name: self.value(skip, depth + 1) for name in self.fields()[1] if name not in skip}
        if self._class == _CELL:
            return [self.value(skip, depth + 1) for _ in self.cells()[1]]
        if self._class == _CHAR:
            content = self._element()
            if content.dtype.kind != "u":
                raise self._damaged("a text of numbers with a sign")
            text = content.tobytes().decode("utf-8", "replace") if content.itemsize == 1 else ""
            return text or "".join(chr(code) if code < 0xD800 else "?" for code in content.tolist())
        if self._class not in _CLASSES:
            raise self._damaged(f"a value of class {self._class}, which is not read")
        content = self._element() if math.prod(self._shape) else np.empty(0)
        if content.size != math.prod(self._shape):
            raise self._damaged(f"{content.size} numbers where {self._shape} belong")
        return content.astype(_CLASSES[self._class], copy=False).reshape(self._shape, order="F")

    def finish(self) -> None:
        """Read to the variable's end, where the checksum of its compression stands."""
        while self._inflate is not None and not self._inflate.eof:
            if not self._more(_PIECE):
                raise self._damaged("it ends too early")

    def _header(self) -> tuple[int, tuple[int, ...], str, int]:
        """Class, shape and name of a matrix, and the position behind it."""
        kind, size = self._numbers("u4", 2)
        end = self.position + size
        if kind != _MATRIX:
            raise self._damaged(f"an element of type {kind} where a matrix belongs")
        if not size:
            return 6, (0, 0), "", end
        flags, shape, name = self._element(), self._element(), self._element()
        if len(flags) != 2 or not 2 <= len(shape) <= 32 or (shape < 0).any():
            raise self._damaged("a matrix without a header")
        return int(flags[0]) & 0xFF, tuple(int(n) for n in shape), name.tobytes().decode("latin-1"), end

    def _element(self) -> np.ndarray:
        """The numbers of a data element, small or not, as they are stored."""
        (first,) = self._numbers("u4", 1)
        kind, size = first & 0xFFFF, first >> 16
        small = size > 0
        if not small:
            kind, size = first, self._numbers("u4", 1)[0]
        if kind not in _TYPES or size > 1 << 31:
            raise self._damaged(f"an element of type {kind} and {size} bytes where numbers belong")
        require_proportion(self.path, size)
        content = self._take(size)
        self._skip(-size % (4 if small else 8))
        dtype = np.dtype(self._order + _TYPES[kind])
        if size % dtype.itemsize:
            raise self._damaged("half a number")
        return np.frombuffer(content, dtype)

    def _numbers(self, dtype: str, count: int) -> list[int]:
        dtype = np.dtype(self._order + dtype)
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _take(self, size: int) -> bytearray:
        out = bytearray()
        while len(out) < size:
            piece = self._more(size - len(out))
            if not piece:
                raise self._damaged("it ends too early")
            out += piece
        self.position += size
        return out

    def _skip(self, size: int) -> None:
        if size < 0:
            raise self._damaged("a value is longer than what holds it")
        self.position += size
        while size:
            piece = self._more(size)
            if not piece:
                raise self._damaged("it ends too early")
            size -= len(piece)

    def _more(self, size: int) -> bytes:
        """From 1 to ``size`` bytes of the variable; none at its end."""
        while True:
            if not self._rest:
                self._rest = self._file.read(min(_PIECE, self._left))
                self._left -= len(self._rest)
            if self._inflate is None:
                piece, self._rest = self._rest[:size], self._rest[size:]
                return piece
            ended = not self._rest
            try:
                piece = self._inflate.decompress(self._rest, min(size, 16 * _PIECE))
            except zlib.error as error:
                raise self._damaged(str(error)) from None
            self._rest = self._inflate.unconsumed_tail
            if piece or ended or self._inflate.eof:
                return piece

    def _damaged(self, detail: str) -> UserError:
        return UserError(f"{self.path}: not a readable MATLAB file ({detail}); is it truncated?")


def read_variable(path: str | Path, name: str) -> Any:
    """A variable by itself; see :meth:`Mat5Reader.value`."""
    reader = Mat5Reader(path, name)
    try:
        value = reader.value()
        reader.finish()
    finally:
        reader.close()
    return value
