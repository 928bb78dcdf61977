"""Algorithm 1 of the paper (section 4.3): a grid of prototypes over the valence/arousal plane, and its file.

Bin ``(i, j)`` of a grid of ``G x G`` holds the windows whose valence is nearest to centre ``i`` and whose arousal is
nearest to centre ``j``; it is row ``k = i * G + j`` of every flat array here. A bank of clusters (``clusters.py``) has
no grid: its row ``k`` is a cluster, at a place ``va[k]`` of its own.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ngd_fast.artifacts.files import load_npz, parse_json, save_npz
from ngd_fast.errors import UserError

# Order of the checksum. class_prior and va are optional: va makes it a bank of clusters.
_ARRAYS = ("prototypes", "prior", "counts", "centers", "filled_from")
_OPTIONAL = ("class_prior", "va")
_EPS = 1e-12  # as torch.nn.functional.normalize


def bin_centers(grid: int) -> np.ndarray:
    """Centres of ``grid`` equal cells of [-1, 1], float32 [grid]; grid 5 gives -0.8, -0.4, 0, 0.4, 0.8."""
    if not isinstance(grid, int | np.integer) or isinstance(grid, bool) or not 1 <= grid <= 64:
        raise ValueError(f"grid: must be an integer from 1 to 64, got {grid!r}")
    return ((2 * np.arange(grid) + 1) / grid - 1).astype(np.float32)


def assign_bins(rating: np.ndarray, grid: int) -> np.ndarray:
    """Index of the nearest centre, int64 [N], for ratings in [-1, 1].

    Halfway between two centres the lower one is taken. A rating within 1e-6 of the halfway point counts as lying on
    it, so that 0.2 means the same in float32 and float64.
    """
    bin_centers(grid)
    rating = np.asarray(rating, np.float64)
    if rating.size and not (np.abs(rating) <= 1 + 1e-6).all():
        raise ValueError(f"rating: must lie in [-1, 1], got {rating[~(np.abs(rating) <= 1 + 1e-6)][0]}")
    # The cell borders are the halfway points: at equal spacing, nearest centre and containing cell are the same.
    position = (rating + 1) * grid / 2
    return np.clip(np.ceil(position - 1e-6 * grid / 2).astype(np.int64) - 1, 0, grid - 1)


@dataclass(frozen=True, eq=False)
class PrototypeBank:
    """K = G*G frozen prototypes in the teacher's feature space, and how many windows stand behind each.

    prototypes   float32 tensor [K, D], means of L2-normalised features (not normalised again; those of clusters are)
    prior        float32 tensor [K], (N_k + 1) / sum(N + 1); of clusters N_k / sum(N)
    counts       int64 array [G, G]; row = valence bin, column = arousal bin, both from low to high; of clusters [K]
    centers      float32 array [G], the same for valence and arousal; of clusters [0]
    filled_from  int64 array [K, K] of 0 and 1; row k names the bins whose mean is prototype k (itself if not empty)
    class_prior  float32 tensor [C, K] or None: a prior for each class instead of the global one
    meta         where it came from (JSON): grid, split, subjects, checksums of teacher and maps
    va           float32 array [K, 2] or None: for a bank of clusters, valence and arousal of each
    """

    prototypes: torch.Tensor
    prior: torch.Tensor
    counts: np.ndarray
    centers: np.ndarray
    filled_from: np.ndarray
    class_prior: torch.Tensor | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    va: np.ndarray | None = None

    def __post_init__(self):
        for name in ("prototypes", "prior", "class_prior"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, torch.as_tensor(value).detach().to("cpu", torch.float32).contiguous())
        types = {"counts": np.int64, "centers": np.float32, "filled_from": np.int64}
        for name, dtype in (types if self.va is None else {**types, "va": np.float32}).items():
            if np.asarray(getattr(self, name)).dtype.kind not in ("iu" if dtype is np.int64 else "f"):
                raise ValueError(f"{name}: must be {dtype.__name__}, is {np.asarray(getattr(self, name)).dtype}")
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype))
        self._check()

    def _check(self) -> None:
        if not isinstance(self.meta, Mapping):
            raise ValueError(f"meta: must be a mapping, is a {type(self.meta).__name__}")
        if self.va is not None:
            self._check_clusters(self.va)
        grid = len(self.centers) if self.centers.ndim == 1 else 0
        k = grid * grid if self.va is None else len(self.va)
        beside = f"{grid} centers" if self.va is None else f"{k} places"
        if self.prototypes.ndim != 2 or len(self.prototypes) != k or not k or not self.prototypes.shape[1]:
            raise ValueError(f"prototypes: must be [{k}, D] beside {beside}, is {list(self.prototypes.shape)}")
        counts = (grid, grid) if self.va is None else (k,)
        for name, shape in (("prior", (k,)), ("counts", counts), ("filled_from", (k, k))):
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name}: must be {list(shape)}, is {list(getattr(self, name).shape)}")
        if self.va is None and not np.allclose(self.centers, bin_centers(grid), atol=1e-6):
            raise ValueError(f"centers: must be {bin_centers(grid).tolist()}, are {self.centers.tolist()}")
        if not torch.isfinite(self.prototypes).all():
            raise ValueError("prototypes: hold NaN or infinite values")
        if (self.counts < 0).any():
            raise ValueError("counts: must not be negative")
        if not np.isin(self.filled_from, (0, 1)).all() or not self.filled_from.any(axis=1).all():
            raise ValueError("filled_from: must be 0 or 1 and name a source for every bin")
        _check_distribution("prior", self.prior)
        if self.class_prior is not None:
            if self.class_prior.ndim != 2 or self.class_prior.shape[1] != k or not len(self.class_prior):
                raise ValueError(f"class_prior: must be [C, {k}], is {list(self.class_prior.shape)}")
            _check_distribution("class_prior", self.class_prior)

    def _check_clusters(self, va: np.ndarray) -> None:
        if va.ndim != 2 or va.shape[1] != 2:
            raise ValueError(f"va: must be [{len(self.prototypes)}, 2], is {list(va.shape)}")
        if not (np.abs(va) <= 1).all():
            raise ValueError("va: must lie in [-1, 1]")
        if self.centers.shape != (0,):
            raise ValueError(f"centers: a bank of clusters has none, are {list(self.centers.shape)}")
        if not self.counts.all():
            raise ValueError("counts: a cluster without windows")

    @property
    def layout(self) -> str:
        """What its prototypes stand for: bins of a grid ("5x5") or clusters ("kmeans 25")."""
        return f"{len(self.centers)}x{len(self.centers)}" if self.va is None else f"kmeans {len(self.va)}"

    @property
    def grid(self) -> int:
        """How many bins each axis has. Raises UserError for a bank of clusters."""
        if self.va is not None:
            raise UserError(f"this bank has no grid: its prototypes are {len(self.va)} clusters (--layout kmeans)")
        return len(self.centers)

    @property
    def places(self) -> np.ndarray:
        """float32 [K, 2]: valence and arousal of each prototype, the bin's centre or the cluster's mean rating."""
        if self.va is not None:
            return self.va
        return np.stack([np.repeat(self.centers, self.grid), np.tile(self.centers, self.grid)], axis=1)

    @property
    def embedding_dim(self) -> int:
        """D, the length of a prototype."""
        return self.prototypes.shape[1]

    @property
    def empty(self) -> np.ndarray:
        """bool [K]: the bins without a window of their own."""
        return self.counts.reshape(-1) == 0

    @classmethod
    def build(
        cls,
        features: torch.Tensor | np.ndarray,
        valence: torch.Tensor | np.ndarray,
        arousal: torch.Tensor | np.ndarray,
        *,
        grid: int = 5,
        fill_radius: float | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> "PrototypeBank":
        """Algorithm 1, over ``grid`` x ``grid`` bins.

        features [N, D], the teacher's penultimate activations, floating point; valence, arousal [N] in [-1, 1] or NaN.
        Windows without both ratings are left out and counted in ``meta["unlabelled"]``; ``meta`` goes into the file.
        An empty bin takes the mean over the prototypes of the nearest non-empty bins (Euclidean distance between bin
        indices, ties averaged); where none lies within ``fill_radius`` (None: no limit), the mean of all windows.

        Raises ValueError for wrong shapes or values, UserError where no window has both ratings.
        """
        if fill_radius is not None and not fill_radius >= 1:
            raise ValueError(f"fill_radius: must be at least 1 (one bin) or None, got {fill_radius!r}")
        centers = bin_centers(grid)
        rows, ratings, unlabelled = rated_units(features, valence, arousal)
        bins = assign_bins(ratings[:, 0], grid) * grid + assign_bins(ratings[:, 1], grid)
        counts = np.bincount(bins, minlength=grid * grid)
        prototypes = np.stack([rows[bins == k].mean(axis=0) if n else rows[0] * 0 for k, n in enumerate(counts)])
        filled_from = _sources(counts, grid, fill_radius)
        overall = rows.mean(axis=0)
        for k in np.flatnonzero(counts == 0):
            prototypes[k] = prototypes[filled_from[k] == 1].mean(axis=0) if filled_from[k].any() else overall
        # The mean of all windows comes from every bin that has one.
        filled_from[~filled_from.any(axis=1)] = counts > 0
        return cls(
            prototypes=torch.from_numpy(prototypes.astype(np.float32)),
            prior=torch.from_numpy(((counts + 1) / (counts + 1).sum()).astype(np.float32)),
            counts=counts.reshape(grid, grid),
            centers=centers,
            filled_from=filled_from,
            meta={
                **(meta or {}),
                "grid": int(grid),
                "windows": len(rows),
                "unlabelled": unlabelled,
                "fill_radius": fill_radius,
            },
        )

    def with_class_prior(self, class_prior: torch.Tensor, meta: Mapping[str, Any]) -> "PrototypeBank":
        """The same bank with a prior [C, K] for each class; ``meta`` says how it was made."""
        return replace(self, class_prior=class_prior, meta={**self.meta, "class_prior": dict(meta)})

    def save(self, path: str | Path) -> None:
        """Write the NPZ. Equal banks give equal bytes."""
        arrays = self._arrays()
        text = json.dumps(self.meta, sort_keys=True, allow_nan=False)
        save_npz(path, {**arrays, "meta": np.array(text), "sha256": np.array(_checksum(arrays, text))})

    @classmethod
    def load(cls, path: str | Path, *, embedding_dim: int | None = None) -> "PrototypeBank":
        """Read what :meth:`save` wrote to ``path``; ``embedding_dim`` is the dimension wanted, if any.

        Raises UserError for a file that is missing, truncated, changed since it was saved, of wrong shapes, or of
        another dimension.
        """
        arrays = load_npz(path, required=(*_ARRAYS, "meta", "sha256"))
        text, recorded = str(arrays.pop("meta")), str(arrays.pop("sha256"))
        meta = parse_json(text, f"{path}: meta")
        unknown = sorted(set(arrays) - {*_ARRAYS, *_OPTIONAL})
        if unknown:
            raise UserError(f"{path}: not a bank of prototypes (unknown array {', '.join(unknown)})")
        actual = _checksum(arrays, text)
        if actual != recorded:
            raise UserError(
                f"{path}: changed since it was saved (content checksum {actual[:12]}, recorded {recorded[:12]});"
                " build it again"
            )
        try:
            bank = cls(**arrays, meta=meta)  # type: ignore[arg-type]  # __post_init__ makes tensors of arrays
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not a bank of prototypes ({error})") from None
        if embedding_dim is not None and bank.embedding_dim != embedding_dim:
            raise UserError(
                f"{path}: prototypes have {bank.embedding_dim} dimensions, the features have {embedding_dim};"
                " both must be the same"
            )
        return bank

    @property
    def checksum(self) -> str:
        """SHA-256 of the content (arrays and meta), the one that the file records."""
        return _checksum(self._arrays(), json.dumps(self.meta, sort_keys=True, allow_nan=False))

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {name: np.asarray(getattr(self, name)) for name in _ARRAYS}
        if self.class_prior is not None:
            arrays["class_prior"] = self.class_prior.numpy()
        if self.va is not None:
            arrays["va"] = self.va
        return arrays


def rated_units(
    features: torch.Tensor | np.ndarray, valence: torch.Tensor | np.ndarray, arousal: torch.Tensor | np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Of the windows with both ratings: L2-normalised features float64 [n, D] and ratings float64 [n, 2]; and how many
    have not both.

    Arguments and errors as for :meth:`PrototypeBank.build`.
    """
    rows = _array("features", features)
    ratings = [_array("valence", valence), _array("arousal", arousal)]
    if rows.ndim != 2 or not rows.shape[1]:
        raise ValueError(f"features: must be [N, D], have shape {rows.shape}")
    for name, rating in zip(("valence", "arousal"), ratings):
        if rating.shape != (len(rows),):
            raise ValueError(f"{name}: must be [{len(rows)}] as features has rows, is {list(rating.shape)}")
    known = ~(np.isnan(ratings[0]) | np.isnan(ratings[1]))
    if not known.any():
        raise UserError(f"none of {len(rows)} windows has both valence and arousal; prototypes need ratings")
    rows = rows[known]
    if not np.isfinite(rows).all():
        raise ValueError(f"features: NaN or infinite in {(~np.isfinite(rows).all(axis=1)).sum()} rows")
    units = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _EPS)
    return units, np.stack(ratings, axis=1)[known], int((~known).sum())


