"""Where a student fails: over corruptions and severities, and over groups of faces."""

from collections.abc import Mapping

from ngd_fast.artifacts.figure_style import LINES, MARKERS, WIDTH, color_of, new_figure


def corruption_figure(scores: Mapping[str, Mapping]):
    """Accuracy over severity, one panel a corruption and one line for each of ``scores`` {label: what
    :func:`ngd_fast.student.robustness.corruption_scores` gives}; severity 0 is the clean face."""
    names = list(next(iter(scores.values()))["corruptions"])
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with new_figure(WIDTH, 0.6 + 1.9 * rows, rows, columns, sharex=True, sharey=True) as (figure, axes):
        axes = list(axes.flat)
        for axis, name in zip(axes, names):
            for k, (label, made) in enumerate(scores.items()):
                values = [made["clean"]["accuracy"], *made["corruptions"][name]["accuracy"]]
                style = {"color": color_of(k), "ls": LINES[k % len(LINES)], "marker": MARKERS[k % len(MARKERS)]}
                axis.plot(range(len(values)), values, ms=3.5, lw=1.4, label=label, **style)
            axis.set(title=name.replace("_", " "), ylim=(0, 1), xticks=range(6))
        for axis in axes[len(names) :]:
            axis.remove()
        figure.supxlabel("severity", fontsize=9)
        figure.supylabel("accuracy", fontsize=9)
        if len(scores) > 1:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(scores))
    return figure


def slices_figure(slices: Mapping[str, Mapping], metric: str = "macro_f1"):
    """``metric`` of every group with its bootstrap interval, one panel a column; hollow marks are small groups."""
    heights = [len(made["groups"]) + 1 for made in slices.values()]
    options = {"sharex": True, "height_ratios": heights}
    with new_figure(WIDTH * 0.7, 0.8 + 0.24 * sum(heights), len(slices), 1, **options) as (figure, axes):
        for axis, (column, made) in zip(axes[:, 0], slices.items()):
            for y, entry in enumerate(made["groups"].values()):
                if "ci" in entry:
                    axis.plot(entry["ci"][metric], [y, y], color=color_of(1), lw=1.4)
                fill = "white" if entry["small"] else color_of(1)
                axis.plot(entry[metric], y, "o", ms=5, color=color_of(1), mfc=fill, clip_on=False)
            axis.set_yticks(range(len(made["groups"])), [f"{g} (n={e['n']})" for g, e in made["groups"].items()])
            axis.set(title=column, ylim=(len(made["groups"]) - 0.5, -0.5), xlim=(0, 1))
            axis.grid(axis="y", visible=False)
        axes[-1, 0].set_xlabel(metric.replace("_", " "))
    return figure
