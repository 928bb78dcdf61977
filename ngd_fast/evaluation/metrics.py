"""The metrics of a set of predictions under the paper's two protocols, with confidence intervals.

``eight_way``
    The prediction is the largest of all C logits. A class that the labels do not hold can be predicted (and is then
    wrong), but has no recall and no F1: it has no entry under ``per_class`` and no part in a macro average. This equals
    scikit-learn's ``f1_score(average="macro", labels=<classes in y_true>)`` and ``balanced_accuracy_score``.
``present_only``
    Logits are first restricted to the classes that the labels hold; softmax and argmax run over those alone.

Where every class is present the two are the same.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ngd_fast.artifacts.files import write_text
from ngd_fast.errors import UserError
from ngd_fast.evaluation import bootstrap as boot
from ngd_fast.evaluation.predictions import Predictions, softmax

PROTOCOLS = ("eight_way", "present_only")


def prepare(labels: np.ndarray, logits: np.ndarray, protocol: str) -> boot.Scored:
    """Labels [N] (-1: left out) and logits [N, C] as rows ready to be scored under ``protocol``."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, is {protocol!r}")
    labels, logits = np.asarray(labels), np.asarray(logits)
    if labels.ndim != 1 or logits.ndim != 2 or len(labels) != len(logits):
        raise ValueError(f"labels [N] and logits [N, C] must fit, are {list(labels.shape)} and {list(logits.shape)}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, are {labels.dtype}")
    classes = logits.shape[1]
    wrong = np.flatnonzero((labels < -1) | (labels >= classes))
    if wrong.size:
        raise UserError(
            f"row {wrong[0]} has label {labels[wrong[0]]}, but there are {classes} classes (0 to {classes - 1})"
        )
    kept = labels >= 0
    if not kept.any():
        raise UserError("no row has a label, so there is nothing to evaluate")
    labels, logits = labels[kept].astype(np.int64), logits[kept].astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise UserError(
            f"{bad.size} of {len(logits)} labelled rows have NaN or infinite logits; did the training diverge?"
        )
    present = np.unique(labels)
    if protocol == "present_only":
        probabilities = np.zeros_like(logits)
        probabilities[:, present] = softmax(logits[:, present])
        predicted = present[logits[:, present].argmax(axis=1)]
    else:
        probabilities, predicted = softmax(logits), logits.argmax(axis=1)
    return boot.Scored(labels, predicted, probabilities, present)


def evaluate(
    labels: np.ndarray,
    logits: np.ndarray,
    *,
    class_names: Sequence[str],
    protocol: str = "eight_way",
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """Metrics of ``logits`` [N, C] against ``labels`` [N] int (rows labelled -1 are left out), as fractions in [0, 1].

    Returns a dict ready for JSON: ``accuracy``, ``macro_f1``, ``balanced_accuracy``, ``auroc_macro`` (one class against
    the rest, mean over present classes; absent where only one class is present), ``ece`` (15 bins), ``per_class``
    {name: precision, recall, f1, auroc, support} for present classes, ``confusion`` [C][C] counts (row: true class),
    ``classes`` (names in the order of ``confusion``), ``absent`` (those without a row), ``n``; and with ``bootstrap``
    > 0 resamples ``ci`` {metric: [2.5 %, 97.5 % percentile]} for all five metrics, and in each class for its rates.

    Raises UserError for labels outside [-1, C), no labelled row, or logits that are not finite; ValueError or TypeError
    for arguments that do not fit.
    """
    if len(class_names) != np.shape(logits)[-1]:
        raise ValueError(f"class_names must name {np.shape(logits)[-1]} columns of logits, has {len(class_names)}")
    scored = prepare(labels, logits, protocol)
    once = np.ones((len(scored.labels), 1))
    plain = {name: value[..., 0] for name, value in boot.score(scored, once).items()}
    counts = boot.confusion_counts(scored, once)[..., 0].astype(int)
    result: dict[str, Any] = {name: float(plain[name]) for name in boot.METRICS if name in plain}
    per_class: dict[str, dict[str, Any]] = {}
    for k, c in enumerate(scored.present):
        rates = {name.removeprefix("class_"): float(v[k]) for name, v in plain.items() if name.startswith("class_")}
        per_class[class_names[c]] = {**rates, "support": int(counts[c].sum())}
    result |= {
        "per_class": per_class,
        "confusion": counts.tolist(),
        "classes": list(class_names),
        "absent": [name for c, name in enumerate(class_names) if c not in scored.present],
        "n": len(scored.labels),
        "protocol": protocol,
    }
    if bootstrap > 0:
        samples = boot.resample(scored, bootstrap, seed)
        result["ci"] = {name: boot.interval(samples[name]) for name in boot.METRICS if name in samples}
        for k, c in enumerate(scored.present):
            per_class[class_names[c]]["ci"] = {
                name.removeprefix("class_"): boot.interval(v[k])
                for name, v in samples.items()
                if name.startswith("class_")
            }
        result["bootstrap"] = {"resamples": bootstrap, "seed": seed, "stratified": True}
    return result


def evaluate_predictions(predictions: Predictions, *, bootstrap: int = 1000, seed: int = 0) -> dict:
    """:func:`evaluate` under both protocols: {"eight_way": ..., "present_only": ...}."""
    return {
        protocol: evaluate(
            predictions.labels,
            predictions.logits,
            class_names=predictions.class_names,
            protocol=protocol,
            bootstrap=bootstrap,
            seed=seed,
        )
        for protocol in PROTOCOLS
    }


def classes_of(block: Mapping) -> list[tuple[str, Mapping]]:
    """(name, rates) of the present classes in the classes' own order, which JSON with sorted keys does not keep."""
    return [(name, block["per_class"][name]) for name in block["classes"] if name in block["per_class"]]


def write_per_class(path: str | Path, blocks: Mapping[str, Mapping]) -> None:
    """Write the classes of {protocol: block} as CSV, fractions in [0, 1]; absent classes have no line."""
    rates = ("precision", "recall", "f1", "auroc")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = (f"{rate}_{end}" for rate in rates for end in ("low", "high"))
    writer.writerow(["protocol", "class", "support", *rates, *ends])
    for protocol, block in blocks.items():
        for name, values in classes_of(block):
            intervals = [values.get("ci", {}).get(rate, ("", "")) for rate in rates]
            cells = [values["support"], *(values.get(rate, "") for rate in rates)]
            writer.writerow([protocol, name, *cells, *(v for pair in intervals for v in pair)])
    write_text(path, text.getvalue())