def _array(name: str, value: torch.Tensor | np.ndarray) -> np.ndarray:
    """float64 on the host: the means must not depend on how many windows a bin has."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: must be an array or tensor of numbers, is a {type(value).__name__}") from None


def _sources(counts: np.ndarray, grid: int, fill_radius: float | None) -> np.ndarray:
    """[K, K] of 0 and 1: each bin's nearest non-empty bins within the radius; a row of zeros where there are none."""
    index = np.stack(np.divmod(np.arange(grid * grid), grid), axis=1)
    # Squared distances are integers: ties are exact.
    squared = ((index[:, None] - index[None]) ** 2).sum(axis=2)
    squared = np.where(counts[None] > 0, squared, np.iinfo(np.int64).max)
    sources = squared == squared.min(axis=1, keepdims=True)
    if fill_radius is not None:
        sources &= squared <= fill_radius**2
    return sources.astype(np.int64)


def _checksum(arrays: Mapping[str, np.ndarray], meta: str) -> str:
    digest = hashlib.sha256()
    for name in (*_ARRAYS, *_OPTIONAL):
        if name in arrays:
            array = np.ascontiguousarray(arrays[name])
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.tobytes())
    digest.update(meta.encode())
    return digest.hexdigest()


def _check_distribution(name: str, value: torch.Tensor) -> None:
    sums = value.double().sum(dim=-1)
    if not torch.isfinite(value).all() or (value < 0).any() or (sums - 1).abs().max() > 1e-4:
        raise ValueError(f"{name}: must be probabilities that sum to 1, sums to {sums.flatten()[:3].tolist()}")
