"""The report's sections on how students behave: calibration, geometry, features, corruptions and groups of faces."""

from html import escape

from ngd_fast.artifacts import html
from ngd_fast.artifacts.report_sections import Report, agreed
from ngd_fast.evaluation.calibration import SCORES
from ngd_fast.evaluation.figures_classes import reliability_figure
from ngd_fast.evaluation.figures_features import (
    GEOMETRY_TITLES,
    distance_figure,
    embedding_figure,
    feature_figure,
    geometry_figure,
)
from ngd_fast.evaluation.figures_robustness import corruption_figure, slices_figure
from ngd_fast.evaluation.geometry import describe_runs
from ngd_fast.evaluation.slices import SMALL


def calibration(report: Report) -> str:
    predictions = report.with_predictions()
    if not predictions:
        return ""
    caption = (
        "Accuracy over confidence in 15 bins at temperature 1, and how many rows each bin holds (first seed). ECE is "
        "the mean distance to the diagonal."
    )
    content = report.figure("reliability", reliability_figure(predictions), caption)
    rows = []
    for group in report.runs.values():
        for r in group:
            fitted = r.calibration
            for when in ("before", "after") if fitted else ():
                scores = (f"{fitted[when][name]:.4f}" for name in SCORES)
                rows.append([escape(r.run), escape(fitted["method"]), when, *scores])
    if rows:
        caption = "Calibration kept with the run; after: cross-fitted, no face scored with a fit that it took part in"
        content += html.table(["Run", "Method", "", "NLL", "Brier", "ECE", "Classwise ECE"], rows, caption=caption)
    return content


def geometry(report: Report) -> str:
    predictions = report.with_predictions(features=True)
    if not predictions:
        return ""
    cap, margin = agreed(report, lambda geo: (geo.var_cap, geo.margin)) or (None, None)
    content = report.figure(
        "geometry",
        geometry_figure(predictions, var_cap=cap, margin=margin),
        "Unit features of the validation rows (first seed): mean squared distance to the class mean, and distance of "
        "each class mean to the nearest other one. D-Geo penalizes variance above the cap (happiness and surprise) and "
        "distances below the margin.",
    )
    distances = report.figure(
        "class_distances", distance_figure(predictions), "Euclidean distances between class means, on one scale."
    )
    return content + _described(report) + html.details("All distances between class means", distances)


def _described(report: Report) -> str:
    runs = [r for group in report.runs.values() for r in group if r.predictions is not None]
    described = describe_runs([r for r in runs if r.predictions.features is not None], report.prototypes)
    content = report.figure(
        "feature_geometry",
        feature_figure(described),
        "The features of the validation rows in numbers, a mark for each seed. Effective rank is the exponential of "
        "the covariance's spectral entropy. Principal angles lie between the features' leading eigenspace and the span "
        "of the prototypes; dashed: two random subspaces. Probe and neighbours are cross-validated on the same rows.",
    )
    rows = [
        [escape(f"{variant} seed {r['seed']}"), *(f"{r[key]:.4g}" if key in r else "" for key in GEOMETRY_TITLES)]
        for variant, group in described.items()
        for r in group
    ]
    return content + html.details("Numbers", html.table(["Run", *GEOMETRY_TITLES.values()], rows))


def features(report: Report) -> str:
    predictions = report.with_predictions(features=True)
    if not predictions or report.embedding == "none":
        return ""
    name = {"tsne": "t-SNE", "umap": "UMAP"}[report.embedding]
    caption = (
        f"{name} of the penultimate features of the same validation rows (seed {report.seed}), coloured by true class. "
        "Neighbourhoods can be read from it; distances between clusters and their sizes cannot."
    )
    drawn = embedding_figure(predictions, method=report.embedding, seed=report.seed)
    return report.figure(report.embedding, drawn, caption)


def robustness(report: Report) -> str:
    """Corruptions and groups of faces, of the evaluations that were made with them."""
    scores = {}
    content = ""
    for r in report.others:
        if r.corruptions:
            scores.setdefault(r.dataset, {})[r.run] = r.corruptions
    for dataset, made in scores.items():
        stem = "corruptions" if len(scores) == 1 else f"corruptions_{dataset}"
        caption = f"Accuracy on {dataset} under corruptions of severity 1 to 5; 0: clean."
        content += report.figure(stem, corruption_figure(made), caption)
        against = {run: s["versus"] for run, s in made.items() if "versus" in s}
        rows = [[escape(run), f"{v['mce']:.1f}", escape(v["run"])] for run, v in against.items()]
        if rows:
            content += html.table(["Run", "Mean corruption error %", "Over"], rows)
    sliced = [r for r in report.others if r.slices]
    for r in sliced:
        stem = "slices" if len(sliced) == 1 else f"slices_{r.folder.name}"
        caption = (
            f"Macro-F1 of groups of faces with 95 % intervals: {r.run} on {r.dataset}. Hollow: under {SMALL} faces. A "
            "group's average runs over the classes that it holds."
        )
        content += report.figure(stem, slices_figure(r.slices), caption)
    return content
