"""Stratified bootstrap of every metric at once.

A resample is a column of weights: how often each row was drawn. Rows are drawn with replacement within their class, so
that each resample has the classes' own counts and no metric loses a class. Confusion matrices, AUROC and ECE of all
resamples are then sums of the weights over groups of rows; :mod:`~ngd_fast.evaluation.metrics` takes the plain metrics
from the same code with one column of ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

METRICS = ("accuracy", "macro_f1", "balanced_accuracy", "auroc_macro", "ece")
ECE_BINS = 15
PERCENTILES = (2.5, 97.5)

# Weights held at one time: 4 M float32 numbers, 16 MB. Part of the definition of a seed's resamples: do not change.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Scored:
    """Rows ready to be scored: labels and predictions among the K classes that count, and probabilities.

    ``labels`` [N] int in [0, C); ``predicted`` [N] likewise; ``probabilities`` [N, C] float64; ``present`` the sorted
    classes that ``labels`` holds, over which macro averages run.
    """

    labels: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray
    present: np.ndarray


def stratified_weights(labels: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the resamples as blocks of columns, float32 [N, R_block]: how often each row of [N] ``labels`` is drawn.

    The same labels, count and seed give the same weights, whatever is scored with them: this is what pairs variants.
    """
    rng = np.random.default_rng(seed)
    rows = len(labels)
    strata = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    block = max(1, _CHUNK // rows)
    for start in range(0, resamples, block):
        columns = min(block, resamples - start)
        drawn = np.empty((rows, columns), dtype=np.int64)
        for stratum in strata:
            picks = rng.integers(0, len(stratum), size=(len(stratum), columns), dtype=np.int32)
            drawn[stratum] = stratum[picks]
        drawn *= columns
        drawn += np.arange(columns)
        yield np.bincount(drawn.ravel(), minlength=rows * columns).reshape(rows, columns).astype(np.float32)


def group_sums(weights: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """Sums of the rows of ``weights`` [N, R] in each of ``groups`` groups: [groups, R] float64."""
    order = np.argsort(group, kind="stable")
    found, starts = np.unique(group[order], return_index=True)
    sums = np.zeros((groups, weights.shape[1]))
    # float32 counts sum exactly up to 2**24
    sums[found] = np.add.reduceat(weights[order], starts, axis=0)
    return sums


def confusion_counts(scored: Scored, weights: np.ndarray) -> np.ndarray:
    """Confusion matrices [C, C, R] (true class, predicted class, resample) for ``weights`` [N, R]."""
    classes = scored.probabilities.shape[1]
    cells = scored.labels * classes + scored.predicted
    return group_sums(weights, cells, classes * classes).reshape(classes, classes, -1)


def auroc(scored: Scored, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each present class against the rest, ties counted half: [K, R].

    Stratified weights keep the number of positive and of negative rows, by which the sum over pairs is divided.
    """
    areas = np.empty((len(scored.present), weights.shape[1]))
    for k, c in enumerate(scored.present):
        score = scored.probabilities[:, c]
        positive = np.flatnonzero(scored.labels == c)
        negative = np.flatnonzero(scored.labels != c)
        negative = negative[np.argsort(score[negative], kind="stable")]
        below = np.searchsorted(score[negative], score[positive], side="left")
        up_to = np.searchsorted(score[negative], score[positive], side="right")
        # the rising sum of negative weights is read only where a positive row stands: sum up between those places
        places, where = np.unique(np.concatenate([below, up_to]), return_inverse=True)
        edges = np.concatenate([[0], places[(places > 0) & (places < len(negative))]])
        steps = np.add.reduceat(weights[negative], edges, axis=0, dtype=weights.dtype)
        rising = np.zeros((len(edges) + 1, weights.shape[1]), dtype=np.float64)
        np.cumsum(steps, axis=0, out=rising[1:])
        rising = rising[np.searchsorted(np.append(edges, len(negative)), places)]
        pairs = rising[where[: len(positive)]] + rising[where[len(positive) :]]
        areas[k] = np.einsum("ir,ir->r", weights[positive], pairs) / (2.0 * len(positive) * len(negative))
    return areas


def calibration_bins(scored: Scored, bins: int = ECE_BINS) -> np.ndarray:
    """The bin [N] of each row: its largest probability lies in one of ``bins`` intervals (a, b] of equal width."""
    confidence = scored.probabilities.max(axis=1)
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def ece(scored: Scored, weights: np.ndarray, bins: int = ECE_BINS) -> np.ndarray:
    """Expected calibration error (Guo et al., 2017): mean over rows of |accuracy - confidence| of their bin. [R]."""
    gap = (scored.predicted == scored.labels) - scored.probabilities.max(axis=1)
    # not a matrix product: its order of summation, and so its last bits, would depend on the number of threads
    sums = group_sums(weights * gap[:, None], calibration_bins(scored, bins), bins)
    return np.abs(sums).sum(axis=0) / len(gap)


def class_rates(confusion: np.ndarray, present: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of the present classes, each [K, R]. Precision of a class never predicted is 0."""
    diagonal = confusion[present, present]
    truth = confusion.sum(axis=1)[present]
    claimed = confusion.sum(axis=0)[present]
    return {
        "precision": np.divide(diagonal, claimed, out=np.zeros_like(diagonal), where=claimed > 0),
        "recall": diagonal / truth,
        "f1": 2 * diagonal / (truth + claimed),
    }


def score(scored: Scored, weights: np.ndarray, metrics: Sequence[str] = METRICS) -> dict[str, np.ndarray]:
    """The metrics of every column of ``weights`` [N, R]: arrays [R]; ``class_*`` arrays [K, R] for present classes.

    ``auroc_macro`` is absent where only one class is present.
    """
    confusion = confusion_counts(scored, weights)
    rates = class_rates(confusion, scored.present)
    values = {f"class_{name}": rate for name, rate in rates.items()}
    values["accuracy"] = np.einsum("ccr->r", confusion) / len(scored.labels)
    values["macro_f1"] = rates["f1"].mean(axis=0)
    values["balanced_accuracy"] = rates["recall"].mean(axis=0)
    if "auroc_macro" in metrics and len(scored.present) > 1:
        values["class_auroc"] = auroc(scored, weights)
        values["auroc_macro"] = values["class_auroc"].mean(axis=0)
    if "ece" in metrics:
        values["ece"] = ece(scored, weights)
    return values


def resample(scored: Scored, resamples: int, seed: int, metrics: Sequence[str] = METRICS) -> dict[str, np.ndarray]:
    """:func:`score` over ``resamples`` stratified resamples: arrays [resamples] and [K, resamples]."""
    blocks = [score(scored, weights, metrics) for weights in stratified_weights(scored.labels, resamples, seed)]
    return {name: np.concatenate([block[name] for block in blocks], axis=-1) for name in blocks[0]}


def interval(samples: np.ndarray) -> list[float]:
    """The 2.5 and 97.5 percentiles."""
    return [float(value) for value in np.percentile(samples, PERCENTILES)]
