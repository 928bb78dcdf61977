"""The whole study: the limit of the moves, the rules on particles, the joint functional, when features separate."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ngd_fast.artifacts.figure_style import has_matplotlib
from ngd_fast.artifacts.files import require_free, save_npz, sha256, write_json, write_sums, write_text
from ngd_fast.artifacts.fingerprint import commit, environment
from ngd_fast.config import Config, dump_config
from ngd_fast.console import progress, say
from ngd_fast.errors import UserError
from ngd_fast.flows import lyapunov, moves, slow
from ngd_fast.flows.manifolds import Graph, Wells, load_points, named_manifold, random_isometry

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
_RECORDS = 24
_SHOWN = 3000
"""Particles in the picture."""
_SPECTRUM = (3.0, 2.0, 1.5, 0.6, 0.3, 0.1)
"""S = diag of these, on which the rules run without noise."""


class StudyConfig(Config):
    manifold: str = "sphere"  # circle, torus, sphere, or an NPZ of points, whose k-NN graph it is
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    particles: Annotated[int, Field(ge=100)] = 4000
    steps: Annotated[int, Field(ge=_RECORDS)] = 4000
    rules: Annotated[tuple[Literal[slow.RULES], ...], Field(min_length=1)] = slow.RULES
    components: Count | None = None  # m, the rows of W; none: 3, or as many dimensions as there are
    gamma: Positive | None = None  # the rules' step; none: 0.05 / R^2 on a manifold, 0.25 / R^2 on a file's points
    # on a manifold
    dimension: Annotated[int, Field(ge=2, le=63)] = 7  # of the sphere
    features: Annotated[int, Field(ge=2, le=4096)] = 16  # the space that the manifold is carried into, isometrically
    wells: Annotated[int, Field(ge=2, le=16)] = 3
    concentration: Positive = 6.0
    nuisance: Annotated[float, Field(ge=0)] = 0.0  # strength of an axis that no class depends on
    acceptance: Literal[moves.RULES] = "barker"
    beta: Positive = 1.0
    eps: Annotated[float, Field(gt=0, le=1)] = 0.25
    compile: bool | None = None  # none: from 10^8 moves, which take longer than to compile their code
    # on a file's points
    array: str = "auto"
    center: bool = True  # principal components are those of centred points
    neighbours: Count = 10
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    bandwidth: Positive | None = None  # eps of the kernel; none: a quarter of the median squared k-th distance


class _Walkers:
    """Particles on a product of spheres; features [N, d]."""

    def __init__(self, config: StudyConfig, generator: torch.Generator):
        self.manifold = named_manifold(config.manifold, config.dimension)
        if config.features < self.manifold.ambient:
            raise UserError(
                f"features={config.features}: the {config.manifold} lies in {self.manifold.ambient} dimensions"
            )
        self.wells = Wells.random(self.manifold, config.wells, config.concentration, config.nuisance, generator)
        self.frame = random_isometry(config.features, self.manifold.ambient, generator)
        compiled = config.compile if config.compile is not None else config.particles * config.steps >= 1e8
        self.walk = moves.Walk(
            self.manifold, self.wells, particles=config.particles, beta=config.beta, eps=config.eps,
            rule=config.acceptance, generator=generator, compiled=compiled,
        )  # fmt: skip
        self.rank, self.radius = self.manifold.ambient, self.manifold.count**0.5
        self.step, self.gamma = self.walk.step, 0.05 / self.radius**2

    def features(self) -> Tensor:
        return (self.frame @ self.walk.x).T

    def labels(self) -> Tensor:
        return self.wells.labels(self.walk.x)

    def place(self) -> np.ndarray:
        """[D, shown]: where the particles are, to be drawn."""
        return self.walk.x[:, :_SHOWN].cpu().numpy().copy()  # the particles move on, in place


class _Hoppers:
    """Particles on the graph of a file's points."""

    def __init__(self, config: StudyConfig, generator: torch.Generator):
        points, labels = load_points(config.manifold, config.array, center=config.center)
        self.graph = Graph.of(
            points, neighbours=config.neighbours, alpha=config.alpha, eps=config.bandwidth, labels=labels,
            source=config.manifold, device=generator.device,
        )  # fmt: skip
        self.generator = generator
        self.nodes = torch.randint(len(points), (config.particles,), generator=generator, device=generator.device)
        self.rank = min(points.shape)
        self.radius = float(self.graph.features.norm(dim=1).max())
        self.gamma = 0.25 / self.radius**2

    def step(self) -> None:
        uniform = torch.rand(
            len(self.nodes), generator=self.generator, device=self.nodes.device, dtype=torch.float64
        )  # fmt: skip
        self.nodes = self.graph.step(self.nodes, uniform)

    def features(self) -> Tensor:
        return self.graph.features[self.nodes]

    def place(self) -> np.ndarray:
        return self.nodes[:_SHOWN].cpu().numpy().copy()


