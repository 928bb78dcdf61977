"""One interface for everything that feeds faces to a network: DALI, device-resident, plain PyTorch."""

import abc
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch

from ngd_fast.console import say
from ngd_fast.devices import free_memory
from ngd_fast.errors import UserError
from ngd_fast.faces.augment import AugmentConfig, drawn_labels, seed_key
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.pixels import SourcePixels, drop_unreadable, source_shape

__all__ = ["KINDS", "AugmentConfig", "Batch", "Feed", "make_feed"]

KINDS = ("auto", "dali", "resident", "torch")


@dataclass
class Batch:
    """One batch on the feed's device."""

    images: torch.Tensor
    """[B, channels, S, S] of the feed's dtype, channels-last, normalised."""
    target_dist: torch.Tensor
    """[B, C] float32: the raters' distribution (0 where unlabelled), or the drawn label as one-hot."""
    labels: torch.Tensor
    """[B] int64; -1 = unlabelled."""
    index: torch.Tensor
    """[B] int64: rows in the feed's ``faces``."""


class Feed(abc.ABC):
    """Batches of views of ``faces``.

    The order is np.random.default_rng((seed, epoch)).permutation(N) in training and 0..N-1 else; rank r of w takes
    every w-th from r on, so that the ranks' batches together are one batch of the whole.

    In training over several ranks all take equally many steps: with ``drop_last`` the rest is left out, else the
    first samples of the order are repeated. Order and views depend on (seed, epoch, sample) alone.
    """

    kind: str
    reason = ""
    """Why ``auto`` took this feed."""

    def __init__(
        self,
        faces: Faces,
        *,
        batch_size: int,
        image_size: int,
        train: bool,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        augment: AugmentConfig | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.25,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool | None = None,
        num_workers: int = 0,
        channels: int = 3,
        grey: bool = False,
        draw_labels: bool = False,
    ):
        self.faces = faces
        self.batch_size, self.image_size, self.train, self.seed = batch_size, image_size, train, seed
        self.device, self.dtype, self.num_workers = device, dtype, num_workers
        self.augment = (AugmentConfig() if augment is None else augment) if train else None
        self.rank, self.world_size = rank, world_size
        self.drop_last = train if drop_last is None else drop_last
        self.draw_labels = draw_labels and train
        self.key = seed_key(seed)
        self.source = SourcePixels(faces, image_size, grey=grey or channels == 1)
        self.channels = channels
        self.mean, self.std = (_per_channel(name, value, channels) for name, value in (("mean", mean), ("std", std)))
        if self.drop_last and len(faces) < batch_size * world_size:
            ranks = f" ({world_size} ranks of {batch_size})" if world_size > 1 else ""
            raise UserError(
                f"{faces.source}: {len(faces)} faces do not fill one batch of {batch_size * world_size}{ranks}; "
                f"choose a batch size of at most {len(faces) // world_size * world_size or 1}"
            )

    def set_image_size(self, image_size: int) -> None:
        """Show views of ``image_size`` in the epochs that begin from now on, as a feed made with it would."""
        self.image_size = image_size
        self.source = self.source.for_size(image_size)

    @property
    def samples_per_rank(self) -> int:
        """Samples that this rank sees in an epoch."""
        per_rank, rest = divmod(len(self.faces), self.world_size)
        if self.train:
            per_rank += 0 if self.drop_last else bool(rest)
        else:
            per_rank += self.rank < rest
        return per_rank // self.batch_size * self.batch_size if self.drop_last else per_rank

    @property
    def steps_per_epoch(self) -> int:
        """Batches that this rank sees in an epoch."""
        return -(-self.samples_per_rank // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """int64 [samples_per_rank]: the rows that this rank sees in ``epoch``, in order."""
        count = len(self.faces)
        rows = np.random.default_rng((self.seed, epoch)).permutation(count) if self.train else np.arange(count)
        if self.train and not self.drop_last:
            rows = np.resize(rows, -(-count // self.world_size) * self.world_size)
        return rows[self.rank :: self.world_size][: self.samples_per_rank]

    def targets(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """float32 [B, C]: label distributions of the rows, or labels drawn from them."""
        dist = self.faces.label_dist[rows]
        return drawn_labels(self.key, epoch, rows, dist) if self.draw_labels else dist

    @abc.abstractmethod
    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch``, from step ``start_step`` on."""

    def close(self) -> None:  # noqa: B027 (nothing to do unless a feed holds threads or a pipeline)
        """Release threads and pipelines; the feed cannot be used afterwards."""


def _per_channel(name: str, value, channels: int) -> tuple[float, ...]:
    values = tuple(float(v) for v in (value if isinstance(value, (Sequence, np.ndarray, torch.Tensor)) else [value]))
    values = values * channels if len(values) == 1 else values
    if len(values) != channels:
        raise ValueError(f"{name}: must be one number or {channels}, are {len(values)}")
    if name == "std" and min(values) <= 0:
        raise ValueError(f"std: must be positive, is {values}")
    return values


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
    # Imported here: the three modules import this one, and DALI and Triton may be absent.
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
