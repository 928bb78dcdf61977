"""Faces with their labels, in memory or as paths: what every feed, trainer and evaluation starts from."""

import dataclasses
import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import load_npz, save_npz
from ngd_fast.errors import UserError
from ngd_fast.faces.classes import CLASS_NAMES, LabelMap
from ngd_fast.faces.images import decode_all, longest_side
from ngd_fast.faces.table import read_csv, read_folder


@dataclass
class Faces:
    """N faces. Either ``images`` or ``paths`` is set. Rows of ``label_dist`` sum to 1, or are 0 where unlabelled.

    images      uint8 [N, H, W] or [N, H, W, 3]; None with paths
    paths       N image files; None with images
    label_dist  float32 [N, 8], over CLASS_NAMES
    labels      int64 [N]; -1 = unlabelled. Default: argmax of label_dist (of equal ones the first)
    names       N names; default: the row numbers
    subjects    N subject ids ("" = unknown), or None
    source      where the faces came from, for messages and reports
    true        label_dist and labels as they were before label noise, or None; the checksum is theirs

    Raises UserError for arrays that do not fit each other or label rows that do not sum to 1.
    """

    images: np.ndarray | None = None
    paths: list[str] | None = None
    label_dist: np.ndarray | None = None
    labels: np.ndarray | None = None
    names: list[str] | None = None
    subjects: list[str] | None = None
    class_names: tuple[str, ...] = CLASS_NAMES
    source: str = "faces"
    true: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)
    _longest_sides: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        where = self.source
        if (self.images is None) == (self.paths is None):
            raise TypeError("Faces: give either images or paths")
        if self.images is not None:
            self.images = np.asarray(self.images)
            _check_images(self.images, where)
        count = len(self)
        if self.labels is not None:
            self.labels = _as_labels(self.labels, where)
            if len(self.labels) != count:
                raise UserError(f"{where}: labels must be [{count}], are [{len(self.labels)}]")
            if (self.labels < -1).any() or (self.labels >= len(self.class_names)).any():
                raise UserError(f"{where}: labels must lie in [-1, {len(self.class_names)})")
        if self.label_dist is None:
            self.label_dist = np.zeros((count, len(self.class_names)), np.float32)
            if self.labels is not None:
                known = np.flatnonzero(self.labels >= 0)
                self.label_dist[known, self.labels[known]] = 1
        self.label_dist = _check_label_dist(self.label_dist, count, len(self.class_names), where)
        unlabelled = self.label_dist.sum(axis=1) == 0
        if self.labels is None:
            self.labels = np.where(unlabelled, -1, self.label_dist.argmax(axis=1)).astype(np.int64)
        self.names = [str(i) for i in range(count)] if self.names is None else list(self.names)
        for name in ("names", "subjects"):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise UserError(f"{where}: {len(value)} {name} for {count} images")

    def __len__(self) -> int:
        return len(self.paths) if self.images is None else len(self.images)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 over pixels (of path data: the files' bytes), label distributions and labels, in row order.

        Label noise leaves it as it is: it names the data, and what is cached for them does not depend on the noise.
        """
        digest = hashlib.sha256()
        if self.images is not None:
            digest.update(repr(self.images.shape).encode())
            digest.update(np.ascontiguousarray(self.images))
        else:
            for path in self.paths:
                content = Path(path).read_bytes()
                digest.update(len(content).to_bytes(8, "little"))
                digest.update(content)
        for values in self.true or (self.label_dist, self.labels):
            digest.update(np.ascontiguousarray(values))
        return digest.hexdigest()

    def longest_side(self, limit: int) -> int:
        """Of path data: longer side of the largest image, at most ``limit``; headers are read once for each limit."""
        if limit not in self._longest_sides:
            self._longest_sides[limit] = longest_side(self.paths, limit)
        return self._longest_sides[limit]

    @property
    def class_counts(self) -> np.ndarray:
        """int64 [8]: labelled faces of each class."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.class_names))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Faces":
        """The given rows, in the given order. A boolean mask of length N is taken too."""
        rows = np.asarray(indices)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        pick = lambda values: None if values is None else [values[i] for i in rows]  # noqa: E731
        return dataclasses.replace(
            self,
            images=None if self.images is None else self.images[rows],
            paths=pick(self.paths),
            label_dist=self.label_dist[rows],
            labels=self.labels[rows],
            names=pick(self.names),
            subjects=pick(self.subjects),
            true=self.true and (self.true[0][rows], self.true[1][rows]),
        )

    def decoded(self, side: int, *, grey: bool = False, boxes=None, skip_bad: bool = False) -> "Faces":
        """Path data with their pixels in memory, side x side; see :func:`ngd_fast.faces.images.decode_all`."""
        if self.paths is None:
            raise UserError(f"{self.source}: holds pixels already, so nothing can be read at another size; wanted "
                            "a list or a folder of image files")  # fmt: skip
        images, rows = decode_all(
            self.paths, side=side, grey=grey, boxes=boxes, skip_bad=skip_bad, desc=f"reading {self.source}"
        )
        return dataclasses.replace(self.subset(rows), images=images, paths=None)

    @classmethod
    def load(cls, path: str | Path, *, class_map=None, image_root: str | Path | None = None) -> "Faces":
        """Read an NPZ (images, label_dist, names), a CSV list, or a folder of class folders.

        class_map   JSON file or mapping {name: id} for a dataset whose labels are not this package's; for an NPZ it
                    gives the order of label_dist's columns
        image_root  folder that a CSV's paths start from; default: the CSV's own folder
        Raises UserError for everything that can be wrong with the files.
        """
        path = Path(path)
        if path.is_dir():
            return cls(**read_folder(path, class_map), source=str(path))
        if path.suffix.lower() == ".csv":
            return cls(**read_csv(path, class_map, image_root), source=str(path))
        if path.is_file() and path.suffix.lower() != ".npz" and not zipfile.is_zipfile(path):
            raise UserError(f"{path}: wanted an NPZ (.npz), a list (.csv) or a folder of class folders")
        return cls(**_read_npz(path, class_map), source=str(path))

    def save(self, path: str | Path) -> None:
        """Write an NPZ that :meth:`load` reads back: images, label_dist, labels, names (bytes), subjects if known."""
        if self.images is None:
            raise TypeError("Faces.save: path data have no images in memory")
        arrays = {
            "images": self.images,
            "label_dist": self.label_dist,
            "labels": self.labels,
            "names": np.array([name.encode() for name in self.names], np.bytes_),
        }
        if self.subjects is not None:
            arrays["subjects"] = np.array(self.subjects, np.str_)
        save_npz(path, arrays)


def _check_images(images: np.ndarray, where: str) -> None:
    fits = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if images.dtype != np.uint8 or not fits:
        raise UserError(f"{where}: images must be uint8 [N, H, W] or [N, H, W, 3], "
                        f"are {images.dtype} {list(images.shape)}")  # fmt: skip
    if 0 in images.shape:
        raise UserError(f"{where}: holds no images (shape {list(images.shape)})")


def _as_labels(labels, where: str) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{where}: labels must be integers [N], are {labels.dtype} {list(labels.shape)}")
    return labels.astype(np.int64)


def _check_label_dist(label_dist, count: int, classes: int, where: str) -> np.ndarray:
    label_dist = np.asarray(label_dist)
    if label_dist.shape != (count, classes) or label_dist.dtype.kind != "f":
        raise UserError(f"{where}: label_dist must be float [{count}, {classes}], "
                        f"is {label_dist.dtype} {list(label_dist.shape)}")  # fmt: skip
    sums = label_dist.sum(axis=1, dtype=np.float64)
    bad = ~((np.abs(sums - 1) <= 1e-3) | (label_dist == 0).all(axis=1)) | (label_dist < 0).any(axis=1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise UserError(
            f"{where}: {bad.sum()} rows of label_dist are no distribution; row {row} sums to {sums[row]:g} "
            f"(least entry {label_dist[row].min():g}), must sum to 1"
        )
    return label_dist.astype(np.float32, copy=False)


def _read_npz(path: Path, class_map) -> dict:
    arrays = load_npz(path, ("images",), rows=("images", "label_dist", "labels", "names", "subjects"))
    label_dist, labels = arrays.get("label_dist"), arrays.get("labels")
    if label_dist is None and labels is None:
        raise UserError(f"{path}: lacks label_dist (has {', '.join(arrays)})")
    if class_map is not None:
        label_dist, labels = _reorder(label_dist, labels, LabelMap.load(class_map), path)
    texts = {key: [_text(value) for value in arrays[key].ravel()] for key in ("names", "subjects") if key in arrays}
    return {"images": arrays["images"], "label_dist": label_dist, "labels": labels, **texts}


def _text(value) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _reorder(label_dist, labels, label_map: LabelMap, path: Path):
    """Columns and ids in the dataset's own order -> the taxonomy's."""
    if label_dist is not None:
        columns = sorted(label_map.by_id)
        label_map.require_distinct()
        if label_dist.ndim != 2 or label_dist.shape[1] != len(columns):
            raise UserError(f"{path}: label_dist has shape {list(label_dist.shape)}, "
                            f"{label_map.source} names {len(columns)} classes")  # fmt: skip
        moved = np.zeros((len(label_dist), len(CLASS_NAMES)), label_dist.dtype)
        moved[:, [label_map.by_id[column] for column in columns]] = label_dist
        label_dist = moved
    if labels is not None:
        labels = _as_labels(labels, str(path))
        unknown = sorted(set(np.unique(labels).tolist()) - {-1} - set(label_map.by_id))
        if unknown:
            raise UserError(f"{path}: label {unknown[0]} is not in the class map; {label_map.source} has "
                            f"{sorted(label_map.by_id)}")  # fmt: skip
        labels = np.array([label_map.by_id.get(int(label), -1) for label in labels], np.int64)
    return label_dist, labels