def run_study(config: StudyConfig, out: str | Path, *, device: str = "cpu") -> dict[str, Any]:
    """Run everything and write OUT: config.yaml, metrics.json, series.npz, viz/, SHA256SUMS.txt; returns the metrics.

    Raises UserError before anything is written for what cannot work: more components than the points have dimensions, a
    step outside the stable regime, a graph in parts, points that are NaN.
    """
    out = Path(out)
    require_free(out)
    generator = torch.Generator(device=device).manual_seed(config.seed)
    named = config.manifold in ("circle", "torus", "sphere")
    particles = (_Walkers if named else _Hoppers)(config, generator)
    components = config.components or min(3, particles.rank)
    if components > particles.rank:
        raise UserError(
            f"components={components}: the features of {config.manifold} span {particles.rank} dimensions; use "
            f"{particles.rank} or fewer"
        )
    gamma = config.gamma or particles.gamma
    for rule in config.rules:
        slow.require_stable(rule, gamma, particles.radius)

    learned, series = learn(config, particles, components, gamma, generator)
    metrics = {
        "study": "coupled flows", "manifold": config.manifold, "seed": config.seed, "gamma": gamma,
        "radius": particles.radius, "learned": learned,
        "moves": {rule: moves.limit_errors(rule) for rule in progress(moves.RULES, desc="limit", unit="rule")},
        "collapse": _collapse(config, series), "lyapunov": _lyapunov(config, series),
        "separability": separability(config), "environment": environment(), "commit": commit(),
        "data": None if named else {"file": Path(config.manifold).name, "sha256": sha256(config.manifold)},
    }  # fmt: skip
    write_text(out / "config.yaml", dump_config(config))
    write_json(out / "metrics.json", metrics)
    save_npz(out / "series.npz", series, compress=True)
    if has_matplotlib():
        from ngd_fast.flows.figures import draw_all

        draw_all(out, metrics, series)
    else:
        say("no figures: they need matplotlib (pip install 'ngd-fast[viz]')")
    write_sums(out)
    return metrics


