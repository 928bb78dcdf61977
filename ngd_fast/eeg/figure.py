"""A grid of topomaps like the paper's figure 3: a row for each corner of the valence/arousal plane, a column a band."""

from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import atomic_path
from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.errors import UserError

# Which windows make a row: the sign of valence and arousal, None for the middle of the plane.
_ROWS = (
    ("pleasant, excited\n(V+, A+)", (1, 1)),
    ("pleasant, calm\n(V+, A−)", (1, -1)),
    ("neutral", None),
    ("unpleasant, excited\n(V−, A+)", (-1, 1)),
    ("unpleasant, calm\n(V−, A−)", (-1, -1)),
)
_MIDDLE = 0.3  # |valence| and |arousal| of the neutral row stay below it, those of the corners reach it


def draw_topomaps(topomaps: Topomaps, out: str | Path, *, subject: int | None = None) -> list[Path]:
    """Draw mean maps by valence/arousal quadrant (or of all windows, where none has a label) and write PNG and PDF.

    ``out`` is a path without suffix for both, or with ``.png``, ``.pdf`` or ``.svg`` for that one. Rows without
    windows are left out. Colours of a column (band) share one range, which its colour bar shows. Raises UserError for
    a subject that is not there.
    """
    figure = make_figure(topomaps, subject=subject)
    out = Path(out)
    paths = [out] if out.suffix in (".png", ".pdf", ".svg") else [out.with_name(out.name + s) for s in (".png", ".pdf")]
    for path in paths:
        with atomic_path(path) as temporary:
            # No date in the file: equal maps give equal bytes.
            stamp = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix)
            figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=stamp)
    return paths


def make_figure(topomaps: Topomaps, *, subject: int | None = None):
    """The matplotlib Figure of :func:`draw_topomaps`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures of topomaps need matplotlib: pip install 'ngd-fast[viz]'") from None

    rows = _mean_maps(topomaps, subject)
    bands = len(topomaps.bands)
    figure = Figure(figsize=(1.7 + 1.55 * bands, 0.6 + 1.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), bands, squeeze=False)
    shown = _widen(np.stack([maps for _, maps in rows]), topomaps.mask)
    for j, band in enumerate(topomaps.bands):
        low, high = np.nanmin(shown[:, j]), np.nanmax(shown[:, j])
        for i, (label, _) in enumerate(rows):
            ax = axes[i, j]
            image = ax.imshow(
                shown[i, j],
                origin="lower",
                extent=(-1, 1, -1, 1),
                vmin=low,
                vmax=high,
                cmap="RdBu_r",
                interpolation="bilinear",
            )
            _head(ax, image)
            if i == 0:
                ax.set_title(str(band), fontsize=10, parse_math=False)
            if j == 0:
                ax.set_ylabel(label, fontsize=8)
        figure.colorbar(image, ax=axes[:, j], location="bottom", shrink=0.8, aspect=16).ax.tick_params(labelsize=7)
    who = "all subjects" if subject is None else f"subject {subject}"
    figure.suptitle(f"Normalised band power, mean over windows ({who})", fontsize=10)
    return figure


def _mean_maps(topomaps: Topomaps, subject: int | None) -> list[tuple[str, np.ndarray]]:
    """Labels and mean maps float32 [bands, H, W] of the rows that have windows."""
    chosen = np.ones(len(topomaps), bool) if subject is None else topomaps.subject == subject
    if not chosen.any():
        known = ", ".join(map(str, np.unique(topomaps.subject)))
        raise UserError(f"subject {subject} has no topomaps; there are {known or 'none'}")
    valence, arousal = topomaps.valence, topomaps.arousal
    rows = []
    for label, signs in _ROWS:
        if signs is None:
            inside = (np.abs(valence) < _MIDDLE) & (np.abs(arousal) < _MIDDLE)
        else:
            inside = (signs[0] * valence >= _MIDDLE) & (signs[1] * arousal >= _MIDDLE)
        members = np.flatnonzero(chosen & inside)
        if len(members):
            rows.append((f"{label}\nn = {len(members)}", topomaps.maps[members].mean(axis=0)))
    if not rows:
        members = np.flatnonzero(chosen)
        rows.append((f"all windows\nn = {len(members)}", topomaps.maps[members].mean(axis=0)))
    return rows


def _widen(maps: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Maps with NaN outside the mask grown by two pixels: drawing smooths the last pixels away."""
    from scipy.ndimage import distance_transform_edt

    distance, nearest = distance_transform_edt(~mask, return_indices=True)
    return np.where(distance < 2.5, maps[..., nearest[0], nearest[1]], np.nan)


def _head(ax, image) -> None:
    """Outline and nose of a head seen from above, the image cut off at the outline, no ticks."""
    from matplotlib.patches import Circle

    image.set_clip_path(Circle((0, 0), 1, transform=ax.transData))
    ax.add_patch(Circle((0, 0), 1, fill=False, linewidth=0.8))
    ax.plot([-0.12, 0, 0.12], [0.993, 1.12, 0.993], color="black", linewidth=0.8)
    ax.set(xlim=(-1.08, 1.08), ylim=(-1.08, 1.16), xticks=[], yticks=[], aspect="equal")
    for spine in ax.spines.values():
        spine.set_visible(False)
