"""The demo in one picture: scalp maps on the valence/arousal plane, the bank, drawn faces, what each term gave."""

from pathlib import Path

import numpy as np

from ngd_fast.artifacts.figure_style import PALETTE, SHADES, new_figure, save_figure


def draw_overview(stem: Path, *, maps: Path, bank: Path, faces: Path, runs: Path, seed: int) -> list[Path]:
    """Write ``stem``.png from the demo's files and return its path. Raises UserError for a file that is missing."""
    from ngd_fast.eeg.manifest import Topomaps
    from ngd_fast.evaluation.results import load_results
    from ngd_fast.faces.dataset import Faces
    from ngd_fast.prototypes.bank import PrototypeBank

    validated = {r.variant: r for r in load_results([runs]) if r.split == "valid" and r.seed == seed}
    with new_figure(12.5, 3.1, columns=4, gridspec_kw={"width_ratios": [1, 1.05, 1.75, 1]}) as (figure, axes):
        _draw_maps(axes[0, 0], Topomaps.load(maps))
        _draw_bank(axes[0, 1], PrototypeBank.load(bank))
        _draw_faces(axes[0, 2], Faces.load(faces), validated["B3"].predictions)
        _draw_gain(axes[0, 3], validated)
        return save_figure(figure, stem, kinds=("png",))


def _draw_maps(axis, topomaps) -> None:
    """Mean map of the alpha band in each quadrant."""
    band = list(topomaps.bands).index("alpha")
    size = topomaps.maps.shape[-1]
    means = {}
    for x in (-1, 1):
        for y in (-1, 1):
            inside = (x * topomaps.valence > 0.3) & (y * topomaps.arousal > 0.3)
            if not inside.any():
                continue
            means[x, y] = np.where(topomaps.mask, topomaps.maps[inside, band].mean(axis=0), np.nan)
    limit = max((np.nanmax(np.abs(mean - np.nanmean(mean))) for mean in means.values()), default=1)
    for (x, y), mean in means.items():
        place = (x * 0.5 - 0.45, x * 0.5 + 0.45, y * 0.5 - 0.45, y * 0.5 + 0.45)
        axis.imshow(mean - np.nanmean(mean), extent=place, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set(xlim=(-1, 1), ylim=(-1, 1), xticks=[-0.5, 0.5], yticks=[-0.5, 0.5], xlabel="valence", ylabel="arousal")
    axis.set(xticklabels=["−", "+"], yticklabels=["−", "+"], title=f"1  EEG: alpha power, {size} x {size}")
    axis.grid(False)


def _draw_bank(axis, bank) -> None:
    """The prototypes by their first principal axis; a number of windows for each bin, none where it was filled."""
    vectors = bank.prototypes.double().numpy()
    centered = vectors - vectors.mean(axis=0)
    along = (centered @ np.linalg.svd(centered, full_matrices=False)[2][0]).reshape(bank.grid, bank.grid)
    along *= 1 if along[-1].mean() >= along[0].mean() else -1
    axis.imshow(along.T, origin="lower", extent=(-1, 1, -1, 1), cmap=SHADES)
    middle = (along.min() + along.max()) / 2
    for i, j in np.ndindex(bank.grid, bank.grid):
        text = bank.counts[i, j] or "filled"
        color = "white" if along[i, j] > middle else "black"
        axis.text(bank.centers[i], bank.centers[j], text, ha="center", va="center", fontsize=7, color=color)
    axis.set(xticks=bank.centers, yticks=bank.centers, xlabel="valence (numbers: windows)")
    axis.set(title=f"2  Prototypes, {bank.grid} x {bank.grid}, frozen")
    axis.grid(False)


def _draw_faces(axis, faces, predictions) -> None:
    """The first face of each class, with the student's answer."""
    size, gap = faces.images.shape[1], 14
    probability = np.exp(predictions.logits - predictions.logits.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    found = [np.flatnonzero(predictions.labels == c) for c in range(len(predictions.class_names))]
    rows = [int(members[0]) for members in found if len(members)]
    columns = (len(rows) + 1) // 2
    for place, row in enumerate(rows):
        x, y = place % columns * (size + 6), place // columns * (size + gap)
        axis.imshow(faces.images[row].squeeze(), cmap="gray", vmin=0, vmax=255, extent=(x, x + size, y + size, y))
        answer = int(probability[row].argmax())
        text = f"{predictions.class_names[answer]} {probability[row, answer]:.2f}"
        right = answer == predictions.labels[row]
        axis.text(x + size / 2, y + size + 2, text, ha="center", va="top", fontsize=7.5,
                  color=PALETTE[3] if right else PALETTE[5])  # fmt: skip
    axis.set(xlim=(0, columns * (size + 6) - 6), ylim=(2 * (size + gap), 0))
    axis.set(title="3  A student (B3) reads drawn faces")
    axis.axis("off")


def _draw_gain(axis, validated) -> None:
    """Macro-F1 of each variant with its interval."""
    variants = sorted(validated)
    for place, variant in enumerate(variants):
        block = validated[variant].blocks["eight_way"]
        low, high = (100 * bound for bound in block["ci"]["macro_f1"])
        score = 100 * block["macro_f1"]
        color = PALETTE[1 if place else 0]
        axis.errorbar(place, score, [[score - low], [high - score]], fmt="o", color=color, capsize=3)
        axis.annotate(f"{score:.1f}", (place, score), textcoords="offset points", xytext=(6, -3), fontsize=8)
    names = [{"B0": "CE", "B1": "+ KD", "B2": "+ Proto", "B3": "+ D-Geo"}.get(v, v) for v in variants]
    axis.set(xticks=range(len(names)), xticklabels=names, xlim=(-0.5, len(names) - 0.2))
    axis.tick_params(axis="x", labelsize=7.5)
    axis.set(title="4  Macro-F1 %, 95 % interval")
