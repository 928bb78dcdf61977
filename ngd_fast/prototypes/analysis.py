"""How well a bank covers the plane and keeps its bins apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ngd_fast.prototypes.bank import PrototypeBank, assign_bins


def cosine_matrix(bank: PrototypeBank) -> np.ndarray:
    """float64 [K, K] cosines between prototypes."""
    rows = bank.prototypes.double().numpy()
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows @ rows.T


def separation(bank: PrototypeBank) -> dict[str, float]:
    """From the bank alone, over the bins (or clusters) that have windows of their own.

    mean_cosine, max_cosine: between different bins; near 1 they look alike to Proto-KD's softmax.
    order: rank correlation between distance in the grid (of clusters: in the plane) and cosine distance; 1 where the
    plane's geometry is kept.
    Empty where fewer than three bins have windows.
    """
    from scipy.stats import spearmanr

    own = np.flatnonzero(~bank.empty)
    if len(own) < 3:
        return {}
    pairs = np.triu_indices(len(own), 1)
    cosine = cosine_matrix(bank)[np.ix_(own, own)][pairs]
    place = np.stack(np.divmod(own, bank.grid), axis=1) if bank.va is None else bank.places[own]
    distance = np.linalg.norm(place[pairs[0]] - place[pairs[1]], axis=1)
    result = {"mean_cosine": float(cosine.mean()), "max_cosine": float(cosine.max())}
    if np.ptp(distance) > 0 and np.ptp(cosine) > 0:
        result["order"] = float(spearmanr(distance, 1 - cosine).statistic)
    return result


def compared(bank: PrototypeBank) -> dict[str, Any]:
    """What banks of any layout are compared by.

    prototypes: K. coverage: the share of bins or clusters that have windows of their own. mean_distance, min_distance:
    1 - cosine between two different ones of these; None where there are fewer than two.
    """
    own = np.flatnonzero(~bank.empty)
    distance = 1 - cosine_matrix(bank)[np.ix_(own, own)][np.triu_indices(len(own), 1)]
    return {
        "layout": bank.layout,
        "prototypes": len(bank.prototypes),
        "coverage": len(own) / len(bank.prototypes),
        "mean_distance": float(distance.mean()) if len(distance) else None,
        "min_distance": float(distance.min()) if len(distance) else None,
    }


def silhouette(bank: PrototypeBank, features: np.ndarray, ratings: np.ndarray) -> float | None:
    """The simplified silhouette in cosine distance, from -1 to 1; None where fewer than two bins have windows.

    For each window with features [N, D] and ratings [N, 2]: a is the distance to its own bin's prototype, b to the
    nearest other one that has windows; the mean of (b - a) / max(a, b). 0: bins are not told apart.
    """
    own = np.flatnonzero(~bank.empty)
    if len(own) < 2:
        return None
    bins = assign_bins(ratings[:, 0], bank.grid) * bank.grid + assign_bins(ratings[:, 1], bank.grid)
    column = np.searchsorted(own, bins)
    if not np.array_equal(own[np.minimum(column, len(own) - 1)], bins):
        raise ValueError("ratings: some fall into bins that the bank calls empty; they are not the bank's windows")
    prototypes = bank.prototypes.double().numpy()[own]
    prototypes = prototypes / np.maximum(np.linalg.norm(prototypes, axis=1, keepdims=True), 1e-12)
    features = np.asarray(features, np.float64)
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    distance = 1 - features @ prototypes.T
    rows = np.arange(len(bins))
    a = distance[rows, column]
    distance[rows, column] = np.inf
    b = distance.min(axis=1)
    return float(np.mean((b - a) / np.maximum(np.maximum(a, b), 1e-12)))


def rating_levels(ratings: np.ndarray) -> int | None:
    """Number of levels of the coarsest equidistant scale over [-1, 1] that holds all ratings; None beyond 11.

    DREAMER's 1 to 5 gives 5, MAHNOB-HCI's 1 to 9 gives 9; sliders give None.
    """
    ratings = np.asarray(ratings, np.float64).ravel()
    for levels in range(2, 12):
        position = (ratings + 1) / 2 * (levels - 1)
        if np.abs(position - np.round(position)).max(initial=0) < 1e-4:
            return levels
    return None


def unreachable_bins(levels: int, grid: int) -> int:
    """Bins of a grid that no rating on an equidistant scale of ``levels`` can fall into, whatever the data.

    Five levels reach rows and columns 0, 1, 3, 5, 6 of a 7x7 grid: 24 of its 49 bins are empty by construction.
    """
    if levels < 2:
        raise ValueError(f"levels: must be at least 2, got {levels}")
    return grid**2 - len(set(assign_bins(np.linspace(-1, 1, levels), grid).tolist())) ** 2


def sweep_grids(
    features: np.ndarray, ratings: np.ndarray, grids: Sequence[int] = tuple(range(3, 10))
) -> list[dict[str, Any]]:
    """One row for each grid size: empty bins, those beyond the scale's reach, smallest own count, separation."""
    levels = rating_levels(ratings)
    rows = []
    for grid in grids:
        bank = PrototypeBank.build(features, ratings[:, 0], ratings[:, 1], grid=grid)
        rows.append(
            {
                "grid": grid,
                "bins": grid**2,
                "empty": int(bank.empty.sum()),
                "unreachable": unreachable_bins(levels, grid) if levels else 0,
                "levels": levels,
                "smallest": int(bank.counts[bank.counts > 0].min()),
                "silhouette": silhouette(bank, features, ratings),
                **separation(bank),
            }
        )
    return rows
