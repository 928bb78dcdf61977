"""The study's figures: the limit, the rules, the functional, what is learned, and the particles where they live."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ngd_fast.artifacts.figure_style import LINES, MARKERS, PALETTE, color_of, new_figure, save_figure
from ngd_fast.flows.manifolds import Wells
from ngd_fast.flows.slow import RULES

CAPTIONS = {
    "particles": "The particles at the start, early and at the end, coloured by their nearest well (those of a file by "
    "their labels). Shade, or a circle's dashed line: the density that the wells ask for. A sphere of more than two "
    "dimensions is seen along three directions that the weights found; small circles are its wells.",
    "limit": "How far local moves on a circle are from their Langevin limit: the generator, and the law up to t = 2. "
    "Barker's moves are of second order in epsilon, Metropolis' of first.",
    "collapse": "Singular values of the weights under a known spectrum, without noise. The trace rule keeps one "
    "direction; Hebb's rule diverges.",
    "energy": "The joint functional along the coupled flow, and its slope: measured (marks) and predicted (lines).",
    "learning": "The rules on the moving particles: largest principal angle to the exact eigenspace, and a linear "
    "probe of the weights' outputs. Dotted: the probe on the exact eigenspace.",
    "separability": "A linear probe on S^7 in three cases. With a strong nuisance axis the principal eigenspace loses "
    "what tells the wells apart; rings are parted by no linear map.",
}
_COLORS = {rule: color_of(i + 1) for i, rule in enumerate(RULES)}


def draw_all(out: Path, metrics: Mapping[str, Any], series: Mapping[str, np.ndarray]) -> None:
    """Write every figure to OUT/viz as PDF, SVG and PNG."""
    makers = {
        "particles": particles_figure, "limit": limit_figure, "collapse": collapse_figure, "energy": energy_figure,
        "learning": learning_figure, "separability": separability_figure,
    }  # fmt: skip
    for name, make in makers.items():
        save_figure(make(metrics, series), out / "viz" / name)


def limit_figure(metrics: Mapping, series: Mapping):
    with new_figure(8, 3.2, 1, 2) as (figure, axes):
        for axis, name, title in zip(axes[0], ("generator", "semigroup"), ("Generator", "Law up to t = 2")):
            for i, (rule, rows) in enumerate(metrics["moves"].items()):
                label = f"{rule.capitalize()}, slope {rows[f'{name}_slope']:.2f}"
                axis.loglog(rows["epsilon"], rows[name], marker=MARKERS[i], color=color_of(i + 1), label=label)
            axis.set(xlabel="epsilon", ylabel="largest error", title=title)
            axis.set_xticks(rows["epsilon"], [f"{e:g}" for e in rows["epsilon"]])
            axis.minorticks_off()
            axis.legend()
    return figure


def collapse_figure(metrics: Mapping, series: Mapping):
    rules = list(metrics["collapse"]["singular_values"])
    with new_figure(2.1 * len(rules), 2.6, 1, len(rules), sharey=True) as (figure, axes):
        for axis, rule in zip(axes[0], rules):
            values = series[f"{rule}_collapse"]
            for k in range(values.shape[1]):
                axis.plot(np.maximum(values[:, k], 1e-3), LINES[k], color=_COLORS[rule], lw=1.6)
            axis.set(title=rule, xlabel="steps", yscale="log", ylim=(1e-3, 30))
        axes[0][0].set_ylabel("singular values of W")
    return figure


def energy_figure(metrics: Mapping, series: Mapping):
    with new_figure(8, 3.2, 1, 2) as (figure, axes):
        energy, slope = axes[0]
        for i, name in enumerate(metrics["lyapunov"]):
            rows = {key: series[f"lyapunov_{name}_{key}"] for key in ("time", "energy", "measured", "predicted")}
            energy.plot(rows["time"], rows["energy"], LINES[i], color=color_of(i + 1), label=name)
            slope.plot(rows["time"], -rows["predicted"], LINES[i], color=color_of(i + 1))
            slope.plot(
                rows["time"][::4], -rows["measured"][::4], MARKERS[i], color=color_of(i + 1), ms=4, mfc="white",
                label=f"within {100 * metrics['lyapunov'][name]['largest_relative_error']:.2f} %",
            )  # fmt: skip
        energy.set(xlabel="time", ylabel="F", title="Joint functional")
        slope.set(xlabel="time", ylabel="-dF/dt", yscale="log", title="Its slope, measured and predicted")
        energy.legend()
        slope.legend()
    return figure


def learning_figure(metrics: Mapping, series: Mapping):
    learned = metrics["learned"]
    best = learned["exact"]["probe_eigenspace"]
    with new_figure(8 if best else 5, 3.2, 1, 2 if best else 1) as (figure, axes):
        for i, rule in enumerate(learned["rules"]):
            # where rules agree, the wider lines stay visible below
            style = {"ls": LINES[i], "color": _COLORS[rule], "lw": 1.2 + 0.9 * (len(learned["rules"]) - i - 1)}
            steps = series[f"{rule}_steps"]
            axes[0][0].plot(steps, np.maximum(series[f"{rule}_angle"], 1e-2), label=rule, **style)
            if best:
                axes[0][1].plot(steps, series[f"{rule}_probe"], **style)
        axes[0][0].set(xscale="log", yscale="log", ylabel="degrees", title="Angle to the exact eigenspace")
        axes[0][0].set_yticks([0.1, 1, 10, 90], ["0.1", "1", "10", "90"])
        axes[0][0].legend()
        if best:
            axes[0][1].axhline(best, ls=":", color="black", lw=1)
            axes[0][1].set(xscale="log", ylabel="accuracy", title="Linear probe")
        for axis in axes[0]:
            axis.set_xlabel("steps")
    return figure


def separability_figure(metrics: Mapping, series: Mapping):
    cases = metrics["separability"]
    with new_figure(7, 2.8) as (figure, axes):
        axis = axes[0][0]
        kinds = (("x", "the features"), ("eigenspace", "exact principal eigenspace"), ("random", "random projection"))
        for i, (key, name) in enumerate(kinds):
            place = np.arange(len(cases)) + 0.26 * (i - 1)
            bars = axis.bar(place, [c[key] for c in cases], 0.24, color=PALETTE[(0, 1, 6)[i]], label=name)
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.set_xticks(range(len(cases)), [f"{c['case']}\nm = {c['components']}" for c in cases])
        axis.set(ylabel="accuracy of a linear probe", ylim=(0, 1.05))
        axis.grid(visible=False, axis="x")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def particles_figure(metrics: Mapping, series: Mapping):
    """Three moments of the particles, drawn for the manifold at hand."""
    steps = sorted(int(name.removeprefix("place_")) for name in series if name.startswith("place_"))
    draw = _draw_graph if "points" in series else _DRAW.get(series["place_0"].shape[0], _draw_ball)
    draw = _draw_surface if metrics["manifold"] == "torus" else draw
    with new_figure(9, 3.3, 1, len(steps)) as (figure, axes):
        for axis, step in zip(axes[0], steps):
            axis.set_axis_off()
            axis.set_aspect("equal")
            draw(axis, series[f"place_{step}"], series)
            axis.set_title("start" if step == 0 else f"after {step:,} move{'s' if step > 1 else ''}", color="#333333")
    return figure


def _wells(series: Mapping, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest well, and exp(-U) (largest: 1), of points x [D, n]. The nuisance axis is left out of the shading."""
    centers = torch.from_numpy(series["centers"])
    points = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    wells = Wells(centers, torch.zeros(centers.shape[1]))
    energy = wells.energy(points.unbind()).numpy()
    return wells.labels(points).numpy(), np.exp(energy.min() - energy)


