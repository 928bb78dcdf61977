"""The state of a training on disk: written aside, synced and renamed; read without unpickling; refused where it does
not belong to the run that asks for it."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ngd_fast.artifacts.files import atomic_path
from ngd_fast.errors import UserError
from ngd_fast.student.config import differing_keys
from ngd_fast.student.weights import load_torch

LAST_NAME = "student_last.ckpt"
_FORMAT = 1


def save_checkpoint(path: str | Path, state: Mapping, *, config: Mapping, checksums: Mapping[str, str]) -> None:
    """Write tensors and plain values with what they belong to: the configuration and its inputs' checksums.

    A crash or a full disk leaves the file that was there before.
    """
    content = {"format": _FORMAT, "config": dict(config), "checksums": dict(checksums), "state": dict(state)}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch's writer puts an error of its own over that of a full disk
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load_checkpoint(path: str | Path, *, config: Mapping, checksums: Mapping[str, str]) -> dict:
    """The state saved in ``path``, on the CPU.

    Raises UserError where the file is damaged, or was written by a run whose configuration (the keys are named) or
    whose files differ.
    """
    content = _read(Path(path))
    keys = differing_keys(content["config"], dict(config))
    if keys:
        values = ", ".join(f"{k} ({_value(content['config'], k)} there, {_value(config, k)} here)" for k in keys[:4])
        raise UserError(f"{path}: belongs to another configuration; it differs in {values}")
    for name in sorted(content["checksums"].keys() | checksums.keys()):
        if content["checksums"].get(name) != checksums.get(name):
            raise UserError(f"{path}: was trained with another {name}; its checksum differs")
    return content["state"]


def progress_of(path: str | Path) -> tuple[int, int]:
    """(finished epochs, steps of the next one) of the checkpoint in ``path``; (0, 0) where there is none."""
    if not Path(path).exists():
        return 0, 0
    progress = _read(Path(path))["state"]["progress"]
    return progress["epoch"], progress["step"]


def _read(path: Path) -> dict:
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    content = load_torch(path, "not a readable checkpoint; is it truncated?")
    known = isinstance(content, dict) and content.get("format") == _FORMAT
    parts = [content.get(name) for name in ("config", "checksums", "state")] if known else [None]
    progress = parts[-1].get("progress") if isinstance(parts[-1], dict) else None
    if (
        not all(isinstance(part, dict) and all(isinstance(key, str) for key in part) for part in parts)
        or not isinstance(progress, dict)
        or not all(type(progress.get(name)) is int and progress[name] >= 0 for name in ("epoch", "step"))
    ):
        raise UserError(f"{path}: is no checkpoint that this version of ngd_fast can continue")
    return content


def _value(config: Mapping, key: str):
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config
