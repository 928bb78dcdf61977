"""The DALI feed: one pipeline per rank, on the GPU, or wholly on the CPU where there is none.

Order, views and labels come from this package's counter-based numbers, handed to DALI as per-sample arguments: the
batches are those of the other feeds but for the rounding of resampling (1e-3 of the grey range for pixels in memory, a
few grey levels for JPEG, whose decoders differ). DALI is given a callable of BatchInfo and keeps no state worth
saving: an epoch starts at any step.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ngd_fast.errors import UserError
from ngd_fast.faces.augment import view_parameters
from ngd_fast.faces.batches import Batch, Feed
from ngd_fast.faces.images import decode_image, open_image

_DECODED_BY_DALI = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"RIFF", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
"""How JPEG, PNG, BMP, WebP and JPEG 2000 begin. TIFF and PNM are Pillow's: DALI reads no TIFF of one bit, and takes
another greatest value of a PNM for 255."""


class DaliFeed(Feed):
    """Decodes, resamples and normalises in DALI; the batch is handed to PyTorch without a copy.

    DALI writes float32 or float16; bfloat16 is cast from float16, which is finer at the size of normalised pixels.
    """

    kind = "dali"

    def __init__(self, faces, **options):
        super().__init__(faces, **options)
        try:
            import nvidia.dali  # noqa: F401 (tells at once that it is missing)
        except ImportError as error:
            raise UserError(
                f"the DALI feed needs nvidia-dali ({error}): pip install 'ngd-fast[dali-cuda13]' (or dali-cuda12)"
            ) from None
        self._on_gpu = self.device.type == "cuda"
        self._pool = None if self.source.in_memory else ThreadPoolExecutor(max(1, self.num_workers), "ngd-read")
        self._epoch, self._start, self._order = 0, 0, np.empty(0, np.int64)
        self._fault: Exception | None = None
        self._judged = np.zeros(len(self.faces), bool)
        self._pipeline = None

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        self._epoch, self._start, self._order = epoch, start_step, self.order(epoch)
        self._fault = None
        finished = False
        if self._pipeline is None:
            try:
                self._pipeline = self._build()
            except RuntimeError as error:
                raise UserError(f"DALI cannot start: {_reason(error)}; try --feed torch") from None
        else:
            self._pipeline.reset()
        try:
            for step in range(start_step, self.steps_per_epoch):
                yield self._batch(step, self._run(step))
            finished = self._at_end()
        finally:
            if not finished:
                # Batches of an epoch that was left early still lie in the pipeline's queue.
                self._pipeline = None

    def set_image_size(self, image_size: int) -> None:
        super().set_image_size(image_size)
        self._pipeline = None  # the size is built into it

    def close(self) -> None:
        self._pipeline = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _device_id(self) -> int | None:
        if not self._on_gpu:
            return None
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    def _rows(self, step: int) -> np.ndarray:
        return self._order[step * self.batch_size : (step + 1) * self.batch_size]

    def _run(self, step: int):
        # On a GPU the output belongs to this stream: neither side waits on the host, and DALI does not reuse the
        # memory before the stream has read it.
        stream = torch.cuda.current_stream(self.device) if self._on_gpu else None
        try:
            return self._pipeline.run(stream)[0]
        except Exception as error:
            raise self._explain(error, step) from None

    def _at_end(self) -> bool:
        """Let the pipeline see the end of the epoch, so that it can be reset."""
        try:
            self._pipeline.run()
        except StopIteration:
            return True
        return False

    def _batch(self, step: int, output) -> Batch:
        images = torch.from_dlpack(output.as_tensor())
        rows = self._rows(step)
        device_of = lambda array: torch.from_numpy(array).to(self.device, non_blocking=True)  # noqa: E731
        # DALI writes [B, S, S, C]: as [B, C, S, S] that is channels-last, and no byte moves.
        return Batch(
            images.permute(0, 3, 1, 2).to(self.dtype),
            device_of(self.targets(self._epoch, rows)),
            device_of(self.faces.labels[rows]),
            device_of(rows),
        )

    def _explain(self, error: Exception, step: int) -> UserError:
        """What went wrong in DALI's threads, in one line, with the image where one is to blame."""
        if isinstance(self._fault, UserError):
            return self._fault
        if not self.source.in_memory:
            # DALI prefetches: the culprit is in this batch or in one of the next.
            ahead = self._order[step * self.batch_size : (step + 4) * self.batch_size]
            for row in ahead:
                try:
                    decode_image(self.faces.paths[row])
                except UserError as fault:
                    return fault
        return UserError(f"DALI stopped in epoch {self._epoch}, step {step}: {_reason(error)}; try --feed torch")

    def _build(self):
        from nvidia.dali import Pipeline, fn, math, types

        mixed = "mixed" if self._on_gpu else "cpu"
        augmented = self.augment is not None
        pipeline = Pipeline(
            self.batch_size,
            max(1, self.num_workers),
            self._device_id(),
            seed=0,
            prefetch_queue_depth=2,
        )
        with pipeline:
            count = 1 + augmented
            inputs = fn.external_source(
                source=self._source,
                num_outputs=count,
                batch=True,
                batch_info=True,
                dtype=[types.UINT8, types.FLOAT][:count],
                ndim=[3 if self.source.in_memory else 1, 1][:count],
                layout=["HWC" if self.source.in_memory else "", ""][:count],
            )
            images = inputs[0]
            height, width = self.source.height, self.source.width
            if not self.source.in_memory:
                kind = types.GRAY if self.source.channels == 1 else types.RGB
                # The other feeds' decoder interpolates the color of JPEGs; on a GPU DALI's repeats it unless asked.
                images = fn.decoders.image(images, device=mixed, output_type=kind, jpeg_fancy_upsampling=True)
                images = fn.resize(images, size=(height, width), interp_type=types.INTERP_LINEAR, antialias=True)
            elif self._on_gpu:
                images = images.gpu()
            size = (float(self.image_size), float(self.image_size))
            if augmented:
                p = inputs[1]  # the columns of view_parameters
                images = fn.warp_affine(
                    images,
                    matrix=fn.reshape(p[:6], shape=[2, 3]),
                    size=size,
                    interp_type=types.INTERP_LINEAR,
                    inverse_map=True,
                    dtype=types.FLOAT,
                )
                images = math.clamp(images * p[6] + p[7] * 255.0, 0.0, 255.0)
            else:
                images = fn.resize(
                    images, size=size, interp_type=types.INTERP_LINEAR, antialias=False, dtype=types.FLOAT
                )
            if self.channels != self.source.channels:
                images = fn.cat(*[images] * self.channels, axis=2)
            mean, std = ([255 * value for value in values] for values in (self.mean, self.std))
            if augmented:
                # After the channels: each has a mean of its own.
                images = fn.erase(images, anchor=p[8:10], shape=p[10:], axes=(1, 0), fill_value=mean)
            images = fn.crop_mirror_normalize(
                images,
                dtype=types.FLOAT if self.dtype == torch.float32 else types.FLOAT16,
                output_layout="HWC",
                mean=mean,
                std=std,
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _source(self, info):
        """One batch for DALI: pixels or encoded files, and the parameters of its views."""
        step = self._start + info.iteration
        if step >= self.steps_per_epoch:
            raise StopIteration
        rows = self._rows(step)
        try:
            return self._inputs(rows)
        except Exception as error:
            # DALI wraps what a source raises in a text of its own.
            self._fault = error
            raise

    def _inputs(self, rows: np.ndarray):
        pixels = self.source.take(rows) if self.source.in_memory else list(self._pool.map(self._read, rows))
        if self.augment is None:
            return (pixels,)
        extent = (self.source.height, self.source.width)
        p = view_parameters(self.augment, self.key, self._epoch, rows, extent, self.image_size)
        # DALI's pixel centres lie at halves, ours at whole numbers; its box has an extent, ours a second corner.
        p[:, 2] += 0.5 - 0.5 * (p[:, 0] + p[:, 1])
        p[:, 5] += 0.5 - 0.5 * (p[:, 3] + p[:, 4])
        p[:, 10:] -= p[:, 8:10]
        return pixels, p

    def _read(self, row: int) -> np.ndarray:
        path = self.faces.paths[row]
        if not self._judged[row]:
            with open_image(path):  # or DALI would decode whatever the header promises
                self._judged[row] = True
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); is --image-root right?") from None
        if not content:
            raise UserError(f"{path}: not a readable image (empty file); --skip-bad leaves such images out")
        if not content.startswith(_DECODED_BY_DALI):
            image = decode_image(path, grey=self.source.grey)
            height, width = image.shape[:2]
            content = b"P%d %d %d 255\n" % (5 if self.source.grey else 6, width, height) + image.tobytes()
        return np.frombuffer(content, np.uint8)


def _reason(error: Exception) -> str:
    """The line that says what went wrong: DALI tells first where in the pipeline."""
    told = str(error).partition("encountered:")[2] or str(error)
    return next((line.strip() for line in told.splitlines() if line.strip()), type(error).__name__)