def _dots(axis, x, y, labels, size, alpha, order=None) -> None:
    order = np.arange(len(x)) if order is None else order
    colors = np.array([color_of(1 + i % 7) for i in range(labels.max() + 1)])[labels]
    size = np.broadcast_to(size, len(x))
    axis.scatter(x[order], y[order], s=size[order], c=colors[order], alpha=alpha, lw=0, rasterized=True, zorder=3)


def _draw_circle(axis, place: np.ndarray, series: Mapping) -> None:
    """Each particle outside the circle, at a random height below the density there: the cloud is the histogram."""
    angle, labels = np.arctan2(place[1], place[0]), _wells(series, place)[0]
    counts, edges = np.histogram(angle, 72, (-np.pi, np.pi), density=True)
    grid = np.linspace(-np.pi, np.pi, 721)
    gibbs = _wells(series, np.stack([np.cos(grid), np.sin(grid)]))[1]
    gibbs /= gibbs[:-1].mean() * 2 * np.pi
    height = counts[np.clip(np.digitize(angle, edges) - 1, 0, 71)]
    radius = 1.03 + 1.6 * height * np.random.default_rng(0).random(len(angle))
    _dots(axis, radius * np.cos(angle), radius * np.sin(angle), labels, 4, 0.6)
    for r, line, width in ((np.ones_like(grid), "-", 1.2), (1.03 + 1.6 * gibbs, "--", 0.9)):
        axis.plot(r * np.cos(grid), r * np.sin(grid), line, color="#333333", lw=width)
    axis.set(xlim=(-1.8, 1.8), ylim=(-1.8, 1.8))


