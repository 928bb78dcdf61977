"""The 256-D features: embedded in the plane side by side, and the geometry that D-Geo is meant to change."""

from collections.abc import Mapping, Sequence

import numpy as np

from ngd_fast.artifacts.figure_style import MARKERS, SHADES, WIDTH, color_of, new_figure
from ngd_fast.errors import UserError
from ngd_fast.evaluation.geometry import class_geometry
from ngd_fast.evaluation.predictions import Predictions


def sample_rows(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most ``most`` labelled rows, sorted; every class keeps its share, and at least ten rows where it has them."""
    rng = np.random.default_rng(seed)
    labelled = np.flatnonzero(labels >= 0)
    if len(labelled) <= most:
        return labelled
    picked = []
    for c in np.unique(labels[labelled]):
        rows = np.flatnonzero(labels == c)
        share = max(10, round(most * len(rows) / len(labelled)))
        picked.append(rng.choice(rows, min(share, len(rows)), replace=False))
    return np.sort(np.concatenate(picked))


def embed(features: np.ndarray, *, method: str = "tsne", seed: int = 0) -> np.ndarray:
    """Features [n, D] in the plane [n, 2] by t-SNE (from PCA, perplexity 30) or UMAP, for one seed.

    On one thread, because sums over several differ in their last bits, from which t-SNE comes to another picture.
    Raises UserError for UMAP where it is not installed, ValueError for another method.
    """
    if method == "tsne":
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits

        perplexity = min(30.0, (len(features) - 1) / 3)
        with threadpool_limits(1):
            return TSNE(2, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(features)
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError:
            raise UserError("UMAP needs umap-learn: pip install 'ngd-fast[umap]'") from None
        neighbors = min(15, len(features) - 1)
        return UMAP(neighbors, n_components=2, random_state=seed, n_jobs=1).fit_transform(features)
    raise ValueError(f"method must be tsne or umap, is {method!r}")


def embedding_figure(predictions: Mapping[str, Predictions], *, method: str = "tsne", seed: int = 0, most: int = 1500):
    """Features of several networks {title: predictions of the same rows} side by side, coloured by true class.

    Axes of such an embedding have no unit and its distances no scale: only neighbourhoods can be read from it.
    """
    first = next(iter(predictions.values()))
    rows = sample_rows(first.labels, most, seed)
    names = first.class_names
    columns = len(predictions)
    with new_figure(max(2.2 * columns, 4), 3.2, 1, columns) as (figure, (axes,)):
        for axis, (title, prediction) in zip(axes, predictions.items()):
            if prediction.features is None:
                raise UserError(f"{title}: its predictions were saved without features, which an embedding needs")
            points = embed(prediction.features[rows], method=method, seed=seed)
            for c in np.unique(first.labels[rows]):
                here = first.labels[rows] == c
                # rare classes over frequent ones, and larger, or they are lost among them
                rare = here.mean() < 0.04
                style = {"s": 22 if rare else 9, "lw": 0, "alpha": 0.75, "rasterized": True, "zorder": 3 - here.mean()}
                axis.scatter(
                    *points[here].T, color=color_of(c), marker=MARKERS[c % len(MARKERS)], label=names[c], **style
                )
            axis.set(title=title, xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        # beside fewer than four plots there is no room for all names in one row
        per_row = len(labels) if columns > 3 else -(-len(labels) // 2)
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=per_row)
        for handle in legend.legend_handles:
            handle.set_sizes([28])
    return figure


def geometry_figure(
    predictions: Mapping[str, Predictions], *, var_cap: float | None = None, margin: float | None = None
):
    """Within-class variance and distance to the nearest class mean, for each class and network {label: predictions}.

    Dashed lines are the cap and the margin that D-Geo was given, where they are known.
    """
    first = next(iter(predictions.values()))
    names = first.class_names
    with new_figure(WIDTH, 3.4, 1, 2) as (figure, ((left, right),)):
        for k, (label, prediction) in enumerate(predictions.items()):
            if prediction.features is None:
                raise UserError(f"{label}: its predictions were saved without features, which class geometry needs")
            geometry = class_geometry(prediction.features, prediction.labels, len(names))
            offset = (k - (len(predictions) - 1) / 2) * 0.7 / max(len(predictions), 2)
            style = {"marker": MARKERS[k % len(MARKERS)], "color": color_of(k), "ls": "", "ms": 5, "label": label}
            left.plot(np.arange(len(names)) + offset, geometry["variance"], **style)
            right.plot(np.arange(len(names)) + offset, geometry["nearest"], **style)
        for axis, title, bound, text in (
            (left, "within-class variance (smaller: tighter)", var_cap, "cap"),
            (right, "distance to the nearest class mean (larger: apart)", margin, "margin"),
        ):
            if bound is not None:
                axis.axhline(bound, color="#D55E00", ls="--", lw=1)
                # beside the marks: among them it would cover some
                axis.annotate(
                    f"{text} {bound:g}", (1.01, bound), xycoords=axis.get_yaxis_transform(), va="center", fontsize=8
                )
            axis.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
            axis.set(title=title, ylim=(0, 1.08 * max(axis.dataLim.y1, bound or 0)))
            axis.grid(axis="x", visible=False)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(predictions))
    return figure


def distance_figure(predictions: Mapping[str, Predictions]):
    """Distances between class means as matrices, one for each network {title: predictions}."""
    names: Sequence[str] = next(iter(predictions.values())).class_names
    matrices = {}
    for title, prediction in predictions.items():
        if prediction.features is None:
            raise UserError(f"{title}: its predictions were saved without features, which class geometry needs")
        matrices[title] = class_geometry(prediction.features, prediction.labels, len(names))["distance"]
    top = max(np.nanmax(matrix) for matrix in matrices.values())
    with new_figure(1.2 + 1.95 * len(matrices), 3.2, 1, len(matrices), sharey=True) as (figure, (axes,)):
        for axis, (title, matrix) in zip(axes, matrices.items()):
            axis.grid(False)
            shown = np.where(np.eye(len(names), dtype=bool), np.nan, matrix)
            image = axis.imshow(shown, cmap=SHADES, vmin=0, vmax=top)
            axis.set_xticks(range(len(names)), names, rotation=55, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(len(names)), names)
            axis.set_title(title)
        figure.colorbar(image, ax=axes.tolist(), label="distance of class means", shrink=0.8)
    return figure


GEOMETRY_TITLES = {
    "within_variance": "within-class variance",
    "within_variance_contracted": "the same, capped classes",
    "margin_min": "smallest margin",
    "margin_mean": "mean margin",
    "effective_rank": "effective rank",
    "angle_mean": "mean principal angle, degrees",
    "linear_probe": "linear probe, accuracy",
    "knn": "20 nearest neighbours, accuracy",
}


def feature_figure(described: Mapping[str, Sequence[Mapping]]):
    """What :func:`~ngd_fast.evaluation.geometry.describe_features` found, one panel a number: a mark for each seed of
    each variant {variant: [one for each seed]}; dashed is the angle of random subspaces."""
    shown = {k: t for k, t in GEOMETRY_TITLES.items() if any(k in d for group in described.values() for d in group)}
    rows = -(-len(shown) // 4)
    with new_figure(WIDTH, 0.4 + 1.9 * rows, rows, 4) as (figure, axes):
        axes = list(axes.flat)
        for axis, (key, title) in zip(axes, shown.items()):
            for k, group in enumerate(described.values()):
                values = [d[key] for d in group if key in d]
                axis.plot([k] * len(values), values, MARKERS[k % len(MARKERS)], color=color_of(k), ms=5, alpha=0.8)
            if key == "angle_mean":
                chance = next(d["angle_random"] for group in described.values() for d in group if "angle_random" in d)
                axis.axhline(chance, color="#D55E00", ls="--", lw=1)
            axis.set_xticks(range(len(described)), list(described), rotation=30, ha="right", rotation_mode="anchor")
            axis.set_title(title, fontsize=9)
            axis.set_xlim(-0.6, len(described) - 0.4)
            axis.margins(y=0.2)
        for axis in axes[len(shown) :]:
            axis.remove()
    return figure
