"""A training run's folder: configuration, weights, splits, metrics, log, TensorBoard, checksums."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ngd_fast.artifacts.files import require_free, sha256, write_json, write_sums, write_text
from ngd_fast.config import dump_config
from ngd_fast.console import say
from ngd_fast.eeg.join import load_maps
from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.errors import UserError
from ngd_fast.teacher.baselines import evaluate_baselines
from ngd_fast.teacher.config import TeacherConfig
from ngd_fast.teacher.inputs import embed
from ngd_fast.teacher.metrics import evaluate_va
from ngd_fast.teacher.network import WEIGHTS_NAME, load_teacher, save_teacher
from ngd_fast.teacher.splits import fixed_split, save_splits
from ngd_fast.teacher.training import TrainingResult, train_teacher


def load_labelled(paths: str | Path | Sequence[str | Path]) -> tuple[Topomaps, str, dict[str, np.ndarray]]:
    """:func:`~ngd_fast.eeg.join.load_maps` of files with at least one rating each; UserError otherwise."""
    maps, checksum, rows = load_maps(paths)
    files = [paths] if isinstance(paths, (str, Path)) else paths
    for path, own in zip(files, rows.values()):
        if not maps.labelled[own].any():
            raise UserError(
                f"{path}: none of its {len(own)} windows has valence and arousal; give it as --support instead"
            )
    return maps, checksum, rows


def load_support(path: str | Path | None, maps: Topomaps) -> Topomaps | None:
    """Topomaps to learn from without their ratings; None where ``path`` is.

    Raises UserError where windows of ``maps`` are among them: the subjects set aside would be trained on.
    """
    if path is None:
        return None
    support = Topomaps.load(path)
    own = {window.tobytes() for window in maps.power}
    shared = sum(window.tobytes() in own for window in support.power)
    if shared:
        raise UserError(
            f"{path}: {shared} of its {len(support)} windows are the labelled maps' own, so that subjects set aside "
            "would be trained on; support must come from other recordings"
        )
    return support


def run_training(
    maps_path: str | Path | Sequence[str | Path],
    out: str | Path,
    config: TeacherConfig,
    *,
    support_path: str | Path | None = None,
    device: str = "cpu",
    figures: bool = True,
) -> dict[str, Any]:
    """Train one teacher on a fixed split by subject and write its run to ``out``; returns what metrics.json holds.

    Files: config.yaml, teacher_best.safetensors, splits.json, metrics.json, log.jsonl, tb/, SHA256SUMS.txt and, with
    ``figures``, viz/. After Ctrl-C the best epoch so far is written and marked ``"interrupted": true``. A training
    that cannot start leaves nothing. Raises UserError for a folder that holds something already.
    """
    out = Path(out)
    require_free(out)
    maps, maps_sha256, _ = load_labelled(maps_path)
    support = load_support(support_path, maps)
    chosen = config.split
    split = fixed_split(
        maps.subject[maps.labelled],
        validation=chosen.validation_subjects,
        fraction=chosen.validation_fraction,
        seed=chosen.seed,
    )
    with EpochLog(out) as log:
        result = train_teacher(maps, split, config, support=support, device=device, on_epoch=log)
    meta = {
        "band_names": [str(band) for band in maps.bands],
        "input": config.input.model_dump(mode="json"),
        "maps_sha256": maps_sha256,
        "support_sha256": sha256(support_path) if support_path is not None else None,
        "train_subjects": list(split.train),
        "validation_subjects": list(split.validation),
        "epoch": result.epoch,
        "choice": config.choice,
        "seed": config.seed,
    }
    save_teacher(out / WEIGHTS_NAME, result.teacher, meta)
    # What is reported comes from the file that was written, not from the object in memory.
    teacher, meta = load_teacher(out)
    va, _ = embed(teacher, meta, maps)
    write_text(out / "config.yaml", dump_config(config))
    save_splits(out / "splits.json", "fixed", [split])
    rows = maps.labelled & np.isin(maps.subject, split.validation)
    target = np.stack([maps.valence, maps.arousal], axis=1)[rows]
    metrics = {
        "run": out.name,
        "seed": config.seed,
        "best_epoch": result.epoch,
        "interrupted": result.interrupted,
        # With choice "best" these subjects chose the epoch: their score leans upwards.
        "validation": evaluate_va(va[rows], target, maps.subject[rows]),
        "baselines": evaluate_baselines(maps, split.train, split.validation, config),
        "windows": {
            "train": int((maps.labelled & np.isin(maps.subject, split.train)).sum()),
            "validation": int(rows.sum()),
            "unlabelled": int((~maps.labelled & np.isin(maps.subject, split.train)).sum()),
            "support": len(support) if support is not None else 0,
        },
    }
    write_json(out / "metrics.json", metrics)
    if figures:
        _draw(out, result, va[rows], target)
    write_sums(out)
    return metrics


def _draw(out: Path, result: TrainingResult, prediction: np.ndarray, target: np.ndarray) -> None:
    try:
        from ngd_fast.teacher.figures import draw_curves, draw_predictions

        draw_curves(out / "viz" / "training_curves.png", [result.history])
        draw_predictions(out / "viz" / "predicted_vs_rated.png", prediction, target)
    except UserError as error:  # matplotlib is optional; a trained teacher is not lost for a picture
        say(f"no figures: {error}")


class EpochLog:
    """Writes each epoch to log.jsonl, flushed, and to TensorBoard; makes the folder with the first one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file = self._board = None

    def __enter__(self) -> "EpochLog":
        return self

    def __call__(self, entry: dict[str, Any]) -> None:
        if self._board is None:
            self._open()
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in entry.items():
            if isinstance(value, float):
                self._board.add_scalar(f"teacher/{key}", value, entry["epoch"])
        for dimension, block in entry.get("validation", {}).items():
            for name in ("ccc", "pearson", "rmse"):
                if name in block:
                    self._board.add_scalar(f"validation/{dimension}_{name}", block[name], entry["epoch"])

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.folder / "log.jsonl", "w", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
            # A Ctrl-C that falls into the writer's queue leaves its thread asleep until the next flush; the default of
            # two minutes would hold up the end that long.
            self._board = SummaryWriter(str(self.folder / "tb"), flush_secs=5)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror or error})") from None

    def __exit__(self, *_) -> None:
        for writer in (self._file, self._board):
            if writer is not None:
                writer.close()
