"""What every feed gives, and what it is: the interface below DALI's, the device-resident and plain PyTorch's."""

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ngd_fast.errors import UserError
from ngd_fast.faces.augment import AugmentConfig, drawn_labels, seed_key
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.pixels import SourcePixels


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
