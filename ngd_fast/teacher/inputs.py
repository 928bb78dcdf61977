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
    images = _average_neighbours(maps, maps.maps, config.context)
    if config.standardize == "subject":
        _standardize_subjects(maps, images)
    return images


def prepare_power(maps: Topomaps, config: InputConfig) -> np.ndarray:
    """Band power prepared as the maps are, for the baselines, float32 [N, channels * bands]."""
    power = _average_neighbours(maps, maps.power, config.context)
    if config.standardize == "subject":
        _standardize_subjects(maps, power)
    return power.reshape(len(maps), -1)


def _standardize_subjects(maps: Topomaps, values: np.ndarray) -> None:
    """In place: each number of a window to zero mean and unit deviation over its subject's windows."""
    for subject in np.unique(maps.subject):
        rows = np.flatnonzero(maps.subject == subject)
        own = values[rows].astype(np.float64)
        dust = max(1e-6 * np.abs(own).max(), np.finfo(np.float64).tiny)
        own -= own.mean(axis=0)
        deviation = own.std(axis=0)
        # What never varies (a pixel outside the head) carries nothing: 0, and not its rounding blown up.
        values[rows] = own * np.where(deviation > dust, 1 / np.maximum(deviation, dust), 0)


def _average_neighbours(maps: Topomaps, values: np.ndarray, context: int) -> np.ndarray:
    """Mean over each window and up to ``context`` windows on either side of it in the same trial, [N, ...]; a copy."""
    if not context:
        return values.copy()
    result = np.empty_like(values)
    trials = np.stack([maps.subject, maps.trial], axis=1)
    order = np.lexsort((maps.window, maps.trial, maps.subject))
    starts = np.flatnonzero(np.any(np.diff(trials[order], axis=0), axis=1)) + 1
    for rows in np.split(order, starts):
        sums = np.cumsum(values[rows], axis=0, dtype=np.float64)
        sums = np.concatenate([np.zeros_like(sums[:1]), sums])
        low = np.maximum(np.arange(len(rows)) - context, 0)
        high = np.minimum(np.arange(len(rows)) + context + 1, len(rows))
        size = (high - low).reshape(-1, *[1] * (values.ndim - 1))
        result[rows] = (sums[high] - sums[low]) / size
    return result


@torch.inference_mode()
def predict(
    teacher: Teacher, inputs: np.ndarray, *, device: str | torch.device = "cpu", batch_size: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """va float32 [N, 2] and features float32 [N, 256] for prepared inputs, in eval mode.

    Raises UserError where they are not finite.
    """
    was_training = teacher.training
    teacher.eval()
    va, features = [], []
    for start in range(0, len(inputs), batch_size):
        outputs = teacher(torch.from_numpy(inputs[start : start + batch_size]).to(device))
        va.append(outputs[0].float().cpu().numpy())
        features.append(outputs[1].float().cpu().numpy())
    teacher.train(was_training)
    va, features = np.concatenate(va), np.concatenate(features)
    if not (np.isfinite(va).all() and np.isfinite(features).all()):
        raise UserError("the teacher's output is NaN or infinite: its training diverged; lower optimizer.lr")
    return va, features


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
