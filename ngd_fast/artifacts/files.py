"""Reading and writing files so that a crash or a full disk never leaves half of one, and nothing is unpickled."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ngd_fast.errors import UserError

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


def read_json(path: str | Path) -> Any:
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def save_npz(path: str | Path, arrays: Mapping[str, np.ndarray], *, compress: bool = False) -> None:
    """Write an NPZ whose bytes depend on the arrays alone (NumPy stamps no time into it). No object arrays."""
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise TypeError(f"{name}: object arrays would have to be pickled")
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            (np.savez_compressed if compress else np.savez)(file, **arrays)


def load_npz(path: str | Path, required: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Read all arrays of an NPZ, without pickle. Missing, truncated or incomplete files are UserErrors."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, wanted an NPZ file")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not an NPZ file; is it truncated?")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in required if name not in archive.files]
            if missing:
                raise UserError(f"{path}: lacks {', '.join(missing)} (has {', '.join(archive.files) or 'nothing'})")
            return {name: archive[name] for name in archive.files}
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, NotImplementedError) as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path}: holds an array of Python objects, which is not unpickled; save texts with "
                "array.astype(str), numbers with a numeric dtype"
            ) from None
        raise UserError(f"{path}: not a readable NPZ file ({error}); is it truncated?") from None


def require_free(folder: str | Path, *, resume: bool | None = None) -> None:
    """Raise UserError where a run cannot be written to ``folder``: it is a file, or holds something already.

    ``resume``: whether the run in it is to be continued; None for runs that cannot be.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file")
    if not resume and folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
        remedy = "" if resume is None else "continue that run with --resume or "
        raise UserError(f"--out {folder}: is not empty; {remedy}choose another folder")


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
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{folder}: has no {SUMS_NAME}; is it a finished run?") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no list of checksums ({error})") from None
    if not text.endswith("\n"):
        raise UserError(f"{path}: ends in the middle of a line; is it truncated?")
    sums = {}
    for number, line in enumerate(text.splitlines(), 1):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            raise UserError(f"{path}: line {number} is not a checksum line")
        sums[name] = digest
    return sums


def check_sums(folder: str | Path) -> list[str]:
    """Compare a folder with its SHA256SUMS.txt; one line for each file that is missing or changed."""
    problems = []
    for name, digest in read_sums(folder).items():
        path = Path(folder) / name
        if not path.is_file():
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
