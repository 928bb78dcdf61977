"""From a file of topomaps to the teacher's input and back: standardisation, context, prediction in batches."""

from typing import Any

import numpy as np
import torch

from ngd_fast.config import build_config
from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.errors import UserError
from ngd_fast.teacher.config import InputConfig
from ngd_fast.teacher.network import Teacher


def prepare_inputs(maps: Topomaps, config: InputConfig) -> np.ndarray:
    """The maps as the teacher takes them, float32 [N, bands, R, R], same row order. Labels are not looked at."""
    height, width = maps.maps.shape[2:]
    if not len(maps):
        raise UserError("the file of topomaps holds no window")
    if height != width or height < 8 or height % 8:
        raise UserError(f"maps are {height}x{width}; the teacher takes square maps whose side is a multiple of 8")
    images = _average_neighbours(maps, config.context) if config.context else maps.maps.copy()
    if config.standardize == "subject":
        for subject in np.unique(maps.subject):
            rows = np.flatnonzero(maps.subject == subject)
            values = images[rows].astype(np.float64)
            values -= values.mean(axis=0)
            deviation = values.std(axis=0)
            # A pixel that never varies (outside the head) carries nothing: 0, and not rounding dust blown up.
            values *= np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0)
            images[rows] = values
    return images


def standardize_power(maps: Topomaps, config: InputConfig) -> np.ndarray:
    """Band power as features of the baselines, float64 [N, channels * bands], standardised as the maps are."""
    power = maps.power.reshape(len(maps), -1).astype(np.float64)
    if config.standardize == "subject":
        for subject in np.unique(maps.subject):
            rows = maps.subject == subject
            deviation = power[rows].std(axis=0)
            power[rows] = (power[rows] - power[rows].mean(axis=0)) / np.where(deviation > 1e-9, deviation, 1)
    return power


def _average_neighbours(maps: Topomaps, context: int) -> np.ndarray:
    """Mean of each window's map and up to ``context`` windows on either side of it in the same trial."""
    images = np.empty_like(maps.maps)
    trials = np.stack([maps.subject, maps.trial], axis=1)
    order = np.lexsort((maps.window, maps.trial, maps.subject))
    starts = np.flatnonzero(np.any(np.diff(trials[order], axis=0), axis=1)) + 1
    for rows in np.split(order, starts):
        sums = np.cumsum(maps.maps[rows], axis=0, dtype=np.float64)
        sums = np.concatenate([np.zeros_like(sums[:1]), sums])
        low = np.maximum(np.arange(len(rows)) - context, 0)
        high = np.minimum(np.arange(len(rows)) + context + 1, len(rows))
        images[rows] = (sums[high] - sums[low]) / (high - low)[:, None, None, None]
    return images


@torch.inference_mode()
def predict(
    teacher: Teacher, inputs: np.ndarray, *, device: str | torch.device = "cpu", batch_size: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """va float32 [N, 2] and features float32 [N, 256] for prepared inputs, in eval mode."""
    was_training = teacher.training
    teacher.eval()
    va, features = [], []
    for start in range(0, len(inputs), batch_size):
        outputs = teacher(torch.from_numpy(inputs[start : start + batch_size]).to(device))
        va.append(outputs[0].float().cpu().numpy())
        features.append(outputs[1].float().cpu().numpy())
    teacher.train(was_training)
    return np.concatenate(va), np.concatenate(features)


def embed(
    teacher: Teacher, meta: dict[str, Any], maps: Topomaps, *, device: str | torch.device = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`predict` on a file of topomaps, prepared as the teacher's metadata says.

    Raises UserError where the maps' bands or size are not those that the teacher was trained on.
    """
    check_same_kind(maps, teacher.resolution, meta["band_names"], "the teacher was trained on")
    config = build_config(InputConfig, meta["input"], source="the teacher's metadata")
    return predict(teacher, prepare_inputs(maps, config), device=device)


def check_same_kind(maps: Topomaps, resolution: int, bands: list[str], whose: str) -> None:
    if list(maps.bands) != list(bands) or maps.maps.shape[2:] != (resolution, resolution):
        raise UserError(
            f"maps are {maps.maps.shape[2]}x{maps.maps.shape[3]} of {', '.join(maps.bands)};"
            f" {whose} {resolution}x{resolution} of {', '.join(bands)}"
        )
