"""Topographic maps as one linear operator: image = matrix @ values + offset, the same image that MNE interpolates.

MNE's ``plot_topomap`` triangulates the sensors and some extra points around them, gives the extra points the mean of
their neighbours (or a fixed border value) and interpolates on a grid, anew for every map. All of that is linear in the
sensor values, so it is done here once for a montage; a map is then one row of a matrix product.

Where MNE itself is not linear: its cubic (Clough-Tocher) interpolator estimates gradients by an iteration that stops
at an error of 1e-6, absolute where the gradient is below 1. On values of scale 1 and more (microvolt, dB, z-scores)
its maps agree with this operator to better than 1e-6 of their range; on volts (1e-6) they are off by some per mille
and on V^2 (1e-12) by more than 10 %. The operator is iterated to convergence and has no such scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from ngd_fast.config import Config
from ngd_fast.eeg.channels import channel_positions
from ngd_fast.errors import UserError

# Metres. MNE's own default is 0.095, but it widens the picture to the outermost sensor, so that caps that differ are
# drawn at different scales. All scalp electrodes of the 10-20 system fit into this radius: one then lies on the same
# pixel whatever the cap, as it must for one teacher to see DREAMER (14 channels) and MAHNOB-HCI (32).
HEAD_RADIUS = 0.106

_CHUNK_PIXELS = 1 << 18  # of images that stay in the cache between two steps


_Metres = Annotated[float, Field(ge=-1, le=1)]


class TopomapConfig(Config):
    """How channels become an image."""

    montage: str = Field("standard_1020", description="a montage that MNE knows, or a file of electrode positions")
    method: Literal["cubic", "linear"] = "cubic"
    extrapolate: Literal["head", "local", "box"] = "head"
    border: Literal["mean"] | Annotated[float, Field(ge=-1e6, le=1e6)] = "mean"
    sphere: tuple[_Metres, _Metres, _Metres, Annotated[float, Field(ge=0.01, le=1)]] = Field(
        (0.0, 0.0, 0.0, HEAD_RADIUS), description="x, y, z and radius of the head in metres"
    )
    resolution: int = Field(32, ge=4, le=512)


@dataclass(frozen=True)
class TopomapOperator:
    """The linear map from channel values to an image.

    matrix     float64 [H*W, channels]; rows of pixels that cannot be interpolated are 0
    offset     float64 [H*W], the part of a fixed border value; 0 with border "mean"
    mask       bool [H, W]: inside the head (``local``: inside the extended hull of the sensors) and interpolated
    positions  float64 [channels, 2], metres, x to the right and y to the front
    """

    matrix: np.ndarray
    offset: np.ndarray
    mask: np.ndarray
    positions: np.ndarray

    def render(self, values: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Images float32 [..., H, W] of values [..., channels]; 0 outside the mask, row 0 at the back of the head.

        ``out``, where given, is a contiguous float32 array of that shape to write into.
        """
        import torch

        values = np.asarray(values)
        if values.ndim < 1 or values.shape[-1] != self.matrix.shape[1]:
            raise ValueError(f"values: must be [..., {self.matrix.shape[1]}] channels, has shape {values.shape}")
        shape = (*values.shape[:-1], *self.mask.shape)
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise ValueError(f"out: must be contiguous float32 {shape}, is {out.dtype} {out.shape}")
        flat = torch.from_numpy(np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1]))
        matrix, offset = self._float32
        torch.addmm(offset, flat, matrix, out=torch.from_numpy(out).view(-1, self.mask.size))
        return out

    def render_unit(self, values: np.ndarray, out: np.ndarray) -> None:
        """Images of values [n, bands, channels] into ``out`` float32 [n, bands, H, W]: each band to [0, 1] inside the
        mask, by the extremes that it has there in all n; 0 outside.

        Images are made twice, a few at a time: for the extremes, and to be scaled while they are in the cache.
        """
        import torch

        inside = torch.from_numpy(self.mask.ravel())
        few = max(1, _CHUNK_PIXELS // (values.shape[1] * self.mask.size))
        chunks = [slice(start, start + few) for start in range(0, len(values), few)]
        low, high = torch.full((2, values.shape[1]), torch.inf)
        for chunk in chunks:
            images = torch.from_numpy(self.render(values[chunk])).flatten(2)
            low = torch.minimum(low, images.amin(dim=0)[:, inside].amin(dim=1))
            high = torch.minimum(high, -images.amax(dim=0)[:, inside].amax(dim=1))
        low, span = low[:, None], (-high - low)[:, None]
        if not (span > 0).all():
            raise UserError(f"{int((span <= 0).sum())} bands of a subject are the same all over: nothing to draw")
        for chunk in chunks:
            images = torch.from_numpy(self.render(values[chunk], out=out[chunk])).flatten(2)
            images.sub_(low).div_(span).clamp_(0, 1).mul_(inside)

    @cached_property
    def _float32(self):
        """matrix transposed [channels, H*W] and offset [H*W], both 0 outside the mask, as float32 tensors."""
        import torch

        inside = self.mask.ravel()
        matrix = np.ascontiguousarray((self.matrix * inside[:, None]).T, np.float32)
        return torch.from_numpy(matrix), torch.from_numpy((self.offset * inside).astype(np.float32))


def make_operator(
    channels: Sequence[str], config: TopomapConfig | None = None, positions: np.ndarray | None = None
) -> TopomapOperator:
    """The operator of a montage's channels (found by name, in any case), or of channels at ``positions`` [channels, 3].

    Raises UserError for channels that the montage lacks, fewer than four, or ones that lie on one line.
    """
    config = config or TopomapConfig()
    if positions is None:
        positions = channel_positions(channels, config.montage)
    return operator_from_positions(project(positions, config.sphere), config, channels)


def project(positions: np.ndarray, sphere: Sequence[float] = (0.0, 0.0, 0.0, HEAD_RADIUS)) -> np.ndarray:
    """Flatten positions [channels, 3] about the sphere's centre by the azimuthal equidistant projection: [channels, 2].

    An electrode's distance from the vertex on paper is its distance from the centre times its polar angle / 90 degrees.
    """
    centred = np.asarray(positions, np.float64) - np.asarray(sphere[:3])
    distance = np.linalg.norm(centred, axis=1)
    x, y, z = centred.T
    polar = np.arccos(np.clip(np.divide(z, distance, out=np.ones_like(z), where=distance > 0), -1, 1))
    azimuth = np.arctan2(y, x)
    # The products in MNE's order: symmetric montages have sensors on a common circle, and there the last bit decides
    # which of several valid triangulations comes out.
    flat = np.column_stack([polar * np.cos(azimuth), polar * np.sin(azimuth)])
    return flat * (distance[:, None] / (np.pi / 2.0)) + np.asarray(sphere[:2])


def operator_from_positions(
    positions: np.ndarray, config: TopomapConfig, names: Sequence[str] | None = None
) -> TopomapOperator:
    """The operator of sensors at flat positions [channels, 2] (metres); ``names``, where known, are for messages."""
    positions = np.ascontiguousarray(positions, np.float64)
    n = len(positions)
    spread = np.linalg.svd(positions - positions.mean(axis=0), compute_uv=False) if n else np.zeros(2)
    if n < 4 or spread[-1] < 0.02 * spread[0]:
        where = f"{n} channels" if n < 4 else f"{n} channels on one line"
        raise UserError(f"{where} cannot be interpolated to a map: it takes at least 4 that span a plane")
    first, second = np.triu_indices(n, 1)
    same = np.flatnonzero(np.linalg.norm(positions[first] - positions[second], axis=-1) < 1e-6)
    if same.size:
        one, other = ((range(n) if names is None else names)[index[same[0]]] for index in (first, second))
        raise UserError(
            f"channels {one} and {other} have the same position on the map; leave one out (exclude_channels)"
        )

    x0, y0, _, radius = config.sphere
    # The picture reaches a little past the outermost sensor and, as in MNE, over two circles: the clipping one about 0
    # and the head's outline, which is scaled together with its centre.
    clip_radius = max(radius, 1.01 * np.linalg.norm(positions, axis=1).max())
    x0, y0 = x0 * clip_radius / radius, y0 * clip_radius / radius
    xi = np.linspace(min(x0, 0) - clip_radius, max(x0, 0) + clip_radius, config.resolution)
    yi = np.linspace(min(y0, 0) - clip_radius, max(y0, 0) + clip_radius, config.resolution)
    grid = np.stack(np.meshgrid(xi, yi), axis=-1)

    extra, outline, triangles = _surround(positions, config.extrapolate, clip_radius)
    weights, extra_offset = _border_weights(triangles, n, len(extra), config.border)
    vertex_values = np.vstack([np.hstack([np.eye(n), np.zeros((n, 1))]), np.hstack([weights, extra_offset[:, None]])])
    pixels = _interpolate(triangles, vertex_values, grid.reshape(-1, 2), config.method)
    known = np.isfinite(pixels).all(axis=1)
    pixels[~known] = 0.0
    inside = (grid**2).sum(axis=-1) <= clip_radius**2 if outline is None else _inside(outline, grid)
    return TopomapOperator(pixels[:, :n], pixels[:, n], inside & known.reshape(inside.shape), positions)


def _surround(positions: np.ndarray, extrapolate: str, clip_radius: float):
    """Extra points around the sensors, the outline of the area drawn (None: the head's circle), the triangulation.

    The triangulation is built in MNE's order (sensors first, extra points added): where sensors lie on a common circle
    several triangulations are valid, and the order decides which one comes out.
    """
    from scipy.spatial import Delaunay

    if extrapolate == "box":
        low, high = positions.min(axis=0), positions.max(axis=0)
        corners = np.array([low - (high - low), high + (high - low)])
        extra = np.array([[corners[i, 0], corners[j, 1]] for i in (0, 1) for j in (0, 1)])
        return extra, None, Delaunay(np.concatenate([positions, extra]))

    triangles = Delaunay(positions, incremental=True)
    # Two of each triangle's three edges are measured, as MNE does: the spacing sets where the extra points lie.
    first, second, third = positions[triangles.simplices].transpose(1, 0, 2)
    spacing = np.median(np.linalg.norm(np.concatenate([first - second, second - third]), axis=1))
    if extrapolate == "head":
        angle = np.arcsin(min(spacing / clip_radius, 1.0))
        count = max(12, int(np.round(2 * np.pi / angle)))
        around = np.linspace(0, 2 * np.pi, count, endpoint=False)
        extra = (1.1 * clip_radius + spacing) * np.column_stack([np.cos(around), np.sin(around)])
        outline = None
    else:
        extra, outline = _extended_hull(positions, triangles.convex_hull, spacing)
    triangles.add_points(extra)
    return extra, outline, triangles


def _extended_hull(positions: np.ndarray, hull: np.ndarray, spacing: float):
    """Points one spacing outside the convex hull (with more along its long edges), and the outline half as far out."""
    ends = positions[hull]  # [edges, 2 ends, 2]
    outward = ends - positions.mean(axis=0)
    outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
    pushed = ends + spacing * outward
    edge = ends[:, 1] - ends[:, 0]
    pieces = np.round(0.25 * np.linalg.norm(edge, axis=-1) / spacing).astype(int)
    between = [pushed[i, :1] + edge[i] * np.arange(1, k)[:, None] / k for i, k in enumerate(pieces) if k > 1]
    extra = np.concatenate([np.unique(pushed.reshape(-1, 2), axis=0), *between])
    outline = np.unique((ends + 0.5 * spacing * outward).reshape(-1, 2), axis=0)
    centred = outline - outline.mean(axis=0)
    return extra, outline[np.argsort(np.arctan2(centred[:, 1], centred[:, 0]))]


def _border_weights(triangles, sensors: int, extra: int, border: str | float) -> tuple[np.ndarray, np.ndarray]:
    """Values of the extra points as weights [extra, sensors] on the sensors, and their constant part [extra]."""
    if border != "mean":
        return np.zeros((extra, sensors)), np.full(extra, float(border))
    weights = np.zeros((extra, sensors))
    start, neighbours = triangles.vertex_neighbor_vertices
    for i in range(extra):
        near = neighbours[start[sensors + i] : start[sensors + i + 1]]
        near = near[near < sensors]
        if len(near):
            weights[i, near] = 1 / len(near)
    touched = weights.any(axis=1)
    if touched.any():
        weights[~touched] = weights[touched].mean(axis=0)
    return weights, np.zeros(extra)


def _interpolate(triangles, values: np.ndarray, points: np.ndarray, method: str) -> np.ndarray:
    """Values [vertices, k] interpolated at points [P, 2]: [P, k], NaN outside the triangulation."""
    from scipy.interpolate import CloughTocher2DInterpolator, LinearNDInterpolator

    if method == "linear":
        return LinearNDInterpolator(triangles, values)(points)
    # Far tighter than the default 1e-6: the operator must be linear to rounding.
    return CloughTocher2DInterpolator(triangles, values, tol=1e-13, maxiter=10_000)(points)


def _inside(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Which points [..., 2] lie inside a polygon [corners, 2]: a ray to the right crosses an odd number of edges."""
    x, y = points[..., None, 0], points[..., None, 1]
    (x1, y1), (x2, y2) = polygon.T, np.roll(polygon, -1, axis=0).T
    straddles = (y1 > y) != (y2 > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = x1 + (y - y1) * (x2 - x1) / (y2 - y1)
    return (straddles & (x < crossing)).sum(axis=-1) % 2 == 1
