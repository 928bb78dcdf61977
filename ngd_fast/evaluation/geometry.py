"""The geometry of the 256-D features: what D-Geo contracts, what Proto-KD aligns, what is read from it."""

from collections.abc import Sequence

import numpy as np

from ngd_fast.errors import UserError
from ngd_fast.evaluation.predictions import Predictions
from ngd_fast.evaluation.results import Result

FOLDS = 5
NEIGHBOURS = 20


def class_geometry(features: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """What D-Geo acts on, over a whole dataset instead of a batch (section 4.3).

    ``variance`` [C]: mean squared distance of a class's unit features to their mean, NaN for a class without rows;
    ``distance`` [C, C]: Euclidean distance between class means; ``nearest`` [C]: distance to the nearest other mean.
    """
    features = unit_rows(features)
    means = np.full((classes, features.shape[1]), np.nan)
    variance = np.full(classes, np.nan)
    for c in np.unique(labels[labels >= 0]):
        rows = features[labels == c]
        means[c] = rows.mean(axis=0)
        variance[c] = ((rows - means[c]) ** 2).sum(axis=1).mean()
    distance = np.linalg.norm(means[:, None] - means[None], axis=-1)
    others = np.where(np.eye(classes, dtype=bool) | np.isnan(distance), np.inf, distance)
    nearest = others.min(axis=1)
    return {"variance": variance, "distance": distance, "nearest": np.where(np.isfinite(nearest), nearest, np.nan)}


def unit_rows(features: np.ndarray) -> np.ndarray:
    """float64 rows of length 1; a zero row stays."""
    features = np.asarray(features, dtype=np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def effective_rank(features: np.ndarray) -> float:
    """exp of the entropy of the covariance's normalised eigenvalues (Roy & Vetterli, 2007); 1 to D."""
    values = np.linalg.eigvalsh(np.cov(features, rowvar=False))
    shares = np.maximum(values, 0) / max(np.maximum(values, 0).sum(), 1e-300)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def principal_angles(features: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """Angles in degrees, ascending, between the leading eigenspace of the features' covariance and the span of the
    prototypes about their mean, both of the rank that the prototypes have."""
    from scipy.linalg import subspace_angles

    centred = np.asarray(prototypes, np.float64) - np.mean(prototypes, axis=0, dtype=np.float64)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    rank = int((sizes > 1e-6 * sizes[0]).sum()) if sizes[0] > 0 else 0
    rank = min(rank, min(features.shape) - 1)
    if rank == 0:
        return np.empty(0)
    _, vectors = np.linalg.eigh(np.cov(features, rowvar=False))
    return np.sort(np.degrees(subspace_angles(vectors[:, -rank:], directions[:rank].T)))


def random_angles(dimension: int, rank: int, *, draws: int = 20, seed: int = 0) -> np.ndarray:
    """What :func:`principal_angles` gives on average for two random subspaces: what there is without any alignment."""
    from scipy.linalg import subspace_angles

    rng = np.random.default_rng(seed)
    pairs = (rng.normal(size=(2, dimension, rank)) for _ in range(draws))
    return np.mean([np.sort(np.degrees(subspace_angles(a, b))) for a, b in pairs], axis=0)


def probe_accuracy(features: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> dict[str, float]:
    """Accuracy of a linear probe (logistic regression) and of 20 nearest neighbours, in 5 stratified folds.

    Both are fitted on the other folds' rows of the same dataset, so they say what the features hold and nothing about
    training faces. Classes with fewer rows than folds are left out.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    counts = np.bincount(labels[labels >= 0])
    kept = np.isin(labels, np.flatnonzero(counts >= FOLDS))
    features, labels = unit_rows(features)[kept], labels[kept]
    if len(np.unique(labels)) < 2:
        return {}
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    models = {
        "linear_probe": LogisticRegression(C=10.0, max_iter=1000),
        "knn": KNeighborsClassifier(min(NEIGHBOURS, len(labels) // 2)),
    }
    return {name: float(cross_val_score(m, features, labels, cv=folds).mean()) for name, m in models.items()}


def describe_features(
    predictions: Predictions,
    prototypes: np.ndarray | None = None,
    *,
    contracted: Sequence[int] = (1, 2),
    seed: int = 0,
) -> dict:
    """One network's numbers, as fractions and degrees, ready for JSON.

    ``within_variance`` (mean over classes), ``within_variance_contracted`` (over the classes whose variance D-Geo
    caps), ``margin_min`` and ``margin_mean`` (distance of a class mean to the nearest other), ``effective_rank``,
    ``linear_probe``, ``knn``; with ``prototypes`` [K, D] ``angle_mean`` and ``angle_min`` of the principal angles and
    ``angle_random``, the mean that two random subspaces have. Absent where there is nothing to compute it from.
    """
    known = predictions.labels >= 0
    if predictions.features is None:
        raise ValueError("predictions: features were not kept")
    features, labels = unit_rows(predictions.features[known]), predictions.labels[known]
    shape = class_geometry(features, labels, len(predictions.class_names))
    variance, nearest = shape["variance"], shape["nearest"]
    result = {
        "within_variance": np.nanmean(variance),
        "within_variance_contracted": np.nanmean(variance[list(contracted)])
        if np.isfinite(variance[list(contracted)]).any() else np.nan,
        "margin_min": np.nanmin(nearest) if np.isfinite(nearest).any() else np.nan,
        "margin_mean": np.nanmean(nearest) if np.isfinite(nearest).any() else np.nan,
        "effective_rank": effective_rank(features),
        **probe_accuracy(features, labels, seed=seed),
    }  # fmt: skip
    if prototypes is not None:
        angles = principal_angles(features, unit_rows(prototypes))
        if len(angles):
            by_chance = random_angles(features.shape[1], len(angles), seed=seed)
            result |= {"angle_mean": angles.mean(), "angle_min": angles[0], "angle_random": by_chance.mean()}
    return {name: float(value) for name, value in result.items() if np.isfinite(value)}


def describe_runs(results: Sequence[Result], prototypes: np.ndarray | None = None, *, seed: int = 0) -> dict:
    """{variant: [:func:`describe_features` of each seed, with its "run" and "seed"]}.

    Raises UserError where a run kept no features, or the prototypes have another dimension.
    """
    described: dict[str, list[dict]] = {}
    for result in results:
        predictions = result.predictions
        if predictions is None or predictions.features is None:
            raise UserError(f"{result.folder}: kept no predictions with features, which its geometry is made from")
        if prototypes is not None and prototypes.shape[1] != predictions.features.shape[1]:
            raise UserError(
                f"{result.folder}: its features have {predictions.features.shape[1]} dimensions, the prototypes "
                f"{prototypes.shape[1]}"
            )
        made = describe_features(predictions, prototypes, seed=seed)
        described.setdefault(result.variant, []).append({"run": result.run, "seed": result.seed, **made})
    if not described:
        raise UserError("geometry: no finished run with validation predictions among these")
    return described
