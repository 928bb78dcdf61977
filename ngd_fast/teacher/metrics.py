"""CCC, Pearson and RMSE with confidence intervals over subjects.

All three follow from six sums (n, x, y, xx, yy, xy). They are taken once for each subject; a bootstrap sample, which
draws subjects and not windows (windows of one subject are far from independent), only adds them up again.
"""

import numpy as np

_NAMES = ("ccc", "pearson", "rmse")


def _sums(prediction: np.ndarray, target: np.ndarray, group: np.ndarray) -> np.ndarray:
    """[groups, 6] float64."""
    columns = [np.ones_like(target), prediction, target, prediction**2, target**2, prediction * target]
    return np.stack([np.bincount(group, weights=column) for column in columns], axis=1)


def _from_sums(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of each row of sums [R, 6]. CCC of a constant is 0; Pearson's coefficient is then undefined: NaN."""
    n, x, y, xx, yy, xy = sums.T
    mean_x, mean_y = x / n, y / n
    # Constant predictions leave rounding dust where the variance should be 0.
    var_x = np.maximum(xx / n - mean_x**2, 0)
    var_y = np.maximum(yy / n - mean_y**2, 0)
    var_x, var_y = (np.where(v > 1e-12 * (1 + m**2), v, 0) for v, m in ((var_x, mean_x), (var_y, mean_y)))
    covariance = np.where((var_x > 0) & (var_y > 0), xy / n - mean_x * mean_y, 0)
    spread = var_x + var_y + (mean_x - mean_y) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "ccc": np.where(spread > 0, 2 * covariance / spread, 0.0),
            "pearson": np.clip(covariance / np.sqrt(var_x * var_y), -1, 1),
            "rmse": np.sqrt(np.maximum((xx - 2 * xy + yy) / n, 0)),
        }


def evaluate_va(
    prediction: np.ndarray, target: np.ndarray, subject: np.ndarray, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """Metrics of valence and arousal, prediction and target [N, 2], subject [N].

    Returns ``{"valence": {"ccc", "pearson", "rmse", "n", "subjects", "ci": {metric: [low, high]}}, "arousal": ...}``:
    95% percentile intervals over ``bootstrap`` draws of subjects, present from two subjects on. An undefined
    coefficient is an absent key.
    """
    prediction, target = np.asarray(prediction, np.float64), np.asarray(target, np.float64)
    if prediction.ndim != 2 or prediction.shape[1] != 2 or prediction.shape != target.shape:
        raise ValueError(f"prediction: must be [N, 2] like target {target.shape}, has shape {prediction.shape}")
    if len(subject) != len(target) or not len(target):
        raise ValueError(f"subject: must have one entry for each of {len(target)} rows, has {len(subject)}")
    if not (np.isfinite(prediction).all() and np.isfinite(target).all()):
        raise ValueError("prediction and target: must be finite; leave unlabelled rows out")
    names, group = np.unique(subject, return_inverse=True)
    result = {}
    for column, dimension in enumerate(("valence", "arousal")):
        sums = _sums(prediction[:, column], target[:, column], group)
        values = _from_sums(sums.sum(axis=0, keepdims=True))
        block = {name: float(values[name][0]) for name in _NAMES if np.isfinite(values[name][0])}
        block |= {"n": len(target), "subjects": len(names)}
        if bootstrap and len(names) > 1:
            generator = np.random.default_rng(seed)
            draws = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=bootstrap)
            samples = _from_sums(draws @ sums)
            block["ci"] = {
                name: [float(q) for q in np.nanquantile(samples[name], (0.025, 0.975))]
                for name in _NAMES
                if name in block
            }
        result[dimension] = block
    return result


def mean_ccc(metrics: dict[str, dict]) -> float:
    """Mean of the two dimensions' CCC, the number that chooses an epoch."""
    return (metrics["valence"]["ccc"] + metrics["arousal"]["ccc"]) / 2
