"""What the commands print of finished runs."""

from collections.abc import Sequence

from ngd_fast.console import print_table

_COLUMNS = {"accuracy": "accuracy", "macro_f1": "macro-F1", "balanced_accuracy": "bACC", "ece": "ECE"}


def print_metrics(runs: Sequence[dict], *, title: str | None = None) -> None:
    """One row for each metrics.json, in percent, with 95 % bootstrap intervals where they were computed."""
    rows = []
    for metrics in runs:
        block = metrics["valid"]["eight_way"]
        rows.append(
            [
                f"{metrics['variant']} seed {metrics['seed']}",
                *(_with_interval(block[name], block.get("ci", {}).get(name)) for name in _COLUMNS),
                metrics["best_epoch"],
                f"{metrics['train']['images_per_second']:,.0f}",
            ]
        )
    print_table(["run", *(f"{name} %" for name in _COLUMNS.values()), "epoch", "images/s"], rows, title=title)


def _with_interval(value: float, interval: Sequence[float] | None) -> str:
    text = f"{100 * value:.2f}"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
