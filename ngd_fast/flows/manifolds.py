"""Where the particles live: products of unit spheres with wells of energy, and the k-NN graph of a data file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ngd_fast.artifacts.files import load_npz
from ngd_fast.errors import UserError

Columns = Sequence[Tensor]
"""D coordinates of N particles, [N] each: a step written so is one loop over particles once compiled."""

_TILT = 0.3
"""How far the wells of a sphere lean to their mean: any two are 62 degrees apart."""


def dot(a: Columns, b: Columns) -> Tensor:
    total = a[0] * b[0]
    for p, q in zip(a[1:], b[1:]):
        total = total + p * q
    return total


@dataclass(frozen=True)
class Spheres:
    """A product of ``count`` unit spheres in R^``size`` each: circle (1, 2), torus (2, 2), S^n (1, n + 1).

    Points are [D, N] with D = count size: a coordinate's values lie side by side.
    """

    count: int
    size: int

    @property
    def ambient(self) -> int:
        """D, the dimension of the space around it."""
        return self.count * self.size

    def random(self, particles: int, generator: torch.Generator) -> Tensor:
        """[D, N] float32 points, uniform on the manifold."""
        drawn = torch.randn(self.count, self.size, particles, generator=generator, device=generator.device)
        return torch.nn.functional.normalize(drawn, dim=1).reshape(self.ambient, particles)

    def propose(self, x: Columns, noise: Columns, eps: Tensor | float) -> list[Tensor]:
        """exp_x(eps xi), xi the part of ``noise`` (standard normal in R^D) that is tangent at x."""
        moved = []
        for start in range(0, self.ambient, self.size):
            point, drawn = x[start : start + self.size], noise[start : start + self.size]
            # over |x|^2, which is 1 but for rounding: a step that is tangent only for |x| = 1 would amplify that
            outward = dot(drawn, point) / dot(point, point)
            step = [eps * (g - outward * p) for g, p in zip(drawn, point)]
            length = dot(step, step).sqrt().clamp(min=1e-12)
            along, ahead = torch.cos(length), torch.sin(length) / length
            moved += [along * p + ahead * v for p, v in zip(point, step)]
        return moved


def named_manifold(name: str, dimension: int) -> Spheres:
    """ "circle", "torus" (a product of two circles) or "sphere" (S^dimension)."""
    return {"circle": Spheres(1, 2), "torus": Spheres(2, 2), "sphere": Spheres(1, dimension + 1)}[name]


@dataclass(frozen=True)
class Wells:
    """U(x) = -log sum_k exp(centers_k . x) - (axis . x)^2: a mixture of von Mises-Fisher wells, and a nuisance axis.

    centers [K, D] are unit vectors (on each sphere of the product) times the concentration; axis [D] is a direction
    that no class depends on, times the root of its strength (0: none).
    """

    centers: Tensor
    axis: Tensor

    @classmethod
    def random(
        cls, manifold: Spheres, wells: int, concentration: float, nuisance: float, generator: torch.Generator
    ) -> "Wells":
        """Centres evenly spaced on circles; on a sphere with room for them, equally far from each other and nearer to
        their mean than to it (so that the largest eigenvalue is simple), the axis orthogonal to them."""
        drawn = manifold.random(wells + 1, generator).T
        if manifold.size == 2:
            turn = torch.arange(wells, device=drawn.device) * (2 * torch.pi / wells)
            offset = torch.atan2(drawn[0, 1::2], drawn[0, ::2])
            angle = turn[:, None] + offset
            drawn[:wells] = torch.stack([angle.cos(), angle.sin()], dim=2).flatten(1)
        elif wells <= manifold.size:
            frame = torch.linalg.qr(drawn[: manifold.size].T)[0].T
            drawn[: len(frame)] = frame
            tilted = frame[:wells] + _TILT * frame[:wells].sum(0)
            drawn[:wells] = torch.nn.functional.normalize(tilted, dim=1)
        return cls((concentration * drawn[:wells]).contiguous(), drawn[wells] * nuisance**0.5)

    def energy(self, x: Columns) -> Tensor:
        """U, [N]."""
        logits = [dot(center.unbind(), x) for center in self.centers.unbind()]
        top = logits[0]
        for logit in logits[1:]:
            top = torch.maximum(top, logit)
        total = torch.exp(logits[0] - top)
        for logit in logits[1:]:
            total = total + torch.exp(logit - top)
        return -top - torch.log(total) - dot(self.axis.unbind(), x).square()

    def labels(self, x: Tensor) -> Tensor:
        """int64 [N]: the nearest well of points [D, N]."""
        return (self.centers @ x).argmax(0)


def random_isometry(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, columns] with orthonormal columns: carries a manifold into more dimensions along no axis of its own."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, device=generator.device))[0].contiguous()


@dataclass(frozen=True)
class Graph:
    """The k nearest neighbours of data points, and a reversible Markov chain on them.

    K = exp(-r^2 / 4 eps) on the edges (both ways) and 1 on the diagonal, q its row sums, K / (q q^T)^alpha normalised
    by rows: for many points (P - I) / eps tends to Laplacian + 2 (1 - alpha) grad log q . grad, so that alpha = 1/2 is
    Langevin with U = -log q, alpha = 1 the Laplace-Beltrami operator (Coifman and Lafon, 2006).
    """

    features: Tensor
    """[n, d] float32."""
    indices: Tensor
    """int64 [edges], the neighbours of node 0, of node 1, ..."""
    cumulative: Tensor
    """float64 [edges], node i's in (i, i + 1]: i and the probability of this neighbour or one before it."""
    stationary: Tensor
    """float64 [n], the distribution that the chain leaves as it is."""
    energy: Tensor
    """float64 [n], -log q."""
    labels: Tensor | None = None
    """int64 [n], where the file has them; -1 for none."""

    @classmethod
    def of(
        cls, features: np.ndarray, *, neighbours: int, alpha: float, eps: float | None = None,
        labels: np.ndarray | None = None, source: str = "features", device: torch.device | str = "cpu",
    ) -> "Graph":  # fmt: skip
        """``features`` [n, d]; ``eps`` None takes a quarter of the median squared distance to the k-th neighbour.

        Raises UserError where the graph is not connected: a walk could never leave its part.
        """
        import scipy.sparse as sparse
        from sklearn.neighbors import NearestNeighbors

        n = len(features)
        if not 1 <= neighbours < n:
            raise UserError(f"neighbours={neighbours}: must be 1 to {n - 1}, {source} has {n} points")
        distance, index = NearestNeighbors(n_neighbors=neighbours + 1).fit(features).kneighbors(features)
        eps = eps or max(float(np.median(distance[:, -1]) ** 2) / 4, 1e-12)
        kernel = np.exp(-(distance**2) / (4 * eps))
        rows = np.repeat(np.arange(n), neighbours + 1)
        edges = sparse.csr_matrix((kernel.ravel(), (rows, index.ravel())), shape=(n, n))
        edges = edges.maximum(edges.T).maximum(sparse.identity(n)).tocsr()
        parts, part = sparse.csgraph.connected_components(edges, directed=False)
        if parts > 1:
            raise UserError(
                f"{source}: the graph of {neighbours} nearest neighbours is not connected: {parts} parts, the smallest "
                f"of {np.bincount(part).min()} of {n} points; raise neighbours (--set neighbours={2 * neighbours})"
            )
        q = np.asarray(edges.sum(1)).ravel()
        scale = sparse.diags(q**-alpha)
        edges = (scale @ edges @ scale).tocsr()
        degree = np.asarray(edges.sum(1)).ravel()
        probability = edges.data / np.repeat(degree, np.diff(edges.indptr))
        ends = np.cumsum(probability)
        # exact at each node's end, so that no rounding lets a walk reach a neighbour of the next node
        node = np.repeat(np.arange(n), np.diff(edges.indptr))
        cumulative = ends - np.concatenate([[0.0], ends])[edges.indptr[:-1]][node] + node
        cumulative[edges.indptr[1:] - 1] = np.arange(1, n + 1)
        to = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(device)  # noqa: E731
        return cls(
            to(features.astype(np.float32)), to(edges.indices.astype(np.int64)), to(cumulative),
            to(degree / degree.sum()), to(-np.log(q)), None if labels is None else to(labels.astype(np.int64)),
        )  # fmt: skip

    def step(self, nodes: Tensor, uniform: Tensor) -> Tensor:
        """int64 [N] nodes to their next ones, by ``uniform`` float64 [N] in [0, 1)."""
        found = torch.searchsorted(self.cumulative, nodes + uniform, right=True)
        return self.indices[found.clamp(max=len(self.indices) - 1)]


