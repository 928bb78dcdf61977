"""Reading and writing files so that a crash or a full disk never leaves half of one, and nothing is unpickled."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ngd_fast.artifacts.headers import npz_shapes
from ngd_fast.errors import UserError

if TYPE_CHECKING:
    import torch

SUMS_NAME = "SHA256SUMS.txt"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed over ``path``, else removed.

    The old file survives any failure. What a process that was killed was writing to ``path`` is taken away. A full disk
    or a folder that cannot be written is a UserError.
    """
    path = Path(path)
    temporary = handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(path)
        temporary, handle = _temporary_beside(path)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise _disk_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _temporary_beside(path: Path) -> tuple[Path, int]:
    """A new file, and a handle that locks it for as long as it is open: the end of a process closes it too."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        _lock(handle, wait=True)
        if _is_at(name, handle):  # else another process took it for unfinished before it was locked
            return Path(name), handle
        os.close(handle)


def _remove_unfinished(path: Path) -> None:
    """Remove the temporary files beside ``path`` that nobody holds any more."""
    suffix = glob.escape(path.suffix)
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.????????{suffix}"):
        with contextlib.suppress(OSError):
            handle = os.open(unfinished, os.O_RDWR)
            try:
                if _lock(handle):
                    unfinished.unlink()
            finally:
                os.close(handle)


def _lock(handle: int, *, wait: bool = False) -> bool | None:
    """Lock an open file or folder: True; False where another process holds it; None on a file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(path: str | Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def alone_in(folder: str | Path, *, resume: bool | None = None) -> Iterator[None]:
    """Within: no other process writes its run into ``folder``, which is made where it is missing.

    Left empty, it is removed again. ``resume`` as in :func:`require_free`. Raises UserError where the folder cannot be
    made or is not free, or another process has it.
    """
    folder = Path(folder)
    require_free(folder, resume=resume)
    handle = _locked_folder(folder)
    try:
        require_free(folder, resume=resume)  # it may have been filled since
        yield
    finally:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()
        os.close(handle)  # which unlocks, as the end of the process does


def _locked_folder(folder: Path) -> int:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be made ({error.strerror})") from None
        free = _lock(handle) is not False
        if free and _is_at(folder, handle):  # else another process left it empty, and removed it, before it was locked
            return handle
        os.close(handle)
        if not free:
            raise UserError(f"{folder}: another process is writing into it")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _disk_error(error: OSError, path: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: no space left on the disk; nothing was changed")
    return UserError(f"{path}: cannot be written ({error.strerror or error})")


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal content has equal checksums. NaN is refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_text(path: str | Path) -> str:
    """A text in UTF-8. Raises UserError where the file is missing, no text, or nothing that ends (a pipe, a device)."""
    path = Path(path)
    try:
        if path.exists() and not is_plain(path):
            raise UserError(f"{path}: is no file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; see :func:`parse_json`. Raises UserError for anything else."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def parse_json(text: str, source: object) -> Any:
    """The value that ``text`` holds. Raises UserError naming ``source``, also for what no writer here writes: NaN and
    infinity, integers beyond 64 bits, a key that stands twice, half a character, nesting without end."""
    try:
        value = json.loads(
            text, parse_constant=_finite, parse_float=_finite, parse_int=_integer, object_pairs_hook=_distinct
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs can be neither shown nor written
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({str(error)[:200]})") from None


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value


def _integer(text: str) -> int:
    if len(text) > 21 or abs(value := int(text)) >= 2**64:
        raise ValueError(f"the number {text[:20]}... is too large")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return value


def save_npz(path: str | Path, arrays: Mapping[str, np.ndarray], *, compress: bool = False) -> None:
    """Write an NPZ whose bytes depend on the arrays alone (NumPy stamps no time into it). No object arrays."""
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise TypeError(f"{name}: object arrays would have to be pickled")
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            (np.savez_compressed if compress else np.savez)(file, **arrays)


def load_npz(path: str | Path, required: tuple[str, ...] = (), rows: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Read all arrays of an NPZ, without pickle. Those in ``rows`` must be equally long, where they are there.

    Missing, truncated and incomplete files are UserErrors, and so are those whose arrays do not fit the file's size,
    each other, or memory: that is judged from the headers.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, wanted an NPZ file")
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not an NPZ file; is it truncated?")
    shapes = npz_shapes(path)
    missing = [name for name in required if name not in shapes]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)} (has {', '.join(shapes) or 'nothing'})")
    lengths = {name: shapes[name][0] for name in rows if shapes.get(name)}
    for name, length in lengths.items():
        first, wanted = next(iter(lengths.items()))
        if length != wanted:
            raise UserError(f"{path}: has {wanted} {first} and {length} {name}, wanted as many of each")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        for array in arrays.values():
            if array.dtype.kind == "U":
                "".join(array.ravel().tolist()).encode()  # numbers that are no character, or half of one
        return arrays
    except MemoryError:
        raise UserError(f"{path}: takes more memory to read than is free") from None
    except Exception as error:  # of a damaged file: zlib.error, SystemError for a text that is none, and what not
        raise UserError(f"{path}: not a readable NPZ file ({error}); is it truncated?") from None


def load_safetensors(path: str | Path) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """(tensors by name, in the order of their names; metadata) of a safetensors file. Raises UserError for whatever is
    wrong with it.

    Read whole: what safetensors (0.8) gives from an open file leaks 60 bytes a tensor. What it gives of a file read
    whole comes in another order in each process.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return dict(sorted(load(Path(path).read_bytes()).items())), metadata
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, MemoryError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); is it truncated?") from None


def require_free(folder: str | Path, *, resume: bool | None = None) -> None:
    """Raise UserError where a run cannot be written to ``folder``: it is a file, or holds something already.

    ``resume``: whether the run in it is to be continued; None for runs that cannot be.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file")
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() and not is_inside(path, folder):
            raise UserError(f"--out {folder}: {path.name} is a link that leads out of it, so the run would write there")
    if not resume and folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
        remedy = "" if resume is None else "continue that run with --resume or "
        raise UserError(f"--out {folder}: is not empty; {remedy}choose another folder")


def file_stem(name: str) -> str:
    """``name`` as a part of a file's name: whatever could lead elsewhere, or hide the file, becomes "_"."""
    text = "".join(c if c.isalnum() or c in "-_." else "_" for c in name[:60])
    return "_" + text[1:] if text.startswith(".") else text


def delimiter_of(header: str) -> str:
    """What parts the cells of a CSV whose first line is ``header``: the commonest of comma, semicolon and tab.

    Spreadsheets write semicolons where the comma is the decimal sign.
    """
    return max(",;\t", key=header.count)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_plain(path: str | Path) -> bool:
    """Whether ``path`` is a file that ends: no pipe, no device, none of those that a kernel makes up."""
    return os.path.isfile(path) and Path(path).resolve().parts[1] not in ("proc", "sys", "dev")


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether ``path`` lies in ``folder``, wherever ``..`` and symbolic links lead."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def write_sums(folder: str | Path) -> Path:
    """Write SHA256SUMS.txt over every file below ``folder`` in the form that ``sha256sum -c`` reads."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SUMS_NAME and not p.name.startswith("."))
    write_text(folder / SUMS_NAME, "".join(f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files))
    return folder / SUMS_NAME


def add_to_sums(folder: str | Path, *names: str) -> None:
    """Take the files ``names`` into the folder's SHA256SUMS.txt, beside what it lists already."""
    sums = read_sums(folder) | {name: sha256(Path(folder) / name) for name in names}
    write_text(Path(folder) / SUMS_NAME, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def read_sums(folder: str | Path) -> dict[str, str]:
    """{file: SHA-256} as in the folder's SHA256SUMS.txt. Raises UserError where it is missing or no such list."""
    path = Path(folder) / SUMS_NAME
    if not path.exists():
        raise UserError(f"{folder}: has no {SUMS_NAME}; is it a finished run?")
    text = read_text(path)
    if not text.endswith("\n"):
        raise UserError(f"{path}: ends in the middle of a line; is it truncated?")
    sums = {}
    for number, line in enumerate(text.splitlines(), 1):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            raise UserError(f"{path}: line {number} is not a checksum line")
        if name in sums:
            raise UserError(f"{path}: names {name} twice")
        sums[name] = digest
    return sums


def check_sums(folder: str | Path) -> list[str]:
    """Compare a folder with its SHA256SUMS.txt; one line for each file that is missing or changed."""
    problems = []
    for name, digest in read_sums(folder).items():
        path = Path(folder) / name
        if not is_inside(path, folder):
            problems.append(f"{name}: lies outside the folder")
        elif not is_plain(path):
            problems.append(f"{name}: missing")
        elif sha256(path) != digest:
            problems.append(f"{name}: changed")
    return problems


def require_untouched(file: str | Path) -> None:
    """Raise UserError where ``file`` is not the one that the SHA256SUMS.txt beside it names; silent without one."""
    file = Path(file)
    if not (file.parent / SUMS_NAME).exists():
        return
    digest = read_sums(file.parent).get(file.name)
    if digest is not None and sha256(file) != digest:
        raise UserError(f"{file}: is not the file that its run wrote ({SUMS_NAME} names another checksum)")
