"""The metrics of groups of faces (age, gender, skin tone, source, ...): how large a gap an average hides."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ngd_fast.errors import UserError
from ngd_fast.evaluation.bootstrap import interval
from ngd_fast.evaluation.comparison import paired_difference, variant_samples
from ngd_fast.evaluation.predictions import Predictions

SLICE_METRICS = ("accuracy", "macro_f1", "balanced_accuracy")
SMALL = 30
"""Groups of fewer faces are marked, and take no part in the choice of the worst and best one."""
MOST_GROUPS = 50


def evaluate_slices(
    predictions: Predictions,
    groups: Mapping[str, Mapping[str, str]],
    *,
    protocol: str = "eight_way",
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """Metrics of every group.

    ``groups`` is {column: {name of a face: group}}; a face without an entry, or with an empty one, is left out of that
    column. Returns {column: {"groups": {group: {metrics, "ci", "n", "small"}}, "unlisted": faces left out, "gaps":
    {metric: {"worst", "best", "difference", "ci", "p"}}}}. Macro averages of a group run over the classes that it
    holds. The groups of a gap share no face, so each is resampled by itself, stratified by class; p is two-sided and
    corrected neither for the number of columns nor for worst and best having been picked.

    Raises UserError where no face is listed or a column has more than 50 groups.
    """
    labelled = np.flatnonzero(predictions.labels >= 0)
    result = {}
    for column, group_of in groups.items():
        rows: dict[str, list[int]] = {}
        for row in labelled:
            group = group_of.get(predictions.names[row], "")
            if group:
                rows.setdefault(group, []).append(int(row))
        if not rows:
            raise UserError(
                f"slices: none of the {len(labelled)} labelled faces is named in the list's column {column}; a face "
                f"here is called {predictions.names[0]}"
            )
        if len(rows) > MOST_GROUPS:
            raise UserError(f"slices: column {column} has {len(rows)} groups, at most {MOST_GROUPS}; bin its values")
        scored = {
            group: _score(predictions, rows[group], protocol, bootstrap, seed + k)
            for k, group in enumerate(sorted(rows))
        }
        result[column] = {
            "groups": {group: _entry(*scored[group], n=len(rows[group])) for group in scored},
            "unlisted": len(labelled) - sum(map(len, rows.values())),
            "gaps": _gaps({group: scored[group] for group in scored if len(rows[group]) >= SMALL}, bootstrap),
        }
    return result


def _score(predictions: Predictions, rows: Sequence[int], protocol: str, bootstrap: int, seed: int):
    """(metrics as measured, their resamples) of some rows."""
    part = replace(
        predictions,
        logits=predictions.logits[rows],
        labels=predictions.labels[rows],
        names=[predictions.names[row] for row in rows],
        label_dist=None,
        features=None,
    )
    # one resample where none is wanted: the measured values are the same
    return variant_samples([part], protocol=protocol, resamples=max(1, bootstrap), seed=seed)


def _entry(plain: Mapping, samples: Mapping, *, n: int) -> dict:
    entry = {**{name: plain[name] for name in SLICE_METRICS}, "n": n, "small": n < SMALL}
    if len(samples["accuracy"]) > 1:
        entry["ci"] = {name: interval(samples[name]) for name in SLICE_METRICS}
    return entry


def _gaps(scored: Mapping[str, tuple[Mapping, Mapping]], bootstrap: int) -> dict:
    if len(scored) < 2:
        return {}
    gaps = {}
    for name in SLICE_METRICS:
        order = sorted(scored, key=lambda group: scored[group][0][name])
        worst, best = order[0], order[-1]
        only = [({name: plain[name]}, {name: drawn[name]}) for plain, drawn in (scored[worst], scored[best])]
        gap = paired_difference(*only)[name]
        if bootstrap < 2:
            gap = {"difference": gap["difference"]}
        gaps[name] = {"worst": worst, "best": best, **gap}
    return gaps
