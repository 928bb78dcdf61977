"""The feeds alone: images a second that DALI, the resident feed and the plain PyTorch loader hand over."""

import time
from collections.abc import Sequence

import numpy as np
import torch

COLUMNS = ("feed", "batch", "size", "images/s")


def kinds(device: torch.device) -> tuple[str, ...]:
    """The feeds whose packages are there; ``resident`` needs a GPU (or Triton's interpreter, which is no measure)."""
    from importlib.util import find_spec

    found = ["torch"]
    if find_spec("nvidia.dali" if find_spec("nvidia") else "nvidia") is not None:
        found.append("dali")
    if device.type == "cuda" and find_spec("triton") is not None:
        found.append("resident")
    return tuple(found)


def make_faces(count: int):
    """Random grey faces of 48 x 48 pixels, labelled."""
    from ngd_fast.faces.dataset import Faces

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, count)
    images = rng.integers(0, 256, (count, 48, 48), dtype=np.uint8)
    return Faces(images=images, label_dist=np.eye(8, dtype=np.float32)[labels], source="random faces")


def measure(
    batch: int,
    size: int,
    device: torch.device,
    *,
    feeds: Sequence[str] | None = None,
    workers: int | None = None,
    seconds: float = 2.0,
) -> list[dict]:
    """A row for each of ``feeds``, some of :func:`kinds`, by default all."""
    return [_measure_one(kind, batch, size, device, workers, seconds) for kind in feeds or kinds(device)]


def _measure_one(kind: str, batch: int, size: int, device: torch.device, workers: int | None, seconds: float) -> dict:
    """Epochs are read for ``seconds`` after one batch of warm-up; the device is waited for once, at the end."""
    from ngd_fast.faces.feeds import make_feed

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    faces = make_faces(max(20 * batch, 4096))
    feed = make_feed(
        faces,
        kind=kind,
        batch_size=batch,
        image_size=size,
        train=True,
        seed=0,
        device=device,
        dtype=dtype,
        num_workers=workers,
    )
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    try:
        next(iter(feed.epoch(0)))
        synchronise()
        images, epoch, start = 0, 1, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            for one in feed.epoch(epoch):
                images += len(one.images)
                if time.perf_counter() - start > seconds:
                    break
            epoch += 1
        synchronise()
        spent = time.perf_counter() - start
    finally:
        feed.close()
    return {"feed": kind, "batch": batch, "size": size, "images/s": images / spent}


def table(rows: Sequence[dict]) -> list[list[str]]:
    """Cells in the order of COLUMNS."""
    return [[row["feed"], str(row["batch"]), str(row["size"]), f"{row['images/s']:,.0f}"] for row in rows]
