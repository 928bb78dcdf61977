"""One student in training: its step, its run folder, its best epoch.

What a student keeps between the ``Trainer``'s epochs, and all that it writes; the loop is not here, nor the arithmetic.
"""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ngd_fast.artifacts.files import SUMS_NAME, write_json, write_sums
from ngd_fast.artifacts.fingerprint import FINGERPRINT_NAME, make_fingerprint, write_environment
from ngd_fast.errors import UserError, first_line, lacks_memory
from ngd_fast.evaluation.metrics import evaluate, evaluate_predictions
from ngd_fast.evaluation.predictions import softmax
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.feeds import Feed
from ngd_fast.student.checkpoint import LAST_NAME, load_checkpoint, save_checkpoint
from ngd_fast.student.config import StudentConfig
from ngd_fast.student.distributed import Ranks
from ngd_fast.student.inference import predict, predict_feed
from ngd_fast.student.runlog import RunLog
from ngd_fast.student.step import TERMS, StudentStep
from ngd_fast.student.weights import BEST_NAME, load_student, save_student

METRICS_NAME = "metrics.json"
CONFIG_NAME = "config.yaml"
PREDICTIONS_NAME = "predictions_valid.npz"


@dataclass
class Progress:
    """How far a student is; saved with every checkpoint."""

    epoch: int = 0
    """Finished epochs."""
    step: int = 0
    """Finished steps of the running epoch."""
    sums: list[float] = field(default_factory=lambda: [0.0] * len(TERMS))
    """Of each term over the steps of the running epoch."""
    skipped: int = 0
    """Of these steps, those that fp16's scaler left out; their gradient's norm is not finite and not in its sum."""
    best: float = -math.inf
    best_epoch: int = 0
    seconds: float = 0.0
    """Spent training, without validation and without ``preparing``."""
    preparing: float = 0.0
    """Seconds spent compiling and capturing CUDA graphs."""
    waited: float = 0.0
    """Of ``seconds``, those in which the device waited for data."""
    images: int = 0
    before: dict[str, float] = field(default_factory=dict)
    """``spent`` when the running epoch began."""

    def spent(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("seconds", "preparing", "waited", "images")}

    def speed(self) -> dict[str, float]:
        """Of the running epoch, those of its steps included that were made before an interruption."""
        spent = {name: value - self.before.get(name, 0) for name, value in self.spent().items()}
        waited, seconds = spent.pop("waited"), spent["seconds"]
        return {**spent, "images_per_second": spent["images"] / seconds, "data_wait": waited / seconds}


class Diverged(UserError):
    """A student's training gave numbers that are not finite, and would again; its run is in ``folder``."""

    def __init__(self, message: str, folder: Path):
        super().__init__(message)
        self.folder = folder


