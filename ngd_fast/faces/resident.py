"""The resident feed: the whole dataset as uint8 in device memory, each batch made by one kernel."""

from collections.abc import Iterator

import numpy as np
import torch

from ngd_fast.devices import free_memory
from ngd_fast.errors import UserError
from ngd_fast.faces.augment import render, view_parameters
from ngd_fast.faces.batches import Batch, Feed


class ResidentFeed(Feed):
    """Pixels, labels, the epoch's order and the clock (epoch, step) lie in device memory.

    A training step captured in a CUDA graph calls :meth:`capturable_step` inside the capture; before each epoch
    :meth:`begin_epoch` is called outside, and each replay makes the next batch. Without a GPU the PyTorch twin of the
    kernel makes the same batches.
    """

    kind = "resident"

    def __init__(self, faces, **options):
        super().__init__(faces, **options)
        self._on_gpu = self.device.type == "cuda"
        if self._on_gpu:
            try:
                from ngd_fast.kernels.augment import write_views
            except ImportError:
                raise UserError("the resident feed needs Triton: pip install 'ngd-fast[triton]'") from None
            self._write_views = write_views
            free = free_memory(self.device)
            if self.source.num_bytes > free:
                raise UserError(
                    f"{faces.source}: {self.source.num_bytes / 1e9:.1f} GB of pixels do not fit {free / 1e9:.1f} GB "
                    "of free device memory; use --feed dali or torch"
                )
        self._load_pixels()
        self.label_dist = torch.from_numpy(faces.label_dist).to(self.device).contiguous()
        self.labels = torch.from_numpy(faces.labels).to(self.device)
        self.order_on_device = torch.zeros(self.samples_per_rank, dtype=torch.int64, device=self.device)
        self.clock = torch.zeros(2, dtype=torch.int64, device=self.device)
        """int64 [2]: the epoch, and the step whose batch is made next."""
        self._mean, self._std = (torch.tensor(value, device=self.device) for value in (self.mean, self.std))

    def set_image_size(self, image_size: int) -> None:
        before = self.source
        super().set_image_size(image_size)
        if self.source is not before:
            del self.pixels  # both may not fit
            self._load_pixels()

    def _load_pixels(self) -> None:
        pixels = self.source.load_all(max(1, self.num_workers))
        self.pixels = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)

    def empty_batch(self, count: int | None = None) -> Batch:
        """Uninitialised tensors for a batch of ``count`` (default: ``batch_size``)."""
        count = self.batch_size if count is None else count
        shape = (count, self.channels, self.image_size, self.image_size)
        images = torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)
        dist = torch.empty(count, self.label_dist.shape[1], device=self.device)
        labels, index = (torch.empty(count, dtype=torch.int64, device=self.device) for _ in range(2))
        return Batch(images, dist, labels, index)

    def begin_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Set order and clock; must stand outside a capture. The copies are asynchronous, in the current stream: steps
        that were launched there before still see the former epoch.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step: must lie in [0, {self.steps_per_epoch}], is {start_step}")
        order, clock = torch.from_numpy(self.order(epoch)), torch.tensor([epoch, start_step])
        if self._on_gpu:
            # PyTorch gives pinned memory to nobody else before the copies out of it have run.
            order, clock = order.pin_memory(), clock.pin_memory()
        self.order_on_device.copy_(order, non_blocking=True)
        self.clock.copy_(clock, non_blocking=True)

    def capturable_step(self, out: Batch) -> None:
        """Make the next batch in ``out`` and advance the clock; safe inside a CUDA graph.

        ``out`` holds a full batch, or what is left for the last step. At most ``steps_per_epoch`` times after
        :meth:`begin_epoch`, which is not checked on a GPU.
        """
        if self._on_gpu:
            # Triton launches on the current device.
            with torch.cuda.device(self.device):
                self._write_views(
                    self.pixels,
                    self.label_dist,
                    self.labels,
                    self.order_on_device,
                    self.clock,
                    (out.images, out.target_dist, out.labels, out.index),
                    key=self.key,
                    config=self.augment,
                    mean=self.mean,
                    std=self.std,
                    batch_size=self.batch_size,
                    draw_labels=self.draw_labels,
                )
        else:
            self._write_views_twin(out)
        self.clock[1:].add_(1)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        self.begin_epoch(epoch, start_step)
        for step in range(start_step, self.steps_per_epoch):
            batch = self.empty_batch(min(self.batch_size, self.samples_per_rank - step * self.batch_size))
            self.capturable_step(batch)
            yield batch

    def _write_views_twin(self, out: Batch) -> None:
        epoch, step = self.clock.tolist()
        index = self.order_on_device[step * self.batch_size :][: len(out.labels)]
        rows = index.cpu().numpy()
        parameters = None
        if self.augment is not None:
            extent = (self.source.height, self.source.width)
            parameters = torch.from_numpy(
                view_parameters(self.augment, self.key, epoch, rows, extent, self.image_size)
            ).to(self.device)
        with torch.no_grad():
            images = render(
                self.pixels[index],
                parameters,
                self.image_size,
                mean=self._mean,
                std=self._std,
                dtype=self.dtype,
                channels=self.channels,
            )
        out.images.copy_(images)
        out.target_dist.copy_(torch.from_numpy(self.targets(epoch, rows)))
        out.labels.copy_(self.labels[index])
        out.index.copy_(index)
