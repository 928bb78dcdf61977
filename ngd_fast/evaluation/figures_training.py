"""Training curves, and the timeline of the ablation with the window of D-Geo's ramp."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ngd_fast.artifacts.figure_style import LINES, WIDTH, color_of, new_figure
from ngd_fast.artifacts.files import parse_json, read_text
from ngd_fast.errors import UserError
from ngd_fast.evaluation.schema import MAX_EPOCHS

Epochs = Sequence[Mapping]
TERMS = {
    "ce": "cross-entropy",
    "kd": "KD",
    "proto": "Proto-KD",
    "geo_var": "D-Geo: variance",
    "geo_margin": "D-Geo: margin",
}


def read_log(path: str | Path) -> list[dict]:
    """The epochs in a run's log.jsonl, in order. Raises UserError for a file that is missing or no such log."""
    epochs: dict[int, dict] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        event = parse_json(line, f"{path}: line {number}")
        if not isinstance(event, dict):
            raise UserError(f"{path}: line {number} is not a log entry")
        if event.get("event") != "epoch":
            continue
        epoch = event.get("epoch")
        if type(epoch) is not int or not 0 <= epoch <= MAX_EPOCHS or not _drawable(event):
            raise UserError(f"{path}: line {number} is not a log entry")
        epochs[epoch] = event
    return [epochs[epoch] for epoch in sorted(epochs)]


def _drawable(entry: Mapping) -> bool:
    """Whether no number is beyond what an axis can show."""
    every = [*entry.values(), *(v for part in entry.values() if isinstance(part, Mapping) for v in part.values())]
    return all(abs(value) < 1e30 for value in every if isinstance(value, (int, float)))


def value_of(epoch: Mapping, key: str) -> float:
    """The number under a dotted ``key`` of a log entry; NaN where it has none."""
    value: object = epoch
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _draw(axis, logs: Mapping[str, Sequence[Epochs]], key: str) -> bool:
    """One line a variant: the mean over its seeds, with the seeds as thin lines behind it. False: nothing to draw."""
    drawn = False
    for k, (label, runs) in enumerate(logs.items()):
        series = [{e["epoch"]: value_of(e, key) for e in run} for run in runs]
        series = [s for s in series if not np.isnan(list(s.values())).all()]
        if not series:
            continue
        drawn = True
        # a seed still in training is shorter: the mean runs as far as all seeds do
        epochs = sorted(set.intersection(*(set(s) for s in series)))
        values = np.array([[s[e] for e in epochs] for s in series])
        marker = "." if len(epochs) < 12 else None
        if len(series) > 1:
            axis.plot(epochs, values.T, color=color_of(k), lw=0.6, alpha=0.45)
        axis.plot(
            epochs, values.mean(axis=0), LINES[k % len(LINES)], color=color_of(k), lw=1.6, marker=marker, label=label
        )
    return drawn


def _finish(figure, axes, logs, ramp) -> None:
    from matplotlib.ticker import MaxNLocator

    last = max((epoch["epoch"] for runs in logs.values() for run in runs for epoch in run), default=0)
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if ramp and ramp[0] < min(ramp[1], last):
            axis.axvspan(ramp[0], min(ramp[1], last), color="#009E73", alpha=0.10, lw=0, label="D-Geo ramp")
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(6, len(handles)))


def timeline_figure(logs: Mapping[str, Sequence[Epochs]], ramp: tuple[float, float] | None = None):
    """Training loss, validation accuracy and macro-F1 over finished epochs; ``logs`` {variant: logs of its seeds}.

    Shaded is ``ramp``, the epochs between which D-Geo's weight rises from 0 to its full value, as far as training went.
    """
    panels = {"loss": "training loss", "valid.accuracy": "validation accuracy", "valid.macro_f1": "validation macro-F1"}
    with new_figure(WIDTH, 3.0, 1, len(panels)) as (figure, (axes,)):
        for axis, (key, title) in zip(axes, panels.items()):
            if not (_draw(axis, logs, key) or _draw(axis, logs, key.replace("valid.", "valid.eight_way."))):
                axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", color="#888888")
            axis.set_title(title)
        _finish(figure, axes, logs, ramp)
    return figure


def terms_figure(logs: Mapping[str, Sequence[Epochs]], ramp: tuple[float, float] | None = None):
    """Each term of the objective (unweighted) and the learning rate, as far as logged; else as timeline_figure."""
    keys = {**TERMS, "geo_weight": "weight of D-Geo", "lr": "learning rate"}
    shown = {
        key: title
        for key, title in keys.items()
        if any(value_of(e, key) > 0 for runs in logs.values() for run in runs for e in run)
    }
    rows = max(1, -(-len(shown) // 3))
    with new_figure(WIDTH, 0.5 + 2.2 * rows, rows, 3) as (figure, axes):
        axes = list(axes.flat)
        for axis, (key, title) in zip(axes, shown.items()):
            _draw(axis, logs, key)
            axis.set_title(title)
        for axis in axes[len(shown) :]:
            axis.remove()
        _finish(figure, axes[: len(shown)], logs, ramp)
    return figure