def learn(
    config: StudyConfig, particles: "_Walkers | _Hoppers", m: int, gamma: float, generator: torch.Generator
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """All rules on the same moving particles: what each finds against the exact eigenspace, and its course."""
    device = generator.device
    start = torch.randn(m, particles.features().shape[1], generator=generator, device=device)
    start = start / start.norm()
    weights, seconds = {rule: start for rule in config.rules}, dict.fromkeys(config.rules, 0.0)
    marks = set(np.unique(np.geomspace(1, config.steps, _RECORDS).astype(int)).tolist())
    course, pooled, places, diverged = {rule: [] for rule in config.rules}, [], {0: particles.place()}, {}
    frames = {max(1, config.steps // 100), config.steps}
    moving = 0.0
    for step in progress(range(1, config.steps + 1), desc=Path(config.manifold).stem, unit="step"):
        began = time.perf_counter()
        particles.step()
        x = particles.features()
        moving += time.perf_counter() - began
        for rule in weights.keys() - diverged.keys():
            began = time.perf_counter()
            weights[rule] = slow.update(rule, weights[rule], *slow.moments(weights[rule], x), gamma)
            seconds[rule] += time.perf_counter() - began
        if step in marks:
            for rule in config.rules:
                if rule not in diverged:
                    course[rule].append((step, weights[rule]))
                    if not weights[rule].norm() < 1e6:
                        diverged[rule] = step
        if step in frames:
            places[step] = particles.place()
        if step > config.steps // 2 and step % max(1, config.steps // 100) == 0:
            pooled.append(x)
    if isinstance(particles, _Hoppers):
        graph = particles.graph
        points = graph.features
        # under the walk's own distribution, not that of the file
        weighted = points * (len(points) * graph.stationary).sqrt().float()[:, None]
        labels = graph.labels
    else:
        points, weighted, labels = x, torch.cat(pooled), particles.labels()
    began = time.perf_counter()
    eigenvalues, V = slow.eigenspace(weighted, m)
    exact_seconds = time.perf_counter() - began
    probe = _probe_on(points, labels, config.seed)
    total = float(eigenvalues[:m].sum())
    series = {f"place_{step}": place for step, place in places.items()}
    series["eigenvalues"] = eigenvalues.cpu().numpy()
    series["labels"] = (torch.zeros(len(points)) if labels is None else labels).cpu().numpy().astype(np.int64)
    rows = {}
    for rule in progress(config.rules, desc="what they found", unit="rule"):
        steps, values, angles, probes = [], [], [], []
        for step, W in course[rule]:
            steps.append(step)
            values.append(torch.linalg.svdvals(W.double()).cpu().numpy())
            angles.append(slow.principal_angles(W, V)[0])
            probes.append(probe(W))
        W = course[rule][-1][1]
        rows[rule] = {
            "singular_values": values[-1].tolist(), "norm2": float(W.double().square().sum()),
            "angles_degrees": slow.principal_angles(W, V).tolist(), "captured": _captured(W, weighted) / total,
            "probe": probes[-1], "seconds": seconds[rule], "diverged_at": diverged.get(rule),
        }  # fmt: skip
        series |= {f"{rule}_steps": np.array(steps), f"{rule}_singular_values": np.array(values)}
        series |= {f"{rule}_angle": np.array(angles), f"{rule}_probe": np.array(probes, float)}
    series["view"] = _view(config, course, V)
    if isinstance(particles, _Hoppers):
        series["points"] = (points.double() @ torch.from_numpy(series["view"]).to(device).T).float().cpu().numpy()
    else:
        series["view"] = series["view"] @ particles.frame.double().cpu().numpy()
        series["centers"] = particles.wells.centers.cpu().numpy()
    exact = {
        "eigenvalues": eigenvalues[: m + 3].tolist(), "seconds": exact_seconds, "points": list(weighted.shape),
        "probe_eigenspace": probe(V.float()), "probe_features": probe(torch.eye(points.shape[1], device=device)),
        "probe_random": probe(torch.randn(m, points.shape[1], generator=generator, device=device)),
        "share": total / float(eigenvalues.sum()),
    }  # fmt: skip
    return {"rules": rows, "exact": exact, "moving_seconds": moving}, series


def _view(config: StudyConfig, course: dict, V: Tensor) -> np.ndarray:
    """Up to three orthonormal directions of the features to look along: what Sanger found, else the exact ones."""
    W = course["sanger"][-1][1].double() if "sanger" in course else V
    return torch.linalg.qr(W.T)[0].T[:3].cpu().numpy()


def _captured(W: Tensor, x: Tensor) -> float:
    """tr(Q S Q^T), Q an orthonormal basis of the directions that W has not lost."""
    _, values, rows = torch.linalg.svd(W.double(), full_matrices=False)
    rows = rows[values > 1e-3 * values[0]]
    return float((x.double() @ rows.T).square().sum() / len(x))


def _probe_on(x: Tensor, labels: Tensor | None, seed: int) -> Callable[[Tensor], float | None]:
    """A linear probe of y = W x: accuracy on held-out points, None where labels are missing or of one class."""
    known = None if labels is None else (labels >= 0).nonzero()[:4000, 0]
    if known is None or len(known) < 20 or len(labels[known].unique()) < 2:
        return lambda W: None
    x, labels = x[known], labels[known].cpu().numpy()
    return lambda W: linear_probe((x @ W.T).cpu().numpy(), labels, seed)


def linear_probe(y: np.ndarray, labels: np.ndarray, seed: int = 0) -> float:
    """Accuracy of a logistic regression on the half of the rows that it was not fitted to."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = np.random.default_rng(seed).permutation(len(y))
    fitted, held = order[: len(y) // 2], order[len(y) // 2 :]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=100, max_iter=100))
    with warnings.catch_warnings():
        # features that are nearly collinear would take thousands of iterations for nothing that shows in the accuracy
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(y[fitted], labels[fitted])
    return float(model.score(y[held], labels[held]))


def table_of(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What the rules found beside what ``eigh`` does: (head, rows) of text."""
    number = lambda value: "-" if value is None else f"{value:.3f}"  # noqa: E731
    exact, rows = metrics["learned"]["exact"], []
    for rule, row in metrics["learned"]["rules"].items():
        norm = f"diverged at step {row['diverged_at']:,}" if row["diverged_at"] else f"{row['norm2']:.2f}"
        values = ", ".join(f"{v:.3g}" for v in row["singular_values"])
        found = [f"{row['angles_degrees'][0]:.2f}", f"{row['captured']:.4f}", number(row["probe"])]
        rows.append([rule, norm, values, *found, f"{row['seconds']:.2f}"])
    rows.append(["eigh, exact", "", "", "0", "1", number(exact["probe_eigenspace"]), f"{exact['seconds']:.3f}"])
    rows.append(["the features", "", "", "", "", number(exact["probe_features"]), ""])
    rows.append(["a random projection", "", "", "", "", number(exact["probe_random"]), ""])
    head = ["rule", "|W|²", "singular values", "largest angle °", "variance / eigh's", "linear probe", "seconds"]
    return head, rows


def _collapse(config: StudyConfig, series: dict[str, np.ndarray]) -> dict[str, Any]:
    """Every rule on a known spectrum, without noise: the singular values of W over steps."""
    S = torch.diag(torch.tensor(_SPECTRUM, dtype=torch.float64))
    drawn = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(config.seed))
    final = {}
    for rule in config.rules:
        W, values = drawn / drawn.norm(), []
        for _ in range(2000):
            values.append(torch.linalg.svdvals(W).numpy())
            if values[-1][0] > 1e6:
                break
            W = slow.update(rule, W, *slow.exact_moments(W, S), 0.02)
        series[f"{rule}_collapse"] = np.array(values)
        final[rule] = values[-1].tolist()
    return {"spectrum": list(_SPECTRUM), "gamma": 0.02, "singular_values": final}


def _lyapunov(config: StudyConfig, series: dict[str, np.ndarray]) -> dict[str, Any]:
    found = {}
    W = np.random.default_rng(config.seed).normal(size=(2, 4)) * 0.4
    for name, rule, delta in (("oja, delta 0.2", "oja", 0.2), ("oja, delta 1", "oja", 1.0), ("trace", "trace", 0.2)):
        rows = {k: np.array(v) for k, v in lyapunov.descend(lyapunov.example_circle(rule=rule, delta=delta), W).items()}
        series |= {f"lyapunov_{name}_{key}": value for key, value in rows.items()}
        error = np.abs(rows["measured"] - rows["predicted"]) / np.abs(rows["predicted"])
        found[name] = {
            "largest_relative_error": float(error.max()), "always_falls": bool((rows["measured"] < 0).all()),
            "energy": [float(rows["energy"][0]), float(rows["energy"][-1])],
        }  # fmt: skip
    return found


def separability(config: StudyConfig) -> list[dict[str, Any]]:
    """Three cases on S^7: wells alone, with a strong nuisance axis, and two rings that no linear map parts."""
    cases = []
    for name, nuisance, components in (("wells", 0.0, (3,)), ("nuisance axis", 12.0, (3, 4))):
        chosen = StudyConfig(seed=config.seed, particles=config.particles, steps=1200, nuisance=nuisance)
        generator = torch.Generator().manual_seed(config.seed)
        particles, pooled = _Walkers(chosen, generator), []
        for step in progress(range(chosen.steps), desc=name, unit="step"):
            particles.step()
            if step >= 600 and step % 20 == 0:
                pooled.append(particles.features())
        x, labels = particles.features(), particles.labels().numpy()
        for m in components:
            _, V = slow.eigenspace(torch.cat(pooled), m)
            cases.append(_case(name, x, V.float(), labels, generator))
    generator = torch.Generator().manual_seed(config.seed)
    angle = 2 * torch.pi * torch.rand(config.particles, generator=generator)
    ring = torch.arange(config.particles) % 2
    radius = 1 + ring + 0.05 * torch.randn(config.particles, generator=generator)
    flat = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    x = flat @ random_isometry(16, 2, generator).T
    cases.append(_case("concentric rings", x, slow.eigenspace(x, 2)[1].float(), ring.numpy(), generator))
    return cases


def _case(name: str, x: Tensor, V: Tensor, labels: np.ndarray, generator: torch.Generator) -> dict[str, Any]:
    W = torch.randn(V.shape, generator=generator)
    seen = {"x": x, "eigenspace": x @ V.T, "random": x @ W.T}
    return {"case": name, "components": len(V), **{key: linear_probe(y.numpy(), labels) for key, y in seen.items()}}