class Session:
    """Trains one student into ``folder``. Rank 0 alone writes."""

    def __init__(
        self, config: StudentConfig, folder: Path, step: StudentStep, *, checksums: Mapping[str, str], ranks: Ranks
    ):
        self.config, self.folder, self.step, self.ranks = config, Path(folder), step, ranks
        self.checksums = dict(checksums)
        self.progress = Progress()
        self.log: RunLog | None = None
        self._saved_at = time.monotonic()
        self._unsaved_best: tuple[dict, dict] | None = None
        self._averaged = copy.deepcopy(step.student) if step.average is not None else None

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Continue from the last checkpoint; False where there is none. Raises UserError where it does not fit."""
        path = self.folder / LAST_NAME
        if not path.exists():
            return False
        state = load_checkpoint(path, config=self.config.model_dump(mode="json"), checksums=self.checksums)
        try:
            self.step.load_state_dict(state["step"])
            self.progress = Progress(**state["progress"])
            torch.set_rng_state(state["rng"])
            if self.step.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.step.device)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if lacks_memory(error):
                raise
            raise UserError(f"{path}: holds no state of such a run ({first_line(error)})") from None
        return True

    def start(self) -> None:
        """Open the log; call after :meth:`resume`."""
        if self.ranks.is_main:
            self.log = RunLog(self.folder, self.progress.epoch)

    def save(self) -> None:
        """Write the best student if there is a new one, then the checkpoint. Within an epoch all ranks must call it."""
        if self.progress.step:  # all ranks continue from this one file
            self.progress.sums = np.mean(self.ranks.gather(self.progress.sums), axis=0).tolist()
        if not self.ranks.is_main:
            return
        # In this order: a best student that the checkpoint does not know of yet is made again on resume, the same.
        if self._unsaved_best is not None:
            save_student(self.folder / BEST_NAME, *self._unsaved_best)
            self._unsaved_best = None
        cuda = self.step.device.type == "cuda"
        state = {
            "step": self.step.state_dict(),
            "progress": vars(self.progress),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.step.device) if cuda else None,
        }
        config = self.config.model_dump(mode="json")
        save_checkpoint(self.folder / LAST_NAME, state, config=config, checksums=self.checksums)
        self._saved_at = time.monotonic()

    # -- during an epoch ----------------------------------------------------------------------------------------------

    def read_history(self, steps: int, done: int) -> dict[str, float]:
        """Add the last ``steps`` steps, of which the newest is number ``done`` of the whole run, to the epoch's sums.

        The one place where the host waits for the device. Returns the terms' means over these steps. Raises Diverged,
        naming the step and the term, where one is not finite; nothing has been saved since that step.
        """
        slots = [index % len(self.step.history) for index in range(done - steps, done)]
        rows = self.step.history.cpu().double().numpy()[slots]
        self._require_finite(rows, first=done - steps)
        skipped = ~np.isfinite(rows[:, -1])
        rows[skipped, -1] = 0.0
        self.progress.skipped += int(skipped.sum())
        for row in rows:  # one by one: a sum of parts would depend on how often one looks
            self.progress.sums = (np.array(self.progress.sums) + row).tolist()
        self.progress.step += steps
        return dict(zip(TERMS, rows.mean(axis=0).tolist()))

    def _require_finite(self, rows: np.ndarray, first: int) -> None:
        # fp16 overflows now and then; its scaler leaves such a step out.
        checked = rows[:, :-1] if self.step.scaler.is_enabled() else rows
        bad = np.argwhere(~np.isfinite(checked))
        if not len(bad):
            return
        row = bad[0][0]
        # The loss is not finite wherever a term is not; the term says more.
        column = next(c for c in (*range(1, checked.shape[1]), 0) if not np.isfinite(checked[row, c]))
        name = {"grad_norm": "the gradient's norm", "loss": "the loss"}.get(TERMS[column], f"the term {TERMS[column]}")
        last = self.folder / LAST_NAME
        kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been written yet"
        raise Diverged(
            f"{self.config.name} (seed {self.config.seed}): {name} is {rows[row, column]} at step {first + row + 1} "
            f"(epoch {self.progress.epoch + 1}); {kept}.\n"
            "A lower optimizer.lr, train.precision=fp32 or a lower train.clip_grad may help",
            self.folder,
        )

    # -- at an epoch's end --------------------------------------------------------------------------------------------

    def end_epoch(self, feed: Feed, more: Mapping[str, float]) -> None:
        """Validate, keep the student if it is the best, log (``more`` too), and write a checkpoint if it is time."""
        module = self.step.student
        if self._averaged is not None:
            module = self._averaged
            module.load_state_dict(self.step.weights())
        self.ranks.broadcast(module.buffers())  # each rank has its own batch statistics; rank 0's are saved
        logits, rows = self._predict(module, feed)
        logits, rows = (np.concatenate(parts) for parts in zip(*self.ranks.gather((logits, rows))))
        progress = self.progress
        sums = np.mean(self.ranks.gather(progress.sums), axis=0).tolist()
        means = {name: value / max(1, progress.step) for name, value in zip(TERMS, sums)}
        means["grad_norm"] = sums[-1] / max(1, progress.step - progress.skipped)
        progress.epoch, progress.step, progress.skipped = progress.epoch + 1, 0, 0
        progress.sums = [0.0] * len(TERMS)
        if self.ranks.is_main:
            if not np.isfinite(logits).all():
                name = f"{self.config.name} (seed {self.config.seed})"
                raise Diverged(f"{name}: logits on valid are not finite after epoch {progress.epoch}", self.folder)
            valid = validation_metrics(feed.faces.labels[rows], logits, feed.faces.class_names)
            if valid[self.config.train.best_metric] > progress.best:
                progress.best, progress.best_epoch = valid[self.config.train.best_metric], progress.epoch
                self._unsaved_best = {k: v.clone() for k, v in self.step.weights().items()}, self._meta()
            device = {"lr": float(self.step.lr), "geo_weight": float(self.step.geo_weight)}
            speed = {**progress.speed(), **more, "total_seconds": progress.seconds}
            self.log.epoch(progress.epoch, {**means, **device, **speed, "valid": valid})
        progress.before = progress.spent()
        due = time.monotonic() - self._saved_at >= self.config.train.checkpoint_seconds
        if due or progress.epoch == self.config.train.epochs:
            self.save()

    def _predict(self, module: torch.nn.Module, feed: Feed) -> tuple[np.ndarray, np.ndarray]:
        """(logits, rows) of the validation faces. Raises UserError where memory runs out; the steps are kept."""
        try:
            _, logits, rows = predict_feed(module, feed, autocast=self.step.autocast)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            size, kept = self.config.train.valid_batch_size, ""
            if self.ranks.world_size == 1:  # one rank cannot save: it needs the others' sums
                self.save()
                kept = f" with --resume, which goes on from the end of epoch {self.progress.epoch + 1}"
            raise UserError(
                f"a validation batch of {size} faces does not fit in the memory; "
                f"try --set train.valid_batch_size={max(1, size // 2)}{kept}"
            ) from error
        return logits, rows

    def _meta(self) -> dict:
        data, model = self.config.data, self.config.model
        return {
            "arch": model.arch,
            "class_names": list(CLASS_NAMES),
            "image_size": data.image_size,
            "mean": data.mean,
            "std": data.std,
            "grey": data.grey,
            "embedding_dim": model.embedding_dim,
            "logit_scale": model.logit_scale,
            "epoch": self.progress.epoch,
            "config_name": self.config.name,
            "seed": self.config.seed,
        }

    # -- at the end ---------------------------------------------------------------------------------------------------

    def finish(self, valid: Faces, dataset: str, files: Mapping[str, str]) -> dict:
        """Evaluate the best student and write predictions, metrics, fingerprint and checksums. Returns the metrics."""
        self.log.close()
        folder, progress = self.folder, self.progress
        module, meta = load_student(folder / BEST_NAME)
        if self.config.train.channels_last:
            module = module.to(memory_format=torch.channels_last)
        predictions = predict(
            module,
            meta,
            valid,
            device=self.step.device,
            batch_size=self.config.train.valid_batch_size,
            dtype=self.step.autocast,
            feed="torch",
            workers=self.config.feed.workers,
            skip_bad=self.config.data.skip_bad,
            dataset=dataset,
        )
        predictions.save(folder / PREDICTIONS_NAME)
        metrics = {
            "run": folder.name,
            "variant": self.config.name,
            "seed": self.config.seed,
            "dataset": dataset,
            "best_epoch": progress.best_epoch,
            "valid": evaluate_predictions(predictions, bootstrap=self.config.train.bootstrap),
            "train": {
                "images_per_second": progress.images / progress.seconds,
                "seconds": progress.seconds,
                "preparing": progress.preparing,
                "data_wait": progress.waited / progress.seconds,
            },
            "config": self._summary(),
        }
        weights = self.config.objective
        make_fingerprint(
            folder,
            variant=self.config.name,
            seed=self.config.seed,
            switches=self.config.switches(),
            weights={"ce": 1.0, "kd": weights.kd.weight, "proto": weights.proto.weight, "d_geo": weights.geo.weight},
            files={"config": folder / CONFIG_NAME, "weights": folder / BEST_NAME, **files},
            checksums=self.checksums,
        )
        write_environment(folder)
        write_json(folder / METRICS_NAME, metrics)
        write_sums(folder)
        return metrics

    def _summary(self) -> dict:
        config = self.config
        return {
            "arch": config.model.arch,
            "image_size": config.data.image_size,
            "resolution": config.train.model_dump()["resolution"],
            "epochs": config.train.epochs,
            "batch_size": config.train.batch_size * config.train.accumulation,
            "precision": config.train.precision,
            "lr": config.optimizer.lr,
            "kd": config.objective.kd.mode if config.objective.kd.weight else None,
            "device": self.step.device.type,
            **({"label_noise": config.data.label_noise} if config.data.label_noise else {}),
        }


def validation_metrics(labels: np.ndarray, logits: np.ndarray, class_names) -> dict[str, float]:
    """8-way metrics without intervals, and the mean negative log-likelihood in nats."""
    block = evaluate(labels, logits, class_names=class_names, bootstrap=0)
    known = labels >= 0
    likelihood = softmax(logits[known])[np.arange(known.sum()), labels[known]]
    names = ("accuracy", "macro_f1", "balanced_accuracy", "ece")
    return {**{name: block[name] for name in names}, "nll": float(-np.log(np.maximum(likelihood, 1e-300)).mean())}


def is_finished(folder: str | Path) -> bool:
    """True where a run has come to its end: metrics, fingerprint and checksums are there."""
    return all((Path(folder) / name).exists() for name in (METRICS_NAME, FINGERPRINT_NAME, SUMS_NAME))
