"""The quality page of a file of topomaps: what was cut, spectra, maps, ratings and the grid's coverage, in one HTML."""

from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np

from ngd_fast.artifacts import html
from ngd_fast.artifacts.figure_style import PALETTE, SHADES, WIDTH, new_figure, render
from ngd_fast.artifacts.files import write_text
from ngd_fast.eeg.figure import make_figure
from ngd_fast.eeg.manifest import Topomaps


def write_report(topomaps: Topomaps, out: str | Path, title: str) -> Path:
    """Write the page to ``out`` (.html). The same maps give the same bytes. Raises UserError without matplotlib."""
    sections = [(key, heading, content) for key, heading, make in _SECTIONS if (content := make(topomaps))]
    meta, labelled = topomaps.meta, int(topomaps.labelled.sum())
    header = html.facts(
        [
            (f"{len(topomaps):,}", "windows"),
            (f"{labelled:,}", "with ratings"),
            (str(len(np.unique(topomaps.subject))), "subjects"),
            (str(len(np.unique(np.stack([topomaps.subject, topomaps.trial]), axis=1).T)), "trials"),
            (str(len(topomaps.channels)), "channels"),
            (str(sum(meta.get("exclusions", {}).values())), "things left out"),
        ]
    )
    write_text(out, html.page(title, header, sections))
    return Path(out)


def _left_out(topomaps: Topomaps) -> str:
    meta = topomaps.meta
    counts = meta.get("exclusions", {})
    content = html.table(["left out", "how many"], [[escape(k), str(v)] for k, v in sorted(counts.items())])
    if not counts:
        content = "<p>Nothing was left out.</p>"
    if meta.get("left_out"):
        content += html.details(
            "each case", "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in meta["left_out"]) + "</ul>"
        )
    if meta.get("rebuilt_channels"):
        said = ", ".join(f"{name} {count} times" for name, count in sorted(meta["rebuilt_channels"].items()))
        content += f"<p>Rebuilt from their neighbours: {escape(said)}.</p>"
    trials = meta.get("quality", {}).get("trials", [])
    if trials:
        rows = [
            [
                str(t["subject"]),
                str(t["trial"]),
                str(t["windows"]),
                str(t["cut"]),
                str(t["ocular"]),
                escape(", ".join(t["rebuilt"])),
            ]
            for t in trials
        ]
        head = ["subject", "trial", "windows", "cut", "eye components", "rebuilt channels"]
        content += html.details(f"all {len(rows)} trials", html.table(head, rows))
    return content


def _spectra(topomaps: Topomaps) -> str:
    spectra = topomaps.meta.get("quality", {}).get("spectra_db", {})
    if not spectra:
        return ""
    with new_figure(WIDTH, 3.2, 1, 2, sharey=True) as (figure, axes):
        for side, (axis, name) in enumerate(zip(axes[0], ("as recorded", "cleaned"))):
            for pair in spectra.values():
                axis.plot(range(1, len(pair[side])), pair[side][1:], color=PALETTE[0], alpha=0.35, lw=0.8)
            bins = min(len(pair[side]) for pair in spectra.values())
            axis.plot(
                range(1, bins), np.mean([p[side][:bins] for p in spectra.values()], axis=0)[1:], color=PALETTE[1], lw=2
            )
            axis.set(title=name, xlabel="Hz")
        axes[0][0].set_ylabel("dB, uV²/Hz")
        # What filters took away would stretch the axis to where nothing is told apart.
        axes[0][0].set_ylim(bottom=max(axes[0][0].get_ylim()[0], axes[0][0].get_ylim()[1] - 80))
        image = render(figure, "svg")
    caption = (
        "Power spectra, mean over channels and trials (30 s of each at most): subjects in grey, their mean in blue."
    )
    return html.figure(image, "svg", caption)


def _maps(topomaps: Topomaps) -> str:
    image = render(make_figure(topomaps), "png")
    return html.figure(image, "png", "Mean maps of the corners and the middle of the valence/arousal plane.", width=760)


def _ratings(topomaps: Topomaps) -> str:
    if not topomaps.labelled.any():
        return "<p>No window has ratings: all of it is unlabelled support.</p>"
    keys = np.stack([topomaps.subject, topomaps.trial], axis=1)[topomaps.labelled]
    _, first = np.unique(keys, axis=0, return_index=True)
    valence, arousal = (v[topomaps.labelled] for v in (topomaps.valence, topomaps.arousal))
    counts = coverage(valence, arousal)
    trials = coverage(valence[first], arousal[first])
    with new_figure(WIDTH, 4.2, 1, 2) as (figure, axes):
        plane, grid = axes[0]
        spread = np.random.default_rng(0).uniform(-0.02, 0.02, (2, len(first)))
        plane.scatter(valence[first] + spread[0], arousal[first] + spread[1], s=10, color=PALETTE[1], alpha=0.5)
        plane.set(
            xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xlabel="valence", ylabel="arousal", title="ratings of the trials"
        )
        plane.set_aspect("equal")
        grid.imshow(counts.T, origin="lower", cmap=SHADES, extent=(-1, 1, -1, 1))
        for (i, j), count in np.ndenumerate(counts):
            color = "white" if count > counts.max() / 2 else "black"
            grid.text(
                -0.8 + 0.4 * i,
                -0.8 + 0.4 * j,
                f"{count}\n({trials[i, j]})",
                ha="center",
                va="center",
                color=color,
                fontsize=8,
            )
        grid.set(xlabel="valence", ylabel="arousal", title="windows (trials) in each bin")
        grid.grid(False)
        image = render(figure, "svg")
    empty = int((counts == 0).sum())
    text = f"{empty} of the 25 bins of a 5x5 bank are empty; their prototypes would be filled from their neighbours."
    return f"<p>{text}</p>" + html.figure(image, "svg", "Ratings (a little scattered) and what they put into each bin.")


def coverage(valence: np.ndarray, arousal: np.ndarray, grid: int = 5) -> np.ndarray:
    """int64 [grid, grid]: ratings in each bin of the plane, as a bank of prototypes will have it (valence first)."""
    edges = np.linspace(-1, 1, grid + 1)[1:-1]
    counts = np.zeros((grid, grid), np.int64)
    np.add.at(counts, (np.digitize(valence, edges), np.digitize(arousal, edges)), 1)
    return counts


def _origin(topomaps: Topomaps) -> str:
    import yaml

    meta = {
        k: v for k, v in topomaps.meta.items() if k not in ("quality", "left_out", "exclusions", "rebuilt_channels")
    }
    return html.details("settings, files and checksums", f"<pre>{escape(yaml.safe_dump(meta, sort_keys=False))}</pre>")


_SECTIONS: tuple[tuple[str, str, Callable[[Topomaps], str]], ...] = (
    ("cut", "What was cut", _left_out),
    ("spectra", "Spectra before and after cleaning", _spectra),
    ("maps", "Topomaps", _maps),
    ("ratings", "Ratings and the grid they will fill", _ratings),
    ("origin", "Where it came from", _origin),
)
