"""A student under corruptions: predictions of every face at every severity, and the mean corruption error."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ngd_fast.console import progress
from ngd_fast.errors import UserError
from ngd_fast.evaluation import bootstrap as boot
from ngd_fast.evaluation.metrics import prepare
from ngd_fast.faces.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.feeds import make_feed

CORRUPTIONS_NAME = "corruptions.json"
METRICS = ("accuracy", "macro_f1", "balanced_accuracy")


@torch.no_grad()
def corrupted_logits(
    module: nn.Module,
    meta: Mapping[str, Any],
    faces: Faces,
    names: Sequence[str] = tuple(CORRUPTIONS),
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    workers: int | None = None,
    skip_bad: bool = False,
    seed: int = 0,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({"clean": [1, N, C], corruption: [5, N, C]} float32 logits, labels [N]) of ``faces``, at the network's size.

    Faces are read once; corruptions are applied on the device, to pixels in [0, 1] before they are normalised.
    """
    device = torch.device(device)
    module = module.to(device).eval()
    mean, std = (torch.as_tensor(meta[key], dtype=torch.float32, device=device).reshape(1, -1, 1, 1)
                 for key in ("mean", "std"))  # fmt: skip
    grey = bool(meta.get("grey", False))
    feed = make_feed(
        faces, batch_size=batch_size, image_size=meta["image_size"], train=False, device=device, mean=meta["mean"],
        std=meta["std"], grey=grey, num_workers=workers, skip_bad=skip_bad,
    )  # fmt: skip
    cases = [("clean", 0), *((name, severity) for name in names for severity in SEVERITIES)]
    found: dict[tuple, list[np.ndarray]] = {case: [] for case in cases}
    labels = []
    try:
        with progress(desc="corruptions", total=feed.steps_per_epoch * len(cases), unit="batch") as bar:
            for batch in feed.epoch(0):
                pixels = (batch.images.float() * std + mean).contiguous()
                alike = grey or bool((pixels == pixels[:, :1]).all())
                labels.append(batch.labels.cpu().numpy().copy())
                for name, severity in cases:
                    shown = pixels
                    if severity:
                        shown = corrupt(pixels, name, severity, seed=seed, rows=batch.index, grey=alike)
                    shown = ((shown - mean) / std).contiguous(memory_format=torch.channels_last)
                    found[name, severity].append(module(shown)[1].float().cpu().numpy())
                    bar.update()
    finally:
        feed.close()
    logits = {"clean": np.concatenate(found["clean", 0])[None]}
    for name in names:
        logits[name] = np.stack([np.concatenate(found[name, severity]) for severity in SEVERITIES])
    return logits, np.concatenate(labels)


def corruption_scores(logits: Mapping[str, np.ndarray], labels: np.ndarray) -> dict:
    """{"clean": {metric: value}, "corruptions": {name: {metric: [5 values]}}, "n"} under the 8-way protocol."""

    def scores(values: np.ndarray) -> dict[str, float]:
        scored = prepare(labels, values, "eight_way")
        plain = boot.score(scored, np.ones((len(scored.labels), 1)), METRICS)
        return {name: float(plain[name][0]) for name in METRICS}

    made = {name: [scores(values) for values in levels] for name, levels in logits.items()}
    (clean,) = made.pop("clean")
    return {
        "clean": clean,
        "corruptions": {n: {m: [level[m] for level in levels] for m in METRICS} for n, levels in made.items()},
        "n": int((labels >= 0).sum()),
    }


def mean_corruption_error(scores: Mapping, baseline: Mapping) -> dict:
    """mCE and relative mCE of Hendrycks & Dietterich (2019), in percent: 100 is as good as ``baseline``.

    {"mce", "relative_mce", "ce": {corruption: percent}}. CE of a corruption is the sum of errors over severities over
    the baseline's; the relative one takes the rise above the error on clean faces, and is absent where a baseline does
    not get worse. Raises UserError where the two were not made alike.
    """
    if scores["n"] != baseline["n"] or scores["corruptions"].keys() != baseline["corruptions"].keys():
        raise UserError("the baseline's corruptions are others, or of other faces; make them again alike")
    error = {key: _errors(made) for key, made in (("own", scores), ("base", baseline))}
    ce = {name: 100 * sum(own) / sum(error["base"][name]) for name, own in error["own"].items()}
    result = {"mce": float(np.mean(list(ce.values()))), "ce": ce}
    rise = {
        key: {name: sum(values) - len(values) * (1 - made["clean"]["accuracy"]) for name, values in error[key].items()}
        for key, made in (("own", scores), ("base", baseline))
    }
    if min(rise["base"].values()) > 0:
        result["relative_mce"] = float(np.mean([100 * rise["own"][name] / rise["base"][name] for name in ce]))
    return result


def _errors(scores: Mapping) -> dict[str, list[float]]:
    errors = {name: [1 - a for a in values["accuracy"]] for name, values in scores["corruptions"].items()}
    perfect = [name for name, values in errors.items() if sum(values) == 0]
    if perfect:
        raise UserError(f"mean corruption error: {perfect[0]} causes no error at all, so nothing can be divided by it")
    return errors