def load_points(path: str | Path, array: str, *, center: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Points [n, d] float64 and labels (int64 [n], or None) of an NPZ.

    ``array`` names the one that holds the points; "auto" takes features (what ``ngd-fast evaluate`` keeps of a student)
    or maps (topomaps, one point a window, pixels that never change left out). ``center`` takes the mean off.
    Raises UserError naming the file.
    """
    arrays = load_npz(path)
    known = [array] if array != "auto" else ["features", "maps"]
    name = next((key for key in known if key in arrays), None)
    if name is None:
        raise UserError(f"{path}: lacks {' or '.join(known)} (has {', '.join(arrays)}); name one with --set array=NAME")
    points = arrays[name]
    if points.dtype.kind not in "fiu" or points.ndim < 2 or len(points) < 3:
        raise UserError(f"{path}: {name} must be numbers [n >= 3, d], is {points.dtype} {list(points.shape)}")
    points = points.reshape(len(points), -1).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(points).all(1))
    if bad.size:
        raise UserError(f"{path}: {name} is NaN or infinite in {bad.size} of {len(points)} rows, first row {bad[0]}")
    points = points[:, np.ptp(points, axis=0) > 0]
    if not points.shape[1]:
        raise UserError(f"{path}: {name} has the same point in every row")
    labels = arrays.get("labels")
    if labels is not None and (labels.shape != (len(points),) or labels.dtype.kind not in "iu"):
        raise UserError(f"{path}: labels must be integers [{len(points)}], are {labels.dtype} {list(labels.shape)}")
    return points - points.mean(0) if center else points, labels
