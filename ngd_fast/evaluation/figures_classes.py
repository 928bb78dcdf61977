"""Confusion matrices, per-class scores and calibration."""

from collections.abc import Mapping

import numpy as np

from ngd_fast.artifacts.figure_style import MARKERS, SHADES, color_of, new_figure
from ngd_fast.evaluation.bootstrap import ECE_BINS, calibration_bins
from ngd_fast.evaluation.metrics import prepare
from ngd_fast.evaluation.predictions import Predictions


def confusion_figure(block: Mapping, *, title: str = ""):
    """Confusion matrix of a metrics block: shades and percentages are shares of the true class, with counts below.

    ``eight_way`` shows every class (one without a row is hatched), ``present_only`` the classes that have one.
    """
    counts = np.asarray(block["confusion"])
    names = np.asarray(block["classes"])
    if block.get("protocol") == "present_only":
        present = np.flatnonzero(counts.sum(axis=1))
        counts, names = counts[np.ix_(present, present)], names[present]
    totals = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(totals, 1)
    side = 1.6 + 0.62 * len(names)
    with new_figure(side + 0.6, side) as (figure, ((axis,),)):
        axis.grid(False)
        image = axis.imshow(share, cmap=SHADES, vmin=0, vmax=1)
        for i, j in np.ndindex(counts.shape):
            if totals[i, 0]:
                color = "white" if share[i, j] > 0.55 else "#222222"
                axis.text(j, i, f"{100 * share[i, j]:.1f}", ha="center", va="bottom", color=color, fontsize=8)
                axis.text(j, i, f"{counts[i, j]}", ha="center", va="top", color=color, fontsize=6.5)
        for i in np.flatnonzero(totals[:, 0] == 0):
            axis.axhspan(i - 0.5, i + 0.5, facecolor="#f2f2f2", edgecolor="#c8c8c8", hatch="///", lw=0)
            axis.text((len(names) - 1) / 2, i, "no samples", ha="center", va="center", color="#666666", fontsize=8)
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="predicted", ylabel="true", title=title)
        figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    return figure


def per_class_figure(blocks: Mapping[str, Mapping]):
    """F1 of each class with its bootstrap interval, one mark for each of ``blocks`` {label: metrics block}."""
    classes = next(iter(blocks.values()))["classes"]
    names = [name for name in classes if any(name in block["per_class"] for block in blocks.values())]
    with new_figure(1.5 + 0.85 * len(names), 3.2) as (figure, ((axis,),)):
        for k, (label, block) in enumerate(blocks.items()):
            offset = (k - (len(blocks) - 1) / 2) * 0.7 / max(len(blocks), 2)
            for i, name in enumerate(names):
                rates = block["per_class"].get(name)
                if rates is None:
                    continue
                if "ci" in rates:
                    axis.plot([i + offset] * 2, rates["ci"]["f1"], color=color_of(k), lw=1.4, zorder=2)
                style = {"marker": MARKERS[k % len(MARKERS)], "color": color_of(k), "ls": "", "ms": 4.5, "zorder": 3}
                # a class that is never found stands on the axis: show the whole mark
                axis.plot(i + offset, rates["f1"], label="" if i else label, clip_on=False, **style)
        supports = [max(b["per_class"].get(n, {}).get("support", 0) for b in blocks.values()) for n in names]
        axis.set_xticks(range(len(names)), [f"{name}\nn={count}" for name, count in zip(names, supports)])
        axis.set(ylabel="F1", ylim=(0, 1))
        axis.grid(axis="x", visible=False)
        figure.legend(loc="outside upper center", ncols=len(blocks))
    return figure


def reliability_figure(predictions: Mapping[str, Predictions], *, protocol: str = "eight_way"):
    """Reliability diagrams {title: predictions}: accuracy over confidence in 15 bins, and the rows in each."""
    count = len(predictions)
    options = {"sharex": True, "sharey": "row", "height_ratios": (3, 1)}
    with new_figure(max(2.2 * count, 3.4), 3.4, 2, count, **options) as (figure, axes):
        for k, (title, prediction) in enumerate(predictions.items()):
            scored = prepare(prediction.labels, prediction.logits, protocol)
            bins = calibration_bins(scored)
            rows = np.bincount(bins, minlength=ECE_BINS)
            confidence = np.bincount(bins, scored.probabilities.max(axis=1), minlength=ECE_BINS) / np.maximum(rows, 1)
            accuracy = np.bincount(bins, scored.predicted == scored.labels, minlength=ECE_BINS) / np.maximum(rows, 1)
            gap = float((rows * np.abs(accuracy - confidence)).sum() / rows.sum())
            filled, centers, width = rows > 0, (np.arange(ECE_BINS) + 0.5) / ECE_BINS, 1 / ECE_BINS
            upper, lower = axes[:, k]
            upper.bar(centers[filled], accuracy[filled], width, color="#9ecae1", edgecolor="white", label="accuracy")
            upper.plot(confidence[filled], accuracy[filled], "o", ms=3, color="#0072B2", label="bin mean")
            upper.plot([0, 1], [0, 1], "--", color="#4d4d4d", lw=1, label="calibrated")
            upper.set(title=f"{title}\nECE {100 * gap:.1f} %", ylim=(0, 1), xlim=(0, 1))
            lower.bar(centers, rows, width, color="#bdbdbd", edgecolor="white")
            lower.set(xlabel="confidence", xticks=(0, 0.5, 1))
        axes[0, 0].set_ylabel("accuracy")
        axes[1, 0].set_ylabel("rows")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
