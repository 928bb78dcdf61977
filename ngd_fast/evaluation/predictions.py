"""What a network said about a dataset: the one file that every metric, table and figure is computed from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import load_npz, parse_json, save_npz
from ngd_fast.errors import UserError

MAX_CLASSES = 100
"""Metrics are held for each pair of classes and resample."""


def is_name(text: str) -> bool:
    """Whether ``text`` can stand in a table: one line of at most 200 printable characters."""
    return isinstance(text, str) and 0 < len(text) <= 200 and text.isprintable()


@dataclass(frozen=True)
class Predictions:
    """Logits of N rows over C classes, with what is known about the rows. Checked when made.

    Raises UserError for shapes that do not fit each other, labels that are no integers in [-1, C), a class name that
    stands twice, and logits that are not finite.
    """

    logits: np.ndarray
    """[N, C] float32, before the softmax."""
    labels: np.ndarray
    """[N] int64 in [0, C); -1 marks a row without a label, which every metric leaves out."""
    names: list[str]
    """N names, one for each row, as in the dataset."""
    class_names: tuple[str, ...]
    """C names in the order of the columns."""
    dataset: str
    """What was predicted, for example "ferplus_valid"; stands in tables and figures."""
    label_dist: np.ndarray | None = None
    """[N, C] float32 distributions of the raters' votes, where known."""
    features: np.ndarray | None = None
    """[N, D] float32 L2-normalised features of the penultimate layer, where kept."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """How they were made: whether averaged with the mirror image, and the type that the network computed in."""

    def __post_init__(self):
        set_field = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        labels = np.asarray(self.labels)
        if labels.size and labels.dtype.kind not in "iu":
            raise UserError(f"predictions: labels must be integers, are {labels.dtype}")
        set_field("logits", np.ascontiguousarray(self.logits, dtype=np.float32))
        set_field("labels", np.ascontiguousarray(self.labels, dtype=np.int64))
        set_field("names", [str(name) for name in self.names])
        set_field("class_names", tuple(str(name) for name in self.class_names))
        for name in ("label_dist", "features"):
            if getattr(self, name) is not None:
                set_field(name, np.ascontiguousarray(getattr(self, name), dtype=np.float32))
        self._check()

    def _check(self) -> None:
        if self.logits.ndim != 2 or self.logits.shape[1] != len(self.class_names):
            raise UserError(
                f"predictions: logits must be [N, {len(self.class_names)}] (one column a class), "
                f"are {list(self.logits.shape)}"
            )
        if len(self.class_names) > MAX_CLASSES:
            raise UserError(f"predictions: {len(self.class_names)} classes, can be at most {MAX_CLASSES}")
        if len(set(self.class_names)) < len(self.class_names):
            raise UserError(f"predictions: a class name stands twice in {', '.join(self.class_names)}")
        unfit = next((name for name in (*self.class_names, self.dataset) if not is_name(name)), None)
        if unfit is not None:
            raise UserError(f"predictions: {unfit[:40]!r} is no name of a class or dataset")
        rows, classes = self.logits.shape
        for name in ("label_dist", "features"):
            if getattr(self, name) is not None and not np.isfinite(getattr(self, name)).all():
                raise UserError(f"predictions: {name} hold NaN or infinite values")
        wanted = {"labels": (rows,), "label_dist": (rows, classes)}
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise UserError(f"predictions: {name} must be {list(shape)}, is {list(value.shape)}")
        if self.features is not None and (self.features.ndim != 2 or len(self.features) != rows):
            raise UserError(f"predictions: features must be [{rows}, D], are {list(self.features.shape)}")
        if len(self.names) != rows:
            raise UserError(f"predictions: {len(self.names)} names for {rows} rows")
        wrong = np.flatnonzero((self.labels < -1) | (self.labels >= classes))
        if wrong.size:
            raise UserError(
                f"predictions: row {wrong[0]} has label {self.labels[wrong[0]]}; labels are 0 to {classes - 1}, "
                "or -1 for none"
            )
        bad = np.flatnonzero(~np.isfinite(self.logits).all(axis=1))
        if bad.size:
            raise UserError(
                f"predictions: {bad.size} of {rows} rows have NaN or infinite logits, the first is row {bad[0]} "
                f"({self.names[bad[0]]}); did the training diverge?"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def probabilities(self, temperature: float = 1.0) -> np.ndarray:
        """Softmax of logits / temperature: [N, C] float64, rows sum to 1. The paper evaluates at temperature 1."""
        return softmax(self.logits, temperature)

    def save(self, path: str | Path) -> None:
        """Write an NPZ; equal predictions give equal bytes."""
        arrays = {
            "logits": self.logits,
            "labels": self.labels,
            "names": np.array(self.names, dtype=np.str_),
            "class_names": np.array(self.class_names, dtype=np.str_),
            "dataset": np.array(self.dataset),
            "meta": np.array(json.dumps(dict(self.meta), sort_keys=True)),
        }
        for name in ("label_dist", "features"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        save_npz(path, arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Predictions":
        """Read what :meth:`save` wrote. Raises UserError naming the file for anything else."""
        rows = ("logits", "labels", "names", "label_dist", "features")
        arrays = load_npz(path, required=("logits", "labels", "names", "class_names", "dataset"), rows=rows)
        for name in ("names", "class_names"):
            if arrays[name].ndim != 1:
                raise UserError(f"{path}: {name} must be a list, has shape {list(arrays[name].shape)}")
        meta = parse_json(str(arrays["meta"]), f"{path}: meta") if "meta" in arrays else {}
        try:
            return cls(
                logits=arrays["logits"],
                labels=arrays["labels"],
                names=arrays["names"].tolist(),
                class_names=tuple(arrays["class_names"].tolist()),
                dataset=str(arrays["dataset"]),
                label_dist=arrays.get("label_dist"),
                features=arrays.get("features"),
                meta=meta,
            )
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Softmax over the last axis in float64. Raises ValueError for a temperature that is not above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, is {temperature}")
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=-1, keepdims=True)
    return scaled