def _draw_surface(axis, place: np.ndarray, series: Mapping) -> None:
    """A sphere in three dimensions or a torus: the shaded surface, and the particles in front of it."""
    from matplotlib.collections import PolyCollection

    torus = len(place) == 4
    u, v = np.meshgrid(np.linspace(0, 2 * np.pi, 161), np.linspace(0, 2 * np.pi if torus else np.pi, 81))
    if torus:
        surface = np.stack([np.cos(u), np.sin(u), np.cos(v), np.sin(v)]).reshape(4, -1)
    else:
        surface = np.stack([np.sin(v) * np.cos(u), np.sin(v) * np.sin(u), np.cos(v)]).reshape(3, -1)
    turn = _turned(np.array([-0.25, -0.62, 0.74])) if torus else _turned(series["centers"].sum(0))
    see = lambda x: turn @ _embed(x)  # noqa: E731
    seen = see(surface).reshape(3, *u.shape)
    corners = np.stack([seen[:, :-1, :-1], seen[:, 1:, :-1], seen[:, 1:, 1:], seen[:, :-1, 1:]], axis=-1)
    middle = corners.mean(-1).reshape(3, -1)
    normal = np.cross(corners[..., 2] - corners[..., 0], corners[..., 3] - corners[..., 1], axis=0).reshape(3, -1)
    normal /= np.linalg.norm(normal, axis=0) + 1e-9
    light = np.clip((normal * np.sign(normal[2])).T @ np.array([-0.33, 0.42, 0.85]), 0, 1)
    density = _wells(series, surface)[1].reshape(u.shape)[:-1, :-1].ravel()
    grey = (0.70 + 0.29 * light) * (1 - 0.13 * density)
    order = np.argsort(middle[2])
    faces = np.stack([grey * 0.97, grey * 0.985, np.minimum(grey * 1.01, 1)], axis=1)[order]
    polygons = corners[:2].reshape(2, -1, 4).transpose(1, 2, 0)[order]
    axis.add_collection(PolyCollection(polygons, facecolors=faces, edgecolors=faces, lw=0.3, rasterized=True))
    x, y, z = see(place)
    # a depth buffer of the surface says which particles face the viewer
    cell = lambda a, b: (np.clip(np.stack([a, b]) * 30 + 60, 0, 119)).astype(int)  # noqa: E731
    front = np.full((120, 120), -np.inf)
    np.maximum.at(front, tuple(cell(*middle[:2])), middle[2])
    visible = z > front[tuple(cell(x, y))] - 0.12
    _dots(axis, x[visible], y[visible], _wells(series, place)[0][visible], 7, 0.75)
    reach = 1.62 if torus else 1.06
    axis.set(xlim=(-reach, reach), ylim=(-reach * 0.86, reach * 0.86) if torus else (-reach, reach))


def _embed(x: np.ndarray) -> np.ndarray:
    """Points [3, n] of a sphere as they are, [4, n] of a torus on a tube in three dimensions."""
    if len(x) == 3:
        return x
    return np.stack([(1 + 0.45 * x[2]) * x[0], (1 + 0.45 * x[2]) * x[1], 0.45 * x[3]])


def _turned(toward: np.ndarray) -> np.ndarray:
    """A rotation [3, 3] that brings ``toward`` to the viewer, on the third axis."""
    third = toward / (np.linalg.norm(toward) or 1.0)
    first = np.cross([0.0, 1.0, 0.0] if abs(third[1]) < 0.9 else [1.0, 0.0, 0.0], third)
    first /= np.linalg.norm(first)
    return np.stack([first, np.cross(third, first), third])


def _draw_ball(axis, place: np.ndarray, series: Mapping) -> None:
    """A sphere of more dimensions: its image under three orthonormal directions fills the unit ball."""
    view, centers = series["view"], series["centers"].T
    centers = view @ (centers / np.linalg.norm(centers, axis=0))
    turn = _turned(np.array([0.35, 0.3, 1.0])) if len(view) == 3 else np.eye(len(view))
    turn = turn @ _turned(centers.mean(1)) if len(view) == 3 else turn
    seen, wells = turn @ view @ place, turn @ centers
    depth = seen[2] if len(seen) == 3 else np.zeros(seen.shape[1])
    r = np.hypot(*np.meshgrid(np.linspace(-1, 1, 400), np.linspace(-1, 1, 400)))
    shade = np.clip(0.90 + 0.09 * np.sqrt(np.clip(1 - r**2, 0, 1)), 0, 1)
    image = np.stack([shade * 0.985, shade * 0.992, shade, np.clip((1 - r) * 200, 0, 1)], axis=-1)
    axis.imshow(image, extent=(-1, 1, -1, 1), origin="lower", zorder=0)
    _dots(axis, seen[0], seen[1], _wells(series, place)[0], 4 + 5 * (1 + depth), 0.55, np.argsort(depth))
    for k, well in enumerate(wells.T):
        axis.plot(*well[:2], "o", ms=11, mfc="none", mec="white", mew=3.2, zorder=4)
        axis.plot(*well[:2], "o", ms=11, mfc="none", mec=color_of(1 + k % 7), mew=1.6, zorder=5)
    axis.set(xlim=(-1.04, 1.04), ylim=(-1.04, 1.04))


def _draw_graph(axis, place: np.ndarray, series: Mapping) -> None:
    """A file's points along the first two directions found; particles as dots whose size counts them."""
    points = series["points"]
    across = points[:, 1] if points.shape[1] > 1 else np.zeros(len(points))
    axis.set_aspect("auto")
    axis.scatter(points[:, 0], across, s=3, c="#d5dae0", lw=0, rasterized=True)
    nodes, counts = np.unique(place, return_counts=True)
    labels = np.maximum(series["labels"][nodes], 0)
    _dots(axis, points[nodes, 0], across[nodes], labels, 4.0 * counts, 0.6)


_DRAW = {2: _draw_circle, 3: _draw_surface}
