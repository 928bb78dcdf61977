"""The report: every figure and table of some runs in one HTML page, and the same figures as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ngd_fast.artifacts import html
from ngd_fast.artifacts import report_behaviour as behaviour
from ngd_fast.artifacts import report_sections as sections
from ngd_fast.artifacts.files import write_text
from ngd_fast.console import progress
from ngd_fast.errors import UserError
from ngd_fast.evaluation.latex import percent
from ngd_fast.evaluation.results import Result, by_variant, load_results
from ngd_fast.evaluation.tables import write_tables


def write_report(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    viz: str | Path | None = None,
    embedding: str = "tsne",
    seed: int = 0,
    baseline: str | None = None,
    title: str = "NeuroGaze-Distill: report",
    extra: Mapping[str, bytes] | None = None,
    prototypes: np.ndarray | None = None,
) -> Path:
    """Write one self-contained page about the runs and evaluations in ``paths`` to ``out``; returns its path.

    ``viz`` is a folder for the same figures as PDF, SVG and PNG and for the LaTeX tables. ``embedding`` is "tsne",
    "umap" or "none", drawn with ``seed``. ``baseline`` is the variant that others are compared with (default: the first
    by name). ``extra`` {caption: PNG} adds pictures, such as those of the prototypes, and ``prototypes`` [K, D] the
    angles between the features and their span.
    Raises UserError where ``paths`` hold no results or matplotlib is missing.
    """
    if embedding not in ("tsne", "umap", "none"):
        raise ValueError(f"embedding must be tsne, umap or none, is {embedding!r}")
    results = load_results(paths)
    runs = by_variant([r for r in results if r.split == "valid"])
    others = [r for r in results if r.split != "valid"]
    viz = None if viz is None else Path(viz)
    report = sections.Report(runs, others, viz, embedding, seed, baseline, extra or {}, prototypes)
    if report.viz is not None:
        write_tables(paths, report.viz, baseline=baseline)
    makers = (
        ("summary", "Summary", sections.summary),
        ("training", "Training", sections.training),
        ("classes", "Classes", sections.classes),
        ("calibration", "Calibration", behaviour.calibration),
        ("geometry", "Class geometry", behaviour.geometry),
        ("features", "Features", behaviour.features),
        ("prototypes", "Prototypes", sections.prototypes),
        ("xval", "Other datasets", sections.other_datasets),
        ("robustness", "Robustness and groups", behaviour.robustness),
        ("provenance", "Provenance", sections.provenance),
        ("use", "Responsible use", sections.responsible_use),
    )
    parts = []
    for key, heading, make in progress(makers, desc="report", unit="section"):
        try:
            content = make(report)
        except (LookupError, TypeError, AttributeError, OverflowError) as error:
            # read from files that may come from anywhere
            raise UserError(f"{heading}: a run's files are not as ngd-fast writes them ({error!r:.200})") from None
        if content:
            parts.append((key, heading, content))
    write_text(out, html.page(title, _header(report), parts))
    return Path(out)


def _header(report: sections.Report) -> str:
    every = report.every
    datasets = sorted({r.dataset for r in every})
    text = (
        "<p>Facial-expression students distilled with a frozen bank of EEG prototypes (arXiv 2509.11916). Every number "
        "on this page is read from the runs' metrics.json and predictions.</p>"
    )
    runs = sum(len(group) for group in report.runs.values())
    pairs = [(str(runs), "runs"), (", ".join(report.runs) or "-", "variants"), (", ".join(datasets), "datasets")]
    best = max(report.runs.values(), key=lambda g: _mean(g, "macro_f1"), default=None)
    if best:
        pairs.append((f"{percent(_mean(best, 'macro_f1'), 1)} %", f"best macro-F1 ({best[0].variant})"))
    return text + html.facts(pairs)


def _mean(group: Sequence[Result], name: str) -> float:
    return sum(r.blocks["eight_way"][name] for r in group) / len(group)
