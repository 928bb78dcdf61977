"""Figures of the teacher: training curves (the paper's figure 7, bottom) and predicted against rated values."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ngd_fast.artifacts.files import atomic_path
from ngd_fast.errors import UserError
from ngd_fast.teacher.metrics import evaluate_va

_COLORS = {"valence": "#c2410c", "arousal": "#1d4ed8"}


def new_figure(columns: int, rows: int = 1, *, size: tuple[float, float] = (4.2, 3.4)):
    """A matplotlib figure without pyplot's global state, and its axes as an array [rows, columns]."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'ngd-fast[viz]'") from None
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(path: str | Path, figure) -> None:
    """Write a PNG whose bytes depend on its content alone."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png", metadata={"Software": None})


def draw_curves(path: str | Path, histories: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Loss, and CCC on the training batches and the validation subjects, over epochs; one line a history."""
    figure, axes = new_figure(2)
    loss, ccc = axes[0]
    for i, history in enumerate(histories):
        epochs = [entry["epoch"] for entry in history]
        loss.plot(epochs, [entry["loss"] for entry in history], color="#334155", lw=1.2)
        ccc.plot(epochs, [e["ccc"] for e in history], color="#94a3b8", lw=1, label=None if i else "training batches")
        for dimension, color in _COLORS.items():
            values = [(e["epoch"], e["validation"][dimension]["ccc"]) for e in history if "validation" in e]
            if values:
                ccc.plot(*zip(*values), color=color, lw=1.2, label=None if i else f"validation {dimension}")
    loss.set(xlabel="epoch", ylabel="training loss", title="Loss")
    ccc.set(xlabel="epoch", ylabel="CCC", title="Concordance")
    ccc.axhline(0, color="black", lw=0.5)
    ccc.legend(fontsize=7)
    save_figure(path, figure)


def draw_predictions(path: str | Path, prediction: np.ndarray, target: np.ndarray) -> None:
    """Each window's prediction over its rating, [n, 2] both, with the CCC over all of them."""
    metrics = evaluate_va(prediction, target, np.zeros(len(target), int), bootstrap=0)
    figure, axes = new_figure(2)
    jitter = np.random.default_rng(0).normal(0, 0.015, target.shape)
    for column, (axis, dimension) in enumerate(zip(axes[0], _COLORS)):
        axis.plot([-1, 1], [-1, 1], color="black", lw=0.5)
        axis.scatter(
            target[:, column] + jitter[:, column], prediction[:, column], s=4, alpha=0.3, color=_COLORS[dimension]
        )
        axis.set(
            xlabel=f"rated {dimension}", ylabel=f"predicted {dimension}", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1),
            title=f"{dimension.capitalize()}: CCC {metrics[dimension]['ccc']:.2f}",
        )  # fmt: skip
    save_figure(path, figure)
