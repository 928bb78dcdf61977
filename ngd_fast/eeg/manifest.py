"""The file between EEG and teacher: ``NAME_topomaps_all.npz`` and its manifest ``NAME_topomaps_manifest.csv``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ngd_fast.artifacts.files import load_npz, parse_json, save_npz, write_text
from ngd_fast.errors import UserError

SUFFIX = "_topomaps_all.npz"
MANIFEST_SUFFIX = "_topomaps_manifest.csv"

_ROW_FIELDS = ("valence", "arousal", "subject", "trial", "window")
_ARRAYS = ("maps", "power", *_ROW_FIELDS, "bands", "channels", "mask", "meta")


@dataclass
class Topomaps:
    """Topographic maps of N windows, one image for each frequency band.

    maps      float32 [N, bands, H, W] in [0, 1]; row 0 is the back of the head, column 0 its left; 0 outside ``mask``
    power     float32 [N, channels, bands], the band power (or given features) before normalisation
    valence   float32 [N] in [-1, 1]; NaN where the window has no label, and then arousal is NaN too
    arousal   float32 [N] in [-1, 1]
    subject, trial, window   int64 [N], the dataset's own numbers; window is the place within the trial
    bands, channels          unicode [bands], [channels]
    mask      bool [H, W], True inside the head
    meta      where all of it came from: a mapping that JSON can hold

    Raises ValueError for shapes that do not fit together or values outside their range.
    """

    maps: np.ndarray
    power: np.ndarray
    valence: np.ndarray
    arousal: np.ndarray
    subject: np.ndarray
    trial: np.ndarray
    window: np.ndarray
    bands: np.ndarray
    channels: np.ndarray
    mask: np.ndarray
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.maps = np.asarray(self.maps, np.float32)
        self.power = np.asarray(self.power, np.float32)
        self.valence = np.asarray(self.valence, np.float32)
        self.arousal = np.asarray(self.arousal, np.float32)
        for name in ("subject", "trial", "window"):
            setattr(self, name, np.asarray(getattr(self, name), np.int64))
        self.bands = np.asarray(self.bands, np.str_)
        self.channels = np.asarray(self.channels, np.str_)
        self.mask = np.asarray(self.mask, np.bool_)
        self._check()

    def _check(self) -> None:
        if self.maps.ndim != 4:
            raise ValueError(f"maps: must be [N, bands, H, W], has shape {self.maps.shape}")
        n, bands, height, width = self.maps.shape
        if not isinstance(self.meta, Mapping):
            raise ValueError(f"meta: must be a mapping, is a {type(self.meta).__name__}")
        for name in ("bands", "channels"):
            if len(set(getattr(self, name).ravel())) < getattr(self, name).size:
                raise ValueError(f"{name}: one stands twice in {', '.join(getattr(self, name).ravel())}")
        for name, shape in (
            ("power", (n, len(self.channels), bands)),
            ("bands", (bands,)),
            ("mask", (height, width)),
            *((name, (n,)) for name in _ROW_FIELDS),
        ):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: must have shape {shape} beside {n} maps, has {getattr(self, name).shape}")
        for name in ("maps", "power"):
            array = getattr(self, name)
            # One reduction at a time: a boolean copy of all maps would be a quarter of their size again.
            if array.size and not np.isfinite([array.min(), array.max()]).all():
                rows = np.flatnonzero(~np.isfinite(array.reshape(n, -1)).all(axis=1))
                raise ValueError(f"{name}: NaN or infinite in {len(rows)} of {n} rows, first row {rows[0]}")
        if self.maps.size and (self.maps.min() < 0 or self.maps.max() > 1):
            raise ValueError(f"maps: must lie in [0, 1], lie in [{self.maps.min():g}, {self.maps.max():g}]")
        for name in ("valence", "arousal"):
            rating = getattr(self, name)
            if (np.abs(rating) > 1).any():
                raise ValueError(f"{name}: must lie in [-1, 1] or be NaN, row {np.argmax(np.abs(rating) > 1)} does not")
        if (np.isnan(self.valence) != np.isnan(self.arousal)).any():
            raise ValueError("valence and arousal must be NaN in the same rows")

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def labelled(self) -> np.ndarray:
        """bool [N]: the rows with valence and arousal."""
        return ~np.isnan(self.valence)

    def subset(self, rows: np.ndarray) -> "Topomaps":
        """The given rows (indices or a boolean mask) with the same bands, channels, mask and meta."""
        picked = {name: getattr(self, name)[rows] for name in ("maps", "power", *_ROW_FIELDS)}
        return Topomaps(**picked, bands=self.bands, channels=self.channels, mask=self.mask, meta=self.meta)

    def save(self, folder: str | Path, name: str) -> Path:
        """Write the NPZ and the manifest into ``folder``; returns the NPZ's path."""
        path = Path(folder) / f"{name}{SUFFIX}"
        arrays = {key: getattr(self, key) for key in _ARRAYS[:-1]}
        arrays["meta"] = np.array(json.dumps(self.meta, sort_keys=True, allow_nan=False))
        save_npz(path, arrays)
        rows = [
            f"{i},{','.join(_cell(getattr(self, key)[i]) for key in _MANIFEST_COLUMNS)}\n" for i in range(len(self))
        ]
        write_text(Path(folder) / f"{name}{MANIFEST_SUFFIX}", f"row,{','.join(_MANIFEST_COLUMNS)}\n" + "".join(rows))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Topomaps":
        """Read what :meth:`save` wrote. Raises UserError for a file that is missing, truncated or does not fit."""
        arrays = load_npz(path, required=_ARRAYS, rows=("maps", "power", *_ROW_FIELDS))
        meta = parse_json(str(arrays["meta"]), f"{path}: meta")
        for name in ("subject", "trial", "window"):
            if arrays[name].dtype.kind not in "iu":
                raise UserError(f"{path}: {name} must be integers, are {arrays[name].dtype}")
        try:
            return cls(**{key: arrays[key] for key in _ARRAYS[:-1]}, meta=meta)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not a file of topomaps ({error})") from None


_MANIFEST_COLUMNS = ("subject", "trial", "window", "valence", "arousal")


def _cell(value) -> str:
    """Integers as they are, ratings with the fewest digits that give the float32 back, NaN as an empty cell."""
    if isinstance(value, np.integer):
        return str(int(value))
    return "" if np.isnan(value) else str(value)
