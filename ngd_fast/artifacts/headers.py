"""What a file says about its own size, judged before anything of it is read: a small file must not take all memory."""

import math
import os
import zipfile
from pathlib import Path

import numpy as np

from ngd_fast.errors import UserError

FREE_BYTES, RATIO = 1 << 26, 100
"""Whatever a file's size, 64 MB may come of it; beyond that no more than a hundred times its size. Deflate gives up to
1,032 times, but of zeros: faces shrink to a half at best, topomaps with their empty corners to a third."""


def require_proportion(path: str | Path, promised: int) -> None:
    """Raise UserError where ``promised`` bytes are out of proportion to the file's size, or more than all memory."""
    size = os.path.getsize(path)
    if promised > max(FREE_BYTES, RATIO * size):
        raise UserError(
            f"{path}: {promised / 1e6:,.0f} MB would come out of {size / 1e6:,.2f} MB, as in no file of data; "
            "is it damaged? (what is so empty is read when it is saved uncompressed)"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if promised > memory:
        raise UserError(f"{path}: takes {promised / 1e9:,.1f} GB to read, this machine has {memory / 1e9:,.1f} GB")


def require_zip_proportion(path: str | Path) -> None:
    """:func:`require_proportion` for the members of a ZIP file; other files pass. UserError for a damaged one."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            promised = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: not a readable ZIP file ({error}); is it truncated?") from None
    require_proportion(path, promised)


def npz_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """{array: shape} of an NPZ, from the arrays' headers.

    Raises UserError for what is damaged, out of proportion, twice there, no array, or an array of anything but numbers
    and texts: an array of objects would have to be unpickled.
    """
    require_zip_proportion(path)
    shapes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in shapes:
                    raise UserError(f"{path}: holds {name} twice")
                with archive.open(member) as file:
                    shapes[name] = _shape_of(file, member.file_size, f"{path}: {name}")
    except UserError:
        raise
    except Exception as error:  # a damaged file provokes anything in zipfile, zlib and NumPy's parser of headers
        raise UserError(f"{path}: not a readable NPZ file ({_reason(error)}); is it truncated?") from None
    return shapes


def load_npy(path: str | Path) -> np.ndarray:
    """The one array of an NPY file, its header judged first, without pickle. Raises UserError for anything else."""
    try:
        with open(path, "rb") as file:
            _shape_of(file, os.path.getsize(path), str(path))
        return np.load(path, allow_pickle=False)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{path}: not a readable NPY file ({_reason(error)})") from None


def _shape_of(file, size: int, where: str) -> tuple[int, ...]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise UserError(
            f"{where}: an array of Python objects, which is not unpickled; save texts with array.astype(str), numbers "
            "with a numeric dtype"
        )
    if dtype.kind not in "biufSU":
        raise UserError(f"{where}: must hold numbers or texts, holds {dtype}")
    promised = math.prod(shape) * max(dtype.itemsize, 1)
    if min(shape, default=0) < 0 or promised != size - file.tell():
        raise UserError(
            f"{where}: its header promises {dtype} {list(shape)}, {promised:,} bytes, but "
            f"{size - file.tell():,} follow; is it truncated?"
        )
    return shape


def _reason(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:200] or type(error).__name__}"
