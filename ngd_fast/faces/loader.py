"""The portable feed: plain PyTorch, on any device, with threads where asked for."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ngd_fast.faces.augment import render, view_parameters
from ngd_fast.faces.batches import Batch, Feed


class TorchFeed(Feed):
    """Gathers uint8 pixels on the host, renders the views on the device, a batch at a time.

    ``num_workers`` threads prepare batches ahead (NumPy, PIL and torch release the interpreter's lock); with 0 each
    batch is made when it is asked for.
    """

    kind = "torch"

    def __init__(self, faces, **options):
        super().__init__(faces, **options)
        self._mean, self._std = (torch.tensor(value, device=self.device) for value in (self.mean, self.std))
        # Two pools: a task of one that waited for tasks of the same would lock up when all its threads do.
        threaded = self.num_workers > 0
        self._batches = ThreadPoolExecutor(self.num_workers, "ngd-batch") if threaded else None
        decoding = threaded and not self.source.in_memory
        self._decoders = ThreadPoolExecutor(self.num_workers, "ngd-decode") if decoding else None

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        order = self.order(epoch)
        rows = (
            order[step * self.batch_size : (step + 1) * self.batch_size]
            for step in range(start_step, self.steps_per_epoch)
        )
        if self._batches is None:
            for batch_rows in rows:
                yield self._to_device(self._prepare(epoch, batch_rows))
            return
        pending = deque()
        try:
            for batch_rows in rows:
                pending.append(self._batches.submit(self._prepare, epoch, batch_rows))
                if len(pending) > 2 * self.num_workers:
                    yield self._to_device(pending.popleft().result())
            while pending:
                yield self._to_device(pending.popleft().result())
        finally:
            for future in pending:
                future.cancel()

    def _prepare(self, epoch: int, rows: np.ndarray):
        source = torch.from_numpy(self.source.take(rows, self._decoders))
        parameters = None
        if self.augment is not None:
            extent = (self.source.height, self.source.width)
            views = view_parameters(self.augment, self.key, epoch, rows, extent, self.image_size)
            parameters = torch.from_numpy(views)
        labels = torch.from_numpy(self.faces.labels[rows])
        host = [source, parameters, torch.from_numpy(self.targets(epoch, rows)), labels, torch.from_numpy(rows)]
        if self.device.type == "cuda":
            return [None if tensor is None else tensor.pin_memory() for tensor in host]
        host[0] = self._render(source, parameters)
        return host

    def _render(self, source: torch.Tensor, parameters: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            return render(
                source,
                parameters,
                self.image_size,
                mean=self._mean,
                std=self._std,
                dtype=self.dtype,
                channels=self.channels,
            )

    def _to_device(self, host) -> Batch:
        if self.device.type != "cuda":
            images, _, *rest = host
            return Batch(*(tensor.to(self.device) for tensor in (images, *rest)))
        source, parameters, *rest = (None if t is None else t.to(self.device, non_blocking=True) for t in host)
        return Batch(self._render(source, parameters), *rest)

    def close(self) -> None:
        for pool in (self._batches, self._decoders):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
