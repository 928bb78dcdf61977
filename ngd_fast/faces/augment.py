"""The views of a face that a feed shows: geometry, light, erasing, as a function of (seed, epoch, sample).

Random numbers are counter-based: draw j of sample i in epoch e is a hash of (seed, e, i, j). No feed keeps a state, so
any run can be repeated and resumed at any step, and every feed shows the same views. ``kernels/augment.py`` computes
the same numbers on the device; the two must be changed together (tests compare them).
"""

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from ngd_fast.config import Config

# Draws of one sample, by position.
AREA, SHIFT_X, SHIFT_Y, FLIP, BRIGHTNESS, CONTRAST, ROTATION, SHEAR = range(8)
ERASE, ERASE_WIDTH, ERASE_HEIGHT, ERASE_X, ERASE_Y, LABEL = range(8, 14)
NOISE, NOISE_CLASS = 14, 15  # of label_noise.py, in epoch 0 alone

PARAMETERS = 12
"""Columns of :func:`view_parameters`: six of the matrix, gain, bias, and the erased box (left, top, right, bottom)."""


class AugmentConfig(Config):
    """What is varied in training. The defaults are the paper's: resize, crop, flip, mild jitter."""

    crop_scale: tuple[float, float] = (0.8, 1.0)
    """Area of the square window over the image's area, uniform; above 1 the window reaches over the border, which is
    repeated outwards."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a left-right flip."""
    brightness: float = Field(0.1, ge=0, lt=1)
    """Grey values are multiplied by a factor uniform in 1 +- brightness."""
    contrast: float = Field(0.1, ge=0, lt=1)
    """Distances from mid-grey are multiplied by a factor uniform in 1 +- contrast."""
    rotation: float = Field(0.0, ge=0, le=3.2)
    """Largest angle in radians, either way."""
    shear: float = Field(0.0, ge=0, le=1)
    """Largest shear (shift in x for one unit of y), either way."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability that a box is replaced by the mean."""
    erase_side: tuple[float, float] = (0.15, 0.5)
    """Width and height of that box over the image's side, drawn independently."""

    @model_validator(mode="after")
    def _ranges(self):
        for name, top in (("crop_scale", 4.0), ("erase_side", 1.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ValueError(f"{name} must be 0 < low <= high <= {top:g}, is ({low:g}, {high:g})")
        return self

    @classmethod
    def off(cls) -> "AugmentConfig":
        """The whole image as it is."""
        return cls(crop_scale=(1.0, 1.0), flip=0.0, brightness=0.0, contrast=0.0)

    @classmethod
    def strong(cls) -> "AugmentConfig":
        """For long trainings at a high learning rate: rotation, shear, wide zoom, stronger jitter, erasing."""
        return cls(crop_scale=(0.49, 1.1), brightness=0.3, contrast=0.3, rotation=0.3, shear=0.1, erase=0.25)


def seed_key(seed: int) -> int:
    """A seed of up to 64 bits -> the 32-bit key that the kernels take."""
    seed = int(seed) & 0xFFFFFFFFFFFFFFFF
    halves = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)
    with np.errstate(over="ignore"):
        return int(_mix(halves[:1] ^ _mix(halves[1:] + np.uint32(0x9E3779B9)))[0])


def _mix(x: np.ndarray) -> np.ndarray:
    """A 32-bit finaliser (xor-shift-multiply, bias 0.17 bits): every input bit changes every output bit."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x21F0AAAD)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0xD35A2D97)
    return x ^ (x >> np.uint32(15))


def random_bits(key: int, epoch: int, index: np.ndarray, draw: int | np.ndarray) -> np.ndarray:
    """uint32 [B]: draw number ``draw`` of the samples ``index`` in ``epoch``; [D, B] for draws [D, 1]."""
    with np.errstate(over="ignore"):
        epoch_word = np.array([epoch & 0xFFFFFFFF], np.uint32) * np.uint32(0x9E3779B9) + np.uint32(0x85EBCA6B)
        base = _mix(np.uint32(key) ^ _mix(epoch_word))
        sample = _mix(base ^ _mix(np.asarray(index).astype(np.uint32) * np.uint32(0xC2B2AE35) + np.uint32(0x27D4EB2F)))
        return _mix(sample + np.asarray(draw, np.uint32) * np.uint32(0x9E3779B9))


def uniform(key: int, epoch: int, index: np.ndarray, draw: int | np.ndarray) -> np.ndarray:
    """float32 in [0, 1), multiples of 2^-24, shaped as :func:`random_bits`."""
    return _to_unit(random_bits(key, epoch, index, draw))


def _to_unit(bits: np.ndarray) -> np.ndarray:
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def view_parameters(
    config: AugmentConfig, key: int, epoch: int, index: np.ndarray, source: tuple[int, int], size: int
) -> np.ndarray:
    """float32 [B, 12]: how output pixel (i, j) of size x size is made from a source of (height, width) pixels.

    Columns 0-5: source x = p0*j + p1*i + p2, source y = p3*j + p4*i + p5 (pixel centres at whole numbers);
    6, 7: value = clip(p6*value + p7, 0, 1); 8-11: box [left, right) x [top, bottom) of output pixels set to the mean.
    """
    f = np.float32
    u = uniform(key, epoch, index, np.arange(ERASE)[:, None])
    between = lambda low, high, t: f(low) + t * f(high - low)  # noqa: E731
    side = np.sqrt(between(*config.crop_scale, u[AREA]))
    center_x = u[SHIFT_X] * (f(1) - side) + f(0.5) * side
    center_y = u[SHIFT_Y] * (f(1) - side) + f(0.5) * side
    sign = np.where(u[FLIP] < f(config.flip), f(-1), f(1))
    angle = between(-config.rotation, config.rotation, u[ROTATION])
    shear = between(-config.shear, config.shear, u[SHEAR])
    cos, sin = np.cos(angle), np.sin(angle)
    height, width = source
    half = f(0.5 / size - 0.5)
    p = np.empty((len(u[0]), PARAMETERS), np.float32)
    rows = ((width, center_x, sign * cos, shear * cos - sin), (height, center_y, sign * sin, shear * sin + cos))
    for column, (extent, center, along_j, along_i) in zip((0, 3), rows):
        p[:, column] = f(extent / size) * side * along_j
        p[:, column + 1] = f(extent / size) * side * along_i
        p[:, column + 2] = f(extent) * (center + side * (along_j + along_i) * half) - f(0.5)
    gain = between(1 - config.brightness, 1 + config.brightness, u[BRIGHTNESS])
    contrast = between(1 - config.contrast, 1 + config.contrast, u[CONTRAST])
    p[:, 6] = gain * contrast
    p[:, 7] = gain * f(0.5) * (f(1) - contrast)
    p[:, 8:] = _erased_boxes(config, key, epoch, index, size)
    return p


def erase_limits(config: AugmentConfig, size: int) -> tuple[int, int]:
    """Least and greatest side of the erased box in output pixels."""
    return tuple(min(size, max(1, round(side * size))) for side in config.erase_side)


def _erased_boxes(config: AugmentConfig, key: int, epoch: int, index: np.ndarray, size: int) -> np.ndarray:
    # Integers throughout: an edge that rounds differently on another device would be a visible difference.
    if not config.erase:
        return np.zeros((len(index), 4), np.int64)
    low, high = erase_limits(config, size)
    bits = random_bits(key, epoch, index, np.arange(ERASE, LABEL)[:, None])
    below = lambda draw, count: (bits[draw - ERASE] >> np.uint32(16)).astype(np.int64) * count >> 16  # noqa: E731
    erased = _to_unit(bits[0]) < np.float32(config.erase)
    width, height = (low + below(draw, high - low + 1) for draw in (ERASE_WIDTH, ERASE_HEIGHT))
    left, top = below(ERASE_X, size - width + 1), below(ERASE_Y, size - height + 1)
    return np.where(erased[:, None], np.stack([left, top, left + width, top + height], axis=1), 0)


def drawn_labels(key: int, epoch: int, index: np.ndarray, label_dist: np.ndarray) -> np.ndarray:
    """float32 [B, C] one-hot: one label drawn from each row of ``label_dist`` (FER+'s "probability" training)."""
    cumulative = np.cumsum(label_dist, axis=1, dtype=np.float32)
    target = uniform(key, epoch, index, LABEL)[:, None] * cumulative[:, -1:]
    choice = np.minimum((cumulative <= target).sum(axis=1), label_dist.shape[1] - 1)
    # Rounding must not give a label that nobody voted for; unlabelled rows stay 0.
    choice = np.where(np.take_along_axis(label_dist, choice[:, None], 1)[:, 0] > 0, choice, label_dist.argmax(axis=1))
    return np.eye(label_dist.shape[1], dtype=np.float32)[choice] * (cumulative[:, -1:] > 0)


def render(
    source: torch.Tensor,
    parameters: torch.Tensor | None,
    size: int,
    *,
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    channels: int = 3,
) -> torch.Tensor:
    """uint8 [B, H, W, 1 or 3] -> views [B, channels, size, size], channels-last, normalised: the kernel's twin.

    ``parameters`` [B, 12] as from :func:`view_parameters`; None shows the whole image. Sampling is bilinear, borders
    are repeated outwards. mean and std are float32 [channels], on a scale of grey values from 0 to 1.
    """
    batch, height, width, _ = source.shape
    values = source.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255
    if parameters is None:
        if (height, width) != (size, size):
            values = F.interpolate(values, (size, size), mode="bilinear", align_corners=False)
    else:
        p = parameters
        # grid_sample's coordinates run from -1 to 1 over the outer edges of the border pixels.
        scale = torch.tensor([2 / width, 2 / height], device=p.device)
        pixels = torch.arange(size, device=p.device, dtype=torch.float32)
        matrix = p[:, :6].view(batch, 2, 3) * scale[:, None]
        offset = matrix[:, :, 2] + 0.5 * scale - 1
        grid = (
            matrix[:, None, None, :, 0] * pixels[None, None, :, None]
            + matrix[:, None, None, :, 1] * pixels[None, :, None, None]
            + offset[:, None, None, :]
        )
        values = F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)
        values = (values * p[:, 6].view(-1, 1, 1, 1) + p[:, 7].view(-1, 1, 1, 1)).clamp_(0, 1)
    values = (values - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    if parameters is not None:
        box = parameters[:, 8:].view(batch, 4, 1)
        in_x = (pixels >= box[:, 0]) & (pixels < box[:, 2])
        in_y = (pixels >= box[:, 1]) & (pixels < box[:, 3])
        values = values.masked_fill((in_y[:, :, None] & in_x[:, None, :])[:, None], 0.0)
    return values.expand(-1, channels, -1, -1).to(dtype).contiguous(memory_format=torch.channels_last)
