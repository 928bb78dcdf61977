"""Figures of a bank, as in the paper's figure 2: how the windows cover the plane, and where the prototypes lie."""

from pathlib import Path

import numpy as np

from ngd_fast.prototypes.analysis import cosine_matrix
from ngd_fast.prototypes.bank import PrototypeBank
from ngd_fast.teacher.figures import new_figure, save_figure


def draw_coverage(path: str | Path, bank: PrototypeBank) -> None:
    """Windows in each bin; an empty bin is hatched and names the bins it is filled from by thin lines.

    A bank of clusters: a disc for each at its valence and arousal, its area by its windows.
    """
    figure, axes = new_figure(1, size=(5.0, 4.3))  # first: it says what to install where matplotlib is absent
    if bank.va is not None:
        _draw_clusters(axes[0, 0], bank)
        save_figure(path, figure)
        return
    from matplotlib.patches import Rectangle

    axis, grid = axes[0, 0], bank.grid
    cell = 2 / grid
    shade = np.log10(bank.counts + 1)
    image = axis.imshow(shade.T, origin="lower", extent=(-1, 1, -1, 1), cmap="Blues", vmin=0)
    for k, (i, j) in enumerate(np.ndindex(grid, grid)):
        x, y = bank.centers[i], bank.centers[j]
        if bank.counts[i, j]:
            dark = shade[i, j] > 0.6 * shade.max()
            axis.text(x, y, bank.counts[i, j], ha="center", va="center", fontsize=7, color="white" if dark else "black")
            continue
        axis.add_patch(Rectangle((x - cell / 2, y - cell / 2), cell, cell, fill=False, hatch="///", ec="#94a3b8", lw=0))
        sources = np.flatnonzero(bank.filled_from[k])
        # A bin filled with the mean of everything would draw a line to every bin and say nothing.
        if len(sources) <= 4:
            for source in sources:
                si, sj = divmod(int(source), grid)
                axis.plot([bank.centers[si], x], [bank.centers[sj], y], color="#c2410c", lw=0.8, marker=".", ms=3)
    axis.set(xlabel="valence", ylabel="arousal", title=f"Coverage: {int(bank.empty.sum())} of {grid**2} bins empty")
    figure.colorbar(image, ax=axis, label="log10(windows + 1)", shrink=0.8)
    save_figure(path, figure)


def _draw_clusters(axis, bank: PrototypeBank) -> None:
    valence, arousal = bank.places.T
    axis.scatter(
        valence, arousal, s=900 * bank.counts / bank.counts.max(), c="#93c5fd", alpha=0.5, edgecolors="#1d4ed8"
    )
    for x, y, count in zip(valence, arousal, bank.counts):
        axis.text(x, y, count, ha="center", va="center", fontsize=6)
    axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xlabel="valence", ylabel="arousal")
    axis.set(title=f"{len(bank.counts)} clusters (numbers: windows)")


def draw_centers(path: str | Path, bank: PrototypeBank) -> None:
    """Left: prototypes on their first two principal axes, coloured by valence, neighbours in the grid joined; hollow
    where filled. Right: cosines between all of them, by row of valence. Clusters are joined to none."""
    figure, axes = new_figure(2, size=(4.6, 4.0))
    vectors = bank.prototypes.double().numpy()
    centered = vectors - vectors.mean(axis=0)
    _, _, axes_of_variance = np.linalg.svd(centered, full_matrices=False)
    place = np.zeros((len(vectors), 2))
    projected = centered @ axes_of_variance[:2].T
    place[:, : projected.shape[1]] = projected
    left, right = axes[0]
    if bank.va is None:
        net = place.reshape(bank.grid, bank.grid, 2)
        for line in (*net, *net.transpose(1, 0, 2)):
            left.plot(line[:, 0], line[:, 1], color="#cbd5e1", lw=0.7, zorder=1)
    valence, arousal = bank.places.T
    sizes = 20 + 40 * (arousal + 1)
    colors = figure.colorbar(
        left.scatter(place[:, 0], place[:, 1], c=valence, s=0, cmap="coolwarm", vmin=-1, vmax=1), ax=left, shrink=0.8
    )
    colors.set_label("valence (size: arousal; hollow: filled)")
    tones = colors.cmap((valence + 1) / 2)
    faces = np.where(bank.empty[:, None], [1.0, 1.0, 1.0, 1.0], tones)
    left.scatter(place[:, 0], place[:, 1], s=sizes, facecolors=faces, edgecolors=tones, linewidths=1.2, zorder=2)
    left.locator_params(nbins=5)
    left.set(xlabel="first principal axis", ylabel="second principal axis", title="Prototypes")
    image = right.imshow(cosine_matrix(bank), cmap="RdBu_r", vmin=-1, vmax=1)
    if bank.va is None:
        ticks = np.arange(bank.grid) * bank.grid + (bank.grid - 1) / 2
        labels = [f"{center:.2g}" for center in bank.centers]
        right.set(xticks=ticks, yticks=ticks, xticklabels=labels, yticklabels=labels)
    name = "valence (arousal within)" if bank.va is None else "cluster, by valence"
    right.set(xlabel=name, ylabel=name, title="Cosine between prototypes")
    figure.colorbar(image, ax=right, shrink=0.8)
    save_figure(path, figure)
