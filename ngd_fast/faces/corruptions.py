"""What can be wrong with a face's photograph, at five severities, as ImageNet-C has it (Hendrycks & Dietterich, 2019).

Blur, noise, JPEG, brightness, contrast and pixels have that benchmark's values, for which 224 pixels are the whole
side; occlusion and rotation are ours. Noise is counter-based, a hash of (seed, severity, face, pixel): the same on
every device and for every batch size.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

SEVERITIES = (1, 2, 3, 4, 5)
MID_GREY = 0.5

# Rows and columns as shares of an upright, cropped face: what a hand, a mask or sunglasses hide. The share of the box
# that is hidden grows with the severity.
_EYES = (0.25, 0.55, 0.1, 0.9)
_MOUTH = (0.6, 0.95, 0.2, 0.8)
_HIDDEN = (0.2, 0.4, 0.6, 0.8, 1.0)


def gaussian_blur(images: torch.Tensor, level: int, **_) -> torch.Tensor:
    sigma = (1, 2, 3, 4, 6)[level] * images.shape[-1] / 224
    reach = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum()).expand(images.shape[1], 1, 1, -1)
    reach = min(reach, images.shape[-1] - 1)  # reflection reaches no further than the image
    weights = weights[..., weights.shape[-1] // 2 - reach : weights.shape[-1] // 2 + reach + 1]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    channels = images.shape[1]
    images = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="reflect"), weights, groups=channels)
    return F.conv2d(F.pad(images, (0, 0, reach, reach), mode="reflect"), weights.transpose(2, 3), groups=channels)


def gaussian_noise(images: torch.Tensor, level: int, *, seed: int, rows: torch.Tensor, grey: bool) -> torch.Tensor:
    strength = (0.08, 0.12, 0.18, 0.26, 0.38)[level]
    channels = 1 if grey else images.shape[1]
    noise = _normal(seed * 8 + level, rows, channels * images.shape[2] * images.shape[3])
    return images + strength * noise.view(len(images), channels, *images.shape[2:])


def jpeg(images: torch.Tensor, level: int, **_) -> torch.Tensor:
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image

    quality = (25, 18, 15, 10, 7)[level]

    def recode(pixels: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    with ThreadPoolExecutor() as pool:
        made = np.stack(list(pool.map(recode, pixels)))
    return torch.from_numpy(made).permute(0, 3, 1, 2).to(images.device, images.dtype) / 255


def brightness(images: torch.Tensor, level: int, **_) -> torch.Tensor:
    """Adds to the value of HSV, which is the largest channel, and keeps hue and saturation."""
    value = images.amax(dim=1, keepdim=True)
    brighter = (value + (0.1, 0.2, 0.3, 0.4, 0.5)[level]).clamp(max=1)
    return torch.where(value > 0, images * (brighter / value.clamp(min=1e-6)), brighter)


def contrast(images: torch.Tensor, level: int, **_) -> torch.Tensor:
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (images - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean


def low_resolution(images: torch.Tensor, level: int, **_) -> torch.Tensor:
    side = images.shape[-1]
    small = max(1, round(side * (0.6, 0.5, 0.4, 0.3, 0.25)[level]))
    return F.interpolate(F.interpolate(images, (small, small), mode="area"), (side, side), mode="nearest")


def occluded_eyes(images: torch.Tensor, level: int, **_) -> torch.Tensor:
    return _hide(images, _EYES, _HIDDEN[level])


def occluded_mouth(images: torch.Tensor, level: int, **_) -> torch.Tensor:
    return _hide(images, _MOUTH, _HIDDEN[level])


def rotation(images: torch.Tensor, level: int, *, rows: torch.Tensor, **_) -> torch.Tensor:
    """By 9 to 45 degrees, faces of even rows to one side and of odd rows to the other; borders are repeated."""
    angle = math.radians((9, 18, 27, 36, 45)[level])
    sign = 1 - 2 * (rows % 2).to(images.dtype)
    cos, sin = torch.full_like(sign, math.cos(angle)), sign * math.sin(angle)
    matrix = torch.stack([cos, -sin, 0 * sin, sin, cos, 0 * sin], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


CORRUPTIONS: dict[str, Callable] = {
    function.__name__: function
    for function in (
        gaussian_blur, gaussian_noise, jpeg, brightness, contrast, low_resolution, occluded_eyes, occluded_mouth,
        rotation,
    )
}  # fmt: skip


def corrupt(
    images: torch.Tensor, name: str, severity: int, *, seed: int = 0, rows: torch.Tensor, grey: bool = False
) -> torch.Tensor:
    """Images [B, 3, S, S] float32 in [0, 1] with corruption ``name`` at ``severity`` (1 to 5), in 256 steps as a file.

    rows   int64 [B]: the faces' rows in their dataset, on which noise and the side of rotation depend
    grey   the three channels are one: noise must keep them so
    Raises ValueError for an unknown name or severity.
    """
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(f"corruption {name!r}, severity {severity!r}: wanted one of {', '.join(CORRUPTIONS)}, 1 to 5")
    made = CORRUPTIONS[name](images, severity - 1, seed=seed, rows=rows, grey=grey)
    return (made.clamp(0, 1) * 255).round() / 255


def _hide(images: torch.Tensor, box: tuple[float, float, float, float], share: float) -> torch.Tensor:
    """Grey over the middle ``share`` of a box (top, bottom, left, right as shares of the side)."""
    top, bottom, left, right = box
    side = images.shape[-1]
    edges = []
    for low, high in ((top, bottom), (left, right)):
        center, half = (low + high) / 2, (high - low) / 2 * math.sqrt(share)
        edges.append(slice(round((center - half) * side), max(round((center - half) * side) + 1,
                                                              round((center + half) * side))))  # fmt: skip
    hidden = images.clone()
    hidden[:, :, edges[0], edges[1]] = MID_GREY
    return hidden


def _normal(key: int, rows: torch.Tensor, count: int) -> torch.Tensor:
    """float32 [B, count] standard normal numbers of the faces ``rows``, by hashing and Box-Muller."""
    pair = torch.arange((count + 1) // 2, device=rows.device)
    base = _mix(_mix(rows * 0xC2B2AE35 + 0x27D4EB2F) ^ _mix(torch.full_like(rows, key) * 0x9E3779B9 + 0x85EBCA6B))
    bits = [_mix(base[:, None] + (2 * pair + k)[None] * 0x9E3779B9) for k in (0, 1)]
    u, v = (((b >> 8).to(torch.float32) + 0.5) * 2.0**-24 for b in bits)
    radius, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * v
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :count]


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit finaliser of :mod:`ngd_fast.faces.augment`, on int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)
