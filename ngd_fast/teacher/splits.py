"""Splits by subject: no subject's windows stand on two sides."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import write_json
from ngd_fast.errors import UserError


@dataclass(frozen=True)
class Split:
    """Subjects (int) that train, that choose the epoch (validation), and that are only reported on (test)."""

    name: str
    train: tuple[int, ...]
    validation: tuple[int, ...] = ()
    test: tuple[int, ...] = ()

    def __post_init__(self):
        for side in ("train", "validation", "test"):
            object.__setattr__(self, side, tuple(sorted(int(s) for s in getattr(self, side))))
        every = [*self.train, *self.validation, *self.test]
        twice = sorted({s for s in every if every.count(s) > 1})
        if twice:
            raise ValueError(f"split {self.name}: subjects {twice} stand on two sides")
        if not self.train:
            raise ValueError(f"split {self.name}: no subject is left to train on")


def fixed_split(
    subjects: Sequence[int], *, validation: Sequence[int] = (), fraction: float = 0.25, seed: int = 0
) -> Split:
    """Train and validation subjects: those named, or a ``fraction`` (at least one) drawn by ``seed``."""
    subjects = np.unique(np.asarray(subjects, np.int64))
    if len(subjects) < 2:
        raise UserError(f"a split by subject needs at least 2 labelled subjects, the maps have {len(subjects)}")
    if len(validation):
        unknown = sorted(set(map(int, validation)) - set(subjects.tolist()))
        if unknown:
            raise UserError(f"validation subjects {unknown} have no labelled window; known: {subjects.tolist()}")
        if len(set(validation)) == len(subjects):
            raise UserError("every labelled subject is a validation subject; leave at least one to train on")
        chosen = np.asarray(sorted(set(validation)), np.int64)
    else:
        chosen = _draw(subjects, fraction, seed)
    return Split("fixed", tuple(np.setdiff1d(subjects, chosen)), tuple(chosen))


def kfold(subjects: Sequence[int], folds: int, *, validation_fraction: float = 0.0, seed: int = 0) -> list[Split]:
    """``folds`` splits whose test subjects are disjoint and cover all; sizes differ by at most one.

    ``validation_fraction`` of each fold's remaining subjects (at least one, unless 0) becomes its validation side.
    """
    subjects = np.unique(np.asarray(subjects, np.int64))
    if folds < 2 or folds > len(subjects):
        raise UserError(f"{folds} folds: must be from 2 to the number of labelled subjects, {len(subjects)}")
    order = np.random.default_rng(seed).permutation(subjects)
    return [
        _with_validation(f"fold{i}", subjects, part, validation_fraction, (seed, i))
        for i, part in enumerate(np.array_split(order, folds))
    ]


def leave_one_out(subjects: Sequence[int], *, validation_fraction: float = 0.0, seed: int = 0) -> list[Split]:
    """One split for each subject, which is its test side (LOSO)."""
    subjects = np.unique(np.asarray(subjects, np.int64))
    if len(subjects) < 2:
        raise UserError(f"leaving one subject out needs at least 2 labelled subjects, the maps have {len(subjects)}")
    return [
        _with_validation(f"subject{s}", subjects, np.array([s]), validation_fraction, (seed, i))
        for i, s in enumerate(subjects)
    ]


def _with_validation(name, subjects, test, fraction, seed) -> Split:
    rest = np.setdiff1d(subjects, test)
    if fraction and len(rest) < 2:
        raise UserError(f"{name}: {len(rest)} subject is left to train and to choose the epoch; needs more subjects")
    chosen = _draw(rest, fraction, seed) if fraction else rest[:0]
    return Split(name, tuple(np.setdiff1d(rest, chosen)), tuple(chosen), tuple(test))


def _draw(subjects: np.ndarray, fraction: float, seed) -> np.ndarray:
    size = min(max(1, round(fraction * len(subjects))), len(subjects) - 1)
    return np.random.default_rng(seed).choice(subjects, size, replace=False)


def save_splits(path: str | Path, scheme: str, splits: Sequence[Split]) -> None:
    write_json(path, {"scheme": scheme, "splits": [asdict(split) for split in splits]})
