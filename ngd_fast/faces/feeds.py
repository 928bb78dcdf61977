"""The choice among the feeds: DALI, device-resident, plain PyTorch. What they have in common stands in ``batches``."""

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from ngd_fast.console import say
from ngd_fast.devices import free_memory
from ngd_fast.errors import UserError
from ngd_fast.faces.augment import AugmentConfig
from ngd_fast.faces.batches import Batch, Feed
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.pixels import drop_unreadable, source_shape

__all__ = ["KINDS", "AugmentConfig", "Batch", "Feed", "make_feed"]

KINDS = ("auto", "dali", "resident", "torch")


def make_feed(
    faces: Faces,
    *,
    kind: str = "auto",
    batch_size: int,
    image_size: int,
    train: bool,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    augment: AugmentConfig | None = None,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.25,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool | None = None,
    num_workers: int | None = None,
    skip_bad: bool = False,
    channels: int = 3,
    grey: bool = False,
    draw_labels: bool = False,
) -> Feed:
    """A feed of ``faces``; all kinds give the same samples, labels and views in the same order.

    kind         "torch" (anywhere), "resident" (pixels in device memory, one kernel), "dali", or "auto", which says
                 which one it took and why
    batch_size   of this rank
    augment      training views; None = AugmentConfig(). Unused without ``train``, which shows whole images in order
    mean, std    one number, or one for each channel, on a scale of grey values from 0 to 1
    drop_last    leave an incomplete batch out; default: in training
    num_workers  threads that prepare batches ahead and decode (torch), or decode (dali, resident); None: for a GPU one
                 for each core, 8 at most; none beside the work of a CPU
    skip_bad     leave undecodable images out (counted and named); else they are an error
    channels     3, or 1 for one grey channel
    grey         turn colour images into grey; a grey image has three equal channels
    draw_labels  in training, draw one label from each distribution (FER+'s "probability" mode)

    Raises ValueError for bad arguments; UserError for unreadable images, too few faces, a missing DALI or Triton.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: must be one of {', '.join(KINDS)}, is {kind!r}")
    for name, value in (("batch_size", batch_size), ("image_size", image_size), ("world_size", world_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: must be a positive integer, is {value!r}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: must lie in [0, {world_size}), is {rank}")
    if channels not in (1, 3):
        raise ValueError(f"channels: must be 1 or 3, is {channels}")
    if len(faces) == 0:
        raise UserError(f"{faces.source}: holds no faces")
    device = torch.device(device)
    if num_workers is None:
        num_workers = _threads(device, world_size)
    if skip_bad:
        faces = drop_unreadable(faces, max(1, num_workers))
    reason = ""
    if kind == "auto":
        kind, reason = _choose(faces, source_shape(faces, image_size, grey=grey or channels == 1), device)
        if rank == 0:
            say(f"feed: {kind} ({reason})")
    feed = _feed_class(kind)(
        faces,
        batch_size=batch_size,
        image_size=image_size,
        train=train,
        seed=seed,
        device=device,
        dtype=dtype,
        augment=augment,
        mean=mean,
        std=std,
        rank=rank,
        world_size=world_size,
        drop_last=drop_last,
        num_workers=num_workers,
        channels=channels,
        grey=grey,
        draw_labels=draw_labels,
    )
    feed.reason = reason
    return feed


def _threads(device: torch.device, world_size: int) -> int:
    """Of a feed that was not told how many: on a CPU the network has all cores, a GPU leaves them idle."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # torchrun's: the ranks of this machine
    return min(8, max(1, (os.cpu_count() or 1) // here)) if device.type == "cuda" else 0


def _feed_class(kind: str) -> type[Feed]:
    # Imported here: DALI and Triton may be absent.
    if kind == "resident":
        from ngd_fast.faces.resident import ResidentFeed

        return ResidentFeed
    if kind == "dali":
        from ngd_fast.faces.dali import DaliFeed

        return DaliFeed
    from ngd_fast.faces.loader import TorchFeed

    return TorchFeed


def _choose(faces: Faces, shape: tuple[int, int, int], device: torch.device) -> tuple[str, str]:
    """The fastest feed that this machine allows for source pixels of ``shape``, and why."""
    if device.type != "cuda":
        return "torch", f"the device is {device.type}"
    needed = len(faces) * math.prod(shape)
    free = free_memory(device)
    size = f"{needed / 1e9:.2f} GB of pixels, {free / 1e9:.1f} GB of device memory free"
    # Half: the network and its activations come on top.
    if needed <= free / 2 and find_spec("triton") is not None:
        return "resident", size
    why = size if needed > free / 2 else "Triton is not installed"
    has_dali = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    return ("dali", why) if has_dali else ("torch", f"{why}; DALI is not installed")
