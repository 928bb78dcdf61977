"""What changes in the course of a run: learning rate and D-Geo's weight with every step, the views' size with epochs.

A captured CUDA graph cannot take numbers from Python; it looks those of a step up in a table on the device, by its own
step counter.
"""

import math

import torch

from ngd_fast.objective.schedule import Ramp
from ngd_fast.student.config import OptimizerConfig, StudentConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Linear warm-up to ``lr`` over ``warmup_epochs``, then half a cosine that would reach ``min_lr`` at ``steps``."""
    warmup = min(steps, round(config.warmup_epochs * steps_per_epoch))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def train_image_size(config: StudentConfig, epoch: int) -> int:
    """Side in pixels of the training views in ``epoch``, counted from 0."""
    stages = config.train.resolution or ()
    return next((s.image_size for s in reversed(stages) if s.from_epoch <= epoch), config.data.image_size)


def schedule_table(config: StudentConfig, steps_per_epoch: int) -> torch.Tensor:
    """float32 [epochs * steps_per_epoch, 2]: learning rate and D-Geo's weight (its ramp at the fractional epoch)."""
    steps, geo = config.train.epochs * steps_per_epoch, config.objective.geo
    ramp = Ramp(**geo.schedule.model_dump())
    rows = [
        (
            learning_rate(config.optimizer, step, steps, steps_per_epoch),
            geo.weight * ramp(step / steps_per_epoch),
        )
        for step in range(steps)
    ]
    return torch.tensor(rows, dtype=torch.float32)
