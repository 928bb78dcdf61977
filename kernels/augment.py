"""A whole training batch in one Triton kernel: gather, crop, rotate, resize, flip, jitter, erase, normalise, targets.

The views are those of ``ngd_fast.faces.augment`` (the same hashes, the same formulas): change both together. Which
batch it is comes from device memory, so that a captured CUDA graph shows the next batch at every replay.
"""

import torch
import triton
import triton.language as tl

from ngd_fast.faces.augment import AugmentConfig, erase_limits

BLOCK = 512
"""Output pixels of one program: few enough that 128 images of 48 px fill a large GPU, enough to pay for the hashes."""


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _bits(sample, draw: tl.constexpr):
    return _mix(sample + ((draw * 0x9E3779B9) & 0xFFFFFFFF))


@triton.jit
def _uniform(sample, draw: tl.constexpr):
    # 24 bits: exact in float32.
    return (_bits(sample, draw) >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _below(sample, draw: tl.constexpr, count):
    return (((_bits(sample, draw) >> 16).to(tl.int64) * count) >> 16).to(tl.int32)


@triton.jit
def _cos_sin(angle):
    # For angles up to half a turn. tl.cos and tl.sin serve any angle, through a table in slow local memory.
    quarter = angle * 0.25
    square = quarter * quarter
    sin = quarter * (1 - square * (1 / 6 - square * (1 / 120 - square * (1 / 5040 - square * (1 / 362880)))))
    cos = 1 - square * (1 / 2 - square * (1 / 24 - square * (1 / 720 - square * (1 / 40320))))
    for _ in tl.static_range(2):
        sin, cos = 2 * sin * cos, 1 - 2 * sin * sin
    return cos, sin


@triton.jit
def _load(pixels, base, y, x, width: tl.constexpr, channels: tl.constexpr, channel: tl.constexpr, mask):
    return tl.load(pixels + base + (y * width + x) * channels + channel, mask=mask, other=0).to(tl.float32)


@triton.jit
def _sample(pixels, base, x0, y0, x1, y1, wx, wy, width: tl.constexpr, channels: tl.constexpr, c: tl.constexpr, mask):
    top = _load(pixels, base, y0, x0, width, channels, c, mask) * (1 - wx)
    top += _load(pixels, base, y0, x1, width, channels, c, mask) * wx
    bottom = _load(pixels, base, y1, x0, width, channels, c, mask) * (1 - wx)
    bottom += _load(pixels, base, y1, x1, width, channels, c, mask) * wx
    return (top * (1 - wy) + bottom * wy) * (1.0 / 255.0)


@triton.jit
def _finish(value, gain, bias, erased, mean, std):
    value = tl.minimum(tl.maximum(value * gain + bias, 0.0), 1.0)
    return tl.where(erased, 0.0, (value - mean) / std)


@triton.jit(do_not_specialize=("key", "batch_size", "erase_low", "erase_high"))
def views_kernel(
    pixels,  # uint8 [N, HEIGHT, WIDTH, CHANNELS]
    label_dist,  # float32 [N, CLASSES]
    labels,  # int64 [N]
    order,  # int64: rows of this epoch, a multiple of the batch
    clock,  # int64 [2]: epoch, step
    images,  # [B, SIZE, SIZE, OUT]
    out_dist,  # float32 [B, CLASSES]
    out_labels,  # int64 [B]
    out_index,  # int64 [B]
    batch_size,
    key,
    area_low,
    area_span,
    flip,
    brightness,
    contrast,
    rotation,
    shear,
    erase,
    erase_low,
    erase_high,
    mean0,
    mean1,
    mean2,
    std0,
    std1,
    std2,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    OUT: tl.constexpr,
    CLASSES: tl.constexpr,
    CLASSES_PADDED: tl.constexpr,
    AUGMENT: tl.constexpr,
    DRAW_LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample_in_batch = tl.program_id(1)
    epoch = tl.load(clock)
    step = tl.load(clock + 1)
    row = tl.load(order + step * batch_size + sample_in_batch)

    # The sample's own stream of hashes, then the draws in the order of ngd_fast.faces.augment.
    epoch_word = epoch.to(tl.uint32) * 0x9E3779B9 + 0x85EBCA6B
    base = _mix(key.to(tl.uint32) ^ _mix(epoch_word))
    sample = _mix(base ^ _mix(row.to(tl.uint32) * 0xC2B2AE35 + 0x27D4EB2F))

    if tl.program_id(0) == 0:
        column = tl.arange(0, CLASSES_PADDED)
        inside = column < CLASSES
        dist = tl.load(label_dist + row * CLASSES + column, mask=inside, other=0.0)
        if DRAW_LABELS:
            cumulative = tl.cumsum(dist, 0)
            total = tl.sum(tl.where(column == CLASSES - 1, cumulative, 0.0), 0)
            target = _uniform(sample, 13) * total
            choice = tl.sum(((cumulative <= target) & inside).to(tl.int32), 0)
            choice = tl.minimum(choice, CLASSES - 1)
            voted = tl.sum(tl.where(column == choice, dist, 0.0), 0) > 0
            choice = tl.where(voted, choice, tl.argmax(dist, 0))
            dist = tl.where(total > 0, (column == choice).to(tl.float32), 0.0)
        tl.store(out_dist + sample_in_batch * CLASSES + column, dist, mask=inside)
        tl.store(out_labels + sample_in_batch, tl.load(labels + row))
        tl.store(out_index + sample_in_batch, row)

    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < SIZE * SIZE
    i = pixel // SIZE
    j = pixel % SIZE
    if AUGMENT:
        side = tl.sqrt(area_low + _uniform(sample, 0) * area_span)
        center_x = _uniform(sample, 1) * (1 - side) + 0.5 * side
        center_y = _uniform(sample, 2) * (1 - side) + 0.5 * side
        sign = tl.where(_uniform(sample, 3) < flip, -1.0, 1.0)
        gain = (1 - brightness) + _uniform(sample, 4) * (2 * brightness)
        spread = (1 - contrast) + _uniform(sample, 5) * (2 * contrast)
        angle = -rotation + _uniform(sample, 6) * (2 * rotation)
        slant = -shear + _uniform(sample, 7) * (2 * shear)
        cos, sin = _cos_sin(angle)
        bias = gain * 0.5 * (1 - spread)
        gain = gain * spread
        box_width = erase_low + _below(sample, 9, erase_high - erase_low + 1)
        box_height = erase_low + _below(sample, 10, erase_high - erase_low + 1)
        left = _below(sample, 11, SIZE - box_width + 1)
        top = _below(sample, 12, SIZE - box_height + 1)
        box_width = tl.where(_uniform(sample, 8) < erase, box_width, 0)
        erased = (j >= left) & (j < left + box_width) & (i >= top) & (i < top + box_height)
        u = (j.to(tl.float32) + 0.5) / SIZE - 0.5
        v = (i.to(tl.float32) + 0.5) / SIZE - 0.5
        x = WIDTH * (center_x + side * (sign * cos * u + (slant * cos - sin) * v)) - 0.5
        y = HEIGHT * (center_y + side * (sign * sin * u + (slant * sin + cos) * v)) - 0.5
    else:
        gain = 1.0
        bias = 0.0
        erased = pixel < 0
        x = (j.to(tl.float32) + 0.5) * (WIDTH / SIZE) - 0.5
        y = (i.to(tl.float32) + 0.5) * (HEIGHT / SIZE) - 0.5

    # Borders are repeated outwards.
    x = tl.minimum(tl.maximum(x, 0.0), WIDTH - 1.0)
    y = tl.minimum(tl.maximum(y, 0.0), HEIGHT - 1.0)
    x0 = x.to(tl.int32)
    y0 = y.to(tl.int32)
    x1 = tl.minimum(x0 + 1, WIDTH - 1)
    y1 = tl.minimum(y0 + 1, HEIGHT - 1)
    wx = x - x0.to(tl.float32)
    wy = y - y0.to(tl.float32)
    source = row * (HEIGHT * WIDTH * CHANNELS)
    out = images + (sample_in_batch.to(tl.int64) * (SIZE * SIZE) + pixel) * OUT
    kind = images.dtype.element_ty
    value = _sample(pixels, source, x0, y0, x1, y1, wx, wy, WIDTH, CHANNELS, 0, mask)
    tl.store(out, _finish(value, gain, bias, erased, mean0, std0).to(kind), mask=mask)
    if OUT == 3:
        # A grey source has three equal channels.
        if CHANNELS == 3:
            value = _sample(pixels, source, x0, y0, x1, y1, wx, wy, WIDTH, CHANNELS, 1, mask)
        tl.store(out + 1, _finish(value, gain, bias, erased, mean1, std1).to(kind), mask=mask)
        if CHANNELS == 3:
            value = _sample(pixels, source, x0, y0, x1, y1, wx, wy, WIDTH, CHANNELS, 2, mask)
        tl.store(out + 2, _finish(value, gain, bias, erased, mean2, std2).to(kind), mask=mask)


def launch_arguments(config: AugmentConfig | None, size: int, mean, std) -> list[float]:
    """The kernel's numbers from ``area_low`` to ``std2``. One channel's mean and std stand for all three."""
    config = AugmentConfig.off() if config is None else config
    low, high = erase_limits(config, size)
    area_low, area_high = config.crop_scale
    mean, std = (tuple(value) * 3 if len(value) == 1 else tuple(value) for value in (mean, std))
    numbers = [area_low, area_high - area_low, config.flip, config.brightness, config.contrast, config.rotation]
    return [*map(float, (*numbers, config.shear, config.erase)), low, high, *mean, *std]


def write_views(
    pixels: torch.Tensor,
    label_dist: torch.Tensor,
    labels: torch.Tensor,
    order: torch.Tensor,
    clock: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    key: int,
    config: AugmentConfig | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    draw_labels: bool = False,
) -> None:
    """Write one batch into ``out`` = (images, target_dist, labels, index); nothing is allocated, nothing synchronised.

    pixels [N, H, W, 1 or 3] uint8, label_dist [N, C] float32, labels [N] int64, order int64, clock [2] int64 = (epoch,
    step): rows order[step * batch_size + b] for the b of ``out``. images [b, 1 or 3, S, S] channels-last. ``config``
    None shows whole images. All tensors contiguous (images: in channels-last order) on one device.
    """
    images, out_dist, out_labels, out_index = out
    count, channels, size, _ = images.shape
    _, height, width, source_channels = pixels.shape
    classes = label_dist.shape[1]
    grid = (triton.cdiv(size * size, BLOCK), count)
    views_kernel[grid](
        pixels,
        label_dist,
        labels,
        order,
        clock,
        images,
        out_dist,
        out_labels,
        out_index,
        batch_size,
        key,
        *launch_arguments(config, size, mean, std),
        HEIGHT=height,
        WIDTH=width,
        CHANNELS=source_channels,
        SIZE=size,
        OUT=channels,
        CLASSES=classes,
        CLASSES_PADDED=triton.next_power_of_2(classes),
        AUGMENT=config is not None,
        DRAW_LABELS=draw_labels,
        BLOCK=BLOCK,
        num_warps=4,
    )
