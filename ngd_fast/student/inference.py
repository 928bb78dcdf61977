"""A student's predictions over a set of faces."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ngd_fast.errors import UserError
from ngd_fast.evaluation.calibration import Calibration
from ngd_fast.evaluation.predictions import Predictions
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.feeds import Feed, make_feed
from ngd_fast.student.frozen import FrozenStudent, why_not


@torch.no_grad()
def predict_feed(
    module: nn.Module | FrozenStudent, feed: Feed, *, autocast: torch.dtype | None = None, flip_tta: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features [N, D] float32 of norm 1, logits [N, C] float32, rows [N] int64 in the feed's faces), in eval mode.

    ``flip_tta`` averages the logits, and the features before they are normalised again, with those of the mirror image.
    The module is left in the mode it was in.
    """
    training = isinstance(module, nn.Module) and module.training
    if training:
        module.eval()
    found = ([], [], [])
    try:
        for batch in feed.epoch(0):
            with torch.autocast(batch.images.device.type, autocast, enabled=autocast is not None):
                features, logits = module(batch.images)
                if flip_tta:
                    mirrored = module(batch.images.flip(3))
                    features = torch.nn.functional.normalize(features + mirrored[0], dim=1)
                    logits = (logits + mirrored[1]) / 2
            for values, tensor in zip(found, (features, logits, batch.index)):
                values.append(tensor.clone())
    finally:
        if training:
            module.train()
    features, logits, rows = (torch.cat(values).cpu().numpy() for values in found)
    return features.astype(np.float32), logits.astype(np.float32), rows


def predict(
    module: nn.Module,
    meta: Mapping[str, Any],
    faces: Faces,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    flip_tta: bool = False,
    dtype: torch.dtype | None = None,
    precision: str | None = None,
    feed: str = "auto",
    workers: int | None = None,
    skip_bad: bool = False,
    dataset: str | None = None,
    calibration: Calibration | None = None,
) -> Predictions:
    """Predict ``faces`` with a student and its ``meta`` as from :func:`~ngd_fast.student.weights.load_student`.

    dtype     autocast to bfloat16 or float16; None computes in float32
    precision  "auto", "fp32" or "bf16": on a CPU freeze the student (:mod:`ngd_fast.student.frozen`) where that can be
              done; "auto" is float32 on a GPU. None: as ``dtype`` says
    feed      which feed prepares the faces, as in make_feed
    dataset   its name in tables; default: the faces' source
    calibration  applied to the logits
    Rows come in the faces' order; with ``skip_bad`` unreadable ones are missing. Raises UserError for unreadable images
    and for faces of other classes.
    """
    if tuple(faces.class_names) != tuple(meta["class_names"]):
        raise UserError(f"{faces.source}: its classes are not the student's ({', '.join(meta['class_names'])})")
    device = torch.device(device)
    module = module.to(device)
    network = module
    if precision is not None:
        network, dtype = at_precision(module, device, precision)
    source = make_feed(
        faces,
        kind=feed,
        batch_size=batch_size,
        image_size=meta["image_size"],
        train=False,
        device=device,
        mean=meta["mean"],
        std=meta["std"],
        grey=meta.get("grey", False),
        num_workers=workers,
        skip_bad=skip_bad,
    )
    try:
        features, logits, rows = predict_feed(network, source, autocast=dtype, flip_tta=flip_tta)
        shown = source.faces
    finally:
        source.close()
    computed_in = network.dtype if isinstance(network, FrozenStudent) else dtype or torch.float32
    made_with = {"flip_tta": str(flip_tta), "dtype": str(computed_in).removeprefix("torch.")}
    if calibration is not None:
        logits, made_with["calibration"] = calibration.apply(logits), calibration.method
    return Predictions(
        logits=logits,
        labels=shown.labels[rows],
        names=[shown.names[row] for row in rows],
        class_names=tuple(meta["class_names"]),
        dataset=dataset or faces.source,
        label_dist=shown.label_dist[rows],
        features=features,
        meta=made_with,
    )


def at_precision(module: nn.Module, device: torch.device, precision: str):
    """(What to call, its autocast dtype or None). A frozen student casts by itself."""
    if device.type != "cpu" or why_not(module):
        return module, torch.bfloat16 if precision == "bf16" else None
    try:
        return FrozenStudent(module, precision), None
    except ValueError as error:
        raise UserError(f"--precision {precision}: {error}") from None
