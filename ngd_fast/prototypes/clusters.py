"""Prototypes without a grid: clusters of the teacher's features instead of bins of the valence/arousal plane."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ngd_fast.errors import UserError
from ngd_fast.prototypes.bank import PrototypeBank, rated_units


def build_clusters(
    features: torch.Tensor | np.ndarray,
    valence: torch.Tensor | np.ndarray,
    arousal: torch.Tensor | np.ndarray,
    *,
    k: int = 25,
    seed: int = 0,
    meta: Mapping[str, Any] | None = None,
) -> PrototypeBank:
    """A bank of ``k`` clusters of windows: k-means over their L2-normalised features, 10 starts drawn by ``seed``.

    features [N, D], valence and arousal [N] as for :meth:`PrototypeBank.build`, windows without both ratings are left
    out. prototypes float32 [k, D] are the members' means, normalised; prior float32 [k] their share of the windows; va
    float32 [k, 2] their mean ratings. Clusters are ordered by valence, then arousal. The same bits for the same seed.

    Raises ValueError for wrong shapes or values, UserError where no window has both ratings or ``k`` is above the
    number of different windows.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 2:
        raise ValueError(f"k: must be an integer of at least 2, got {k!r}")
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: must be an integer from 0 to below 2^32, got {seed!r}")
    units, ratings, unlabelled = rated_units(features, valence, arousal)
    if not (np.abs(ratings) <= 1 + 1e-6).all():
        raise ValueError(f"rating: must lie in [-1, 1], got {ratings[~(np.abs(ratings) <= 1 + 1e-6)][0]}")
    different = len(np.unique(units, axis=0))
    if k > different:
        raise UserError(f"k {k}: there are only {different} different windows with ratings; choose at most as many")
    with threadpool_limits(1):  # threads would add their sums in any order
        member = KMeans(n_clusters=int(k), n_init=10, random_state=int(seed)).fit(units).labels_
    counts = np.bincount(member, minlength=k)
    if not counts.all():
        raise UserError(f"k {k}: the windows are so alike that {(counts == 0).sum()} clusters stay empty; choose fewer")
    va = np.stack([ratings[member == c].mean(axis=0) for c in range(k)]).clip(-1, 1).astype(np.float32)
    means = np.stack([units[member == c].mean(axis=0) for c in range(k)])
    order = np.lexsort((va[:, 1], va[:, 0]))
    prototypes = torch.nn.functional.normalize(torch.from_numpy(means[order]), dim=1)
    return PrototypeBank(
        prototypes=prototypes.float(),
        prior=torch.from_numpy((counts / counts.sum())[order].astype(np.float32)),
        counts=counts[order],
        centers=np.zeros(0, np.float32),
        filled_from=np.eye(k, dtype=np.int64),
        va=va[order],
        meta={
            **(meta or {}),
            "layout": "kmeans",
            "k": int(k),
            "seed": int(seed),
            "windows": len(units),
            "unlabelled": unlabelled,
        },
    )
