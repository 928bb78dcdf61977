"""Training of the teacher: supervised CCC + MSE, consistency on windows without ratings, EMA weights."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ngd_fast.console import progress
from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.errors import UserError
from ngd_fast.teacher.config import AugmentConfig, TeacherConfig
from ngd_fast.teacher.inputs import check_same_kind, predict, prepare_inputs
from ngd_fast.teacher.losses import concordance, regression_loss
from ngd_fast.teacher.metrics import evaluate_va, mean_ccc
from ngd_fast.teacher.network import Teacher
from ngd_fast.teacher.splits import Split


@dataclass
class TrainingResult:
    """The chosen EMA weights in eval mode, their epoch (from 1), one log entry for each epoch that was finished."""

    teacher: Teacher
    epoch: int
    history: list[dict[str, Any]]
    interrupted: bool = False


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Bit-identical results on one device; the caller's switches and random state come back afterwards."""
    state = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        # The fused attention kernels add up gradients in any order on CUDA.
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = state


def augment(x: torch.Tensor, config: AugmentConfig, generator: torch.Generator) -> torch.Tensor:
    """Noise as smooth as a topomap is (one value a 4x4-th), a factor for each band, dropped bands; x [N, bands, R, R].

    Random numbers come from a CPU generator, so that they are the same on every device.
    """
    n, bands, size = x.shape[0], x.shape[1], x.shape[2]
    gain = 1 + config.gain * torch.randn(n, bands, 1, 1, generator=generator)
    gain *= torch.rand(n, bands, 1, 1, generator=generator) >= config.band_drop
    noise = config.noise * torch.randn(n, bands, 4, 4, generator=generator)
    noise = noise.repeat_interleave(size // 4, dim=2).repeat_interleave(size // 4, dim=3)
    return x * gain.to(x.device) + noise.to(x.device)


def train_teacher(
    maps: Topomaps,
    split: Split,
    config: TeacherConfig,
    *,
    support: Topomaps | None = None,
    device: str | torch.device = "cpu",
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    show_progress: bool = True,
) -> TrainingResult:
    """Train on ``split.train``; windows of those subjects without ratings, and all of ``support``, are unlabelled.

    ``split.test`` is never looked at, ``split.validation`` only to choose the epoch (``config.choice == "best"``).
    ``on_epoch`` receives each epoch's log entry. Ctrl-C ends training early: the result is then the best so far and
    marked; before the first finished epoch KeyboardInterrupt goes on to the caller.

    Raises UserError for maps that do not fit the split, the support or the network, and for divergence.
    """
    rows = {side: np.flatnonzero(np.isin(maps.subject, getattr(split, side))) for side in ("train", "validation")}
    labelled = rows["train"][maps.labelled[rows["train"]]]
    validation = rows["validation"][maps.labelled[rows["validation"]]]
    if len(labelled) < 8:
        raise UserError(f"split {split.name}: {len(labelled)} labelled windows to train on; at least 8 are needed")
    if config.choice == "best" and not len(validation):
        raise UserError(f"split {split.name}: no labelled validation window; use choice=last to train without them")
    if support is not None:
        check_same_kind(support, maps.maps.shape[2], list(maps.bands), "the labelled maps are")
    inputs = prepare_inputs(maps, config.input)
    target = torch.from_numpy(np.stack([maps.valence, maps.arousal], axis=1))
    unlabelled = [inputs[np.setdiff1d(rows["train"], labelled)]]
    if support is not None:
        unlabelled.append(prepare_inputs(support, config.input))

    with deterministic():
        torch.manual_seed(config.seed)
        teacher = Teacher(len(maps.bands), maps.maps.shape[2], config.network)
        train_inputs = torch.from_numpy(inputs[labelled])
        teacher.set_input_statistics(train_inputs)
        loop = _Loop(
            teacher.to(device),
            teacher.standardize(train_inputs.to(device)),
            target[labelled].to(device),
            teacher.standardize(torch.from_numpy(np.concatenate(unlabelled)).to(device)),
            config,
        )
        validation_inputs, validation_target = inputs[validation], target[validation].numpy()
        history: list[dict[str, Any]] = []
        best: tuple[float, int, Teacher] | None = None
        interrupted = False
        epochs = range(1, config.optimizer.epochs + 1)
        try:
            for epoch in progress(epochs, desc="teacher", unit="epoch") if show_progress else epochs:
                started = time.perf_counter()
                entry = {"event": "epoch", "epoch": epoch, **loop.run_epoch(epoch)}
                if len(validation):
                    va, _ = predict(loop.ema, validation_inputs, device=device)
                    metrics = evaluate_va(va, validation_target, maps.subject[validation], bootstrap=0)
                    entry["validation"] = metrics
                score = mean_ccc(metrics) if config.choice == "best" else float(epoch)
                entry["seconds"] = time.perf_counter() - started
                if best is None or score > best[0]:
                    best = (score, epoch, copy.deepcopy(loop.ema))
                history.append(entry)
                if on_epoch:
                    on_epoch(entry)
        except KeyboardInterrupt:
            if best is None:
                raise
            interrupted = True
    return TrainingResult(best[2].eval().requires_grad_(False), best[1], history, interrupted)


class _Loop:
    """One teacher, its EMA, its optimiser; data standardised and on the device."""

    def __init__(self, teacher, x: torch.Tensor, y: torch.Tensor, unlabelled: torch.Tensor, config: TeacherConfig):
        self.teacher, self.x, self.y, self.unlabelled, self.config = teacher, x, y, unlabelled, config
        self.ema = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.beta = np.random.default_rng(config.seed)
        settings = config.optimizer
        self.batch_size = min(settings.batch_size, len(x))
        self.steps = len(x) // self.batch_size  # a partial batch would weigh its CCC too much
        self.step = 0
        matrices = [p for p in teacher.parameters() if p.ndim > 1]
        vectors = [p for p in teacher.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.lr,
        )

    def run_epoch(self, epoch: int) -> dict[str, float]:
        order = torch.randperm(len(self.x), generator=self.generator)
        self.teacher.train()
        totals = torch.zeros(3, device=self.x.device)
        for i in range(self.steps):
            lr = self._learning_rate()
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            totals += self._step(order[i * self.batch_size : (i + 1) * self.batch_size], epoch)
        loss, ccc, consistency = (totals / self.steps).tolist()
        if not math.isfinite(loss):
            raise UserError(f"training diverged in epoch {epoch} (loss {loss}); lower optimizer.lr")
        return {"loss": loss, "ccc": ccc, "consistency": consistency, "lr": lr}

    def _step(self, rows: torch.Tensor, epoch: int) -> torch.Tensor:
        config = self.config
        rows = rows.to(self.x.device)
        x, y = augment(self.x[rows], config.augment, self.generator), self.y[rows]
        if config.augment.mixup:
            share = float(self.beta.beta(config.augment.mixup, config.augment.mixup))
            other = torch.randperm(len(rows), generator=self.generator).to(x.device)
            x, y = share * x + (1 - share) * x[other], share * y + (1 - share) * y[other]
        n = len(x)
        plain = self._unlabelled_batch(n)
        if plain is not None:
            x = torch.cat([x, augment(plain, config.augment, self.generator)])
        va, _ = self.teacher.forward_standardized(x)
        loss = regression_loss(va[:n], y, ccc_weight=config.loss.ccc, mse_weight=config.loss.mse)
        consistency = loss.new_zeros(())
        if plain is not None:
            with torch.no_grad():
                wanted, _ = self.ema.forward_standardized(plain)
            consistency = (va[n:] - wanted).square().mean()
            ramp = min(1.0, epoch / config.support.ramp_epochs) if config.support.ramp_epochs else 1.0
            loss = loss + config.support.weight * ramp * consistency
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.teacher.parameters(), config.optimizer.clip)
        self.optimizer.step()
        self.step += 1
        self._update_ema()
        ccc = concordance(va[:n].detach(), y).mean()
        return torch.stack([loss.detach(), ccc, consistency.detach()])

    def _unlabelled_batch(self, n: int) -> torch.Tensor | None:
        if not len(self.unlabelled) or not self.config.support.weight:
            return None
        size = max(1, round(self.config.support.batch_ratio * n))
        rows = torch.randint(len(self.unlabelled), (size,), generator=self.generator)
        return self.unlabelled[rows.to(self.unlabelled.device)]

    def _learning_rate(self) -> float:
        settings = self.config.optimizer
        warmup, total = round(settings.warmup_epochs * self.steps), settings.epochs * self.steps
        if self.step < warmup:
            return settings.lr * (self.step + 1) / warmup
        return settings.lr * 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1, total - warmup)))

    @torch.no_grad()
    def _update_ema(self) -> None:
        # Short at first, so that the average does not keep the random start.
        decay = min(self.config.optimizer.ema_decay, (1 + self.step) / (10 + self.step))
        averages = self.ema.state_dict()
        for name, value in self.teacher.state_dict().items():
            if value.is_floating_point():
                averages[name].lerp_(value, 1 - decay)
            else:
                averages[name].copy_(value)
