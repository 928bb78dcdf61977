"""``ngd-fast report``."""

from pathlib import Path

import click

from ngd_fast.console import say


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("--out", type=click.Path(dir_okay=False), default="report.html", show_default=True, help="Page to write.")
@click.option(
    "--viz", type=click.Path(file_okay=False), help="Folder for figures and LaTeX.  [default: viz beside --out]"
)
@click.option("--embedding", type=click.Choice(["tsne", "umap", "none"]), default="tsne", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the embedding.")
@click.option("--baseline", help="Variant that the others are compared with.  [default: the first by name]")
@click.option("--bank", type=click.Path(dir_okay=False), help="Bank of prototypes to picture.")
@click.option("--title", default="NeuroGaze-Distill: report", show_default=True)
def command(runs, out, viz, embedding, seed, baseline, bank, title):
    """Gather figures and tables of RUNS into one self-contained HTML page.

    RUNS are run folders, outs/xval_* folders, or folders above them. Every figure is also written as PDF, SVG and PNG.
    """
    from ngd_fast.artifacts.report import write_report

    viz = Path(viz) if viz else Path(out).parent / "viz"
    extra, prototypes = _pictures(bank, viz) if bank else (None, None)
    write_report(
        runs, out, viz=viz, embedding=embedding, seed=seed, baseline=baseline, title=title, extra=extra,
        prototypes=prototypes,
    )  # fmt: skip
    say(f"wrote {out}, figures and tables in {viz}")


def _pictures(bank_path: str, viz: Path):
    """Figures of the bank {caption: PNG}, also kept in ``viz``, and its prototypes [K, D]."""
    from ngd_fast.prototypes.bank import PrototypeBank
    from ngd_fast.prototypes.figures import draw_centers, draw_coverage

    bank = PrototypeBank.load(bank_path)
    coverage = "How the EEG windows cover the valence/arousal grid, and where empty bins take their prototype from."
    if bank.va is not None:
        coverage = "The clusters of EEG windows at their mean valence and arousal, and how many windows each has."
    captions = {
        "prototypes_coverage": (draw_coverage, coverage),
        "prototypes_centers": (draw_centers, "The prototypes on their first two principal axes, and their cosines."),
    }
    pictures = {}
    for name, (draw, caption) in captions.items():
        draw(viz / f"{name}.png", bank)
        pictures[caption] = (viz / f"{name}.png").read_bytes()
    return pictures, bank.prototypes.numpy()
