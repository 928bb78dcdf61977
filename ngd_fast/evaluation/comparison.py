"""Variants against each other: mean and spread over seeds, and a paired bootstrap over the same resampled rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ngd_fast.errors import UserError
from ngd_fast.evaluation.bootstrap import METRICS, interval, resample, score
from ngd_fast.evaluation.metrics import prepare
from ngd_fast.evaluation.predictions import Predictions


def summarize(values: Sequence[float]) -> dict[str, float | int]:
    """Mean, standard deviation (n - 1 in the denominator; absent for one value), smallest, largest and count."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values must be a non-empty list of numbers, has shape {list(array.shape)}")
    summary = {"mean": float(array.mean()), "min": float(array.min()), "max": float(array.max()), "n": array.size}
    if array.size > 1:
        summary["std"] = float(array.std(ddof=1))
    return summary


def variant_samples(
    runs: Sequence[Predictions], *, protocol: str = "eight_way", resamples: int = 1000, seed: int = 0
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics of a variant, averaged over its runs (one for each seed): (as measured, [resamples] each).

    All runs are scored on the same resampled rows; they must hold the same rows in the same order.
    """
    if not runs:
        raise ValueError("runs must hold the predictions of at least one run")
    first = runs[0]
    for run in runs[1:]:
        require_same_rows(first, run)
    scored = [prepare(run.labels, run.logits, protocol) for run in runs]
    ones = np.ones((len(scored[0].labels), 1))
    plain = [score(s, ones) for s in scored]
    drawn = [resample(s, resamples, seed) for s in scored]
    metrics = [name for name in METRICS if name in plain[0]]
    return (
        {name: float(np.mean([p[name][0] for p in plain])) for name in metrics},
        {name: np.mean([d[name] for d in drawn], axis=0) for name in metrics},
    )


def paired_difference(
    baseline: tuple[Mapping[str, float], Mapping[str, np.ndarray]],
    variant: tuple[Mapping[str, float], Mapping[str, np.ndarray]],
) -> dict[str, dict]:
    """Variant minus baseline from two results of :func:`variant_samples` on the same rows with the same seed.

    {metric: {"difference", "ci": [2.5 %, 97.5 %], "p"}}; ``p`` is the two-sided bootstrap p-value
    2 min(share of differences <= 0, share >= 0), with one added to both counts, uncorrected for several comparisons.
    """
    result = {}
    for name in baseline[0]:
        samples = variant[1][name] - baseline[1][name]
        tail = min((samples <= 0).sum(), (samples >= 0).sum())
        result[name] = {
            "difference": variant[0][name] - baseline[0][name],
            "ci": interval(samples),
            "p": float(min(1.0, 2 * (tail + 1) / (len(samples) + 1))),
        }
    return result


def paired_bootstrap(
    baseline: Predictions | Sequence[Predictions],
    variant: Predictions | Sequence[Predictions],
    *,
    protocol: str = "eight_way",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """Is ``variant`` better than ``baseline``? Each is one run or a list of runs (seeds), whose metrics are averaged.

    Returns what :func:`paired_difference` describes. Raises UserError unless all hold the same rows and labels.
    """
    baseline = [baseline] if isinstance(baseline, Predictions) else list(baseline)
    variant = [variant] if isinstance(variant, Predictions) else list(variant)
    if baseline and variant:
        require_same_rows(baseline[0], variant[0])
    options: dict[str, Any] = {"protocol": protocol, "resamples": resamples, "seed": seed}
    return paired_difference(variant_samples(baseline, **options), variant_samples(variant, **options))


def require_same_rows(a: Predictions, b: Predictions) -> None:
    """Raise UserError unless both hold the same rows, in order, with the same labels and classes."""
    if a.class_names != b.class_names:
        raise UserError(f"predictions cannot be paired: classes {a.class_names} and {b.class_names} differ")
    if a.names != b.names or not np.array_equal(a.labels, b.labels):
        raise UserError(
            f"predictions cannot be paired: {a.dataset} ({len(a)} rows) and {b.dataset} ({len(b)} rows) "
            "do not hold the same rows with the same labels"
        )
