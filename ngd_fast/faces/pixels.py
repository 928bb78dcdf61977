"""Source pixels of a dataset as one shape of uint8: what every feed cuts its views from."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ngd_fast.console import say
from ngd_fast.errors import UserError
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.images import decode_image, map_images, resize_images, to_grey

DECODE_RATIO = 8 / 7
"""Larger images are first reduced to this multiple of the output's side (224 -> 256), with antialiasing: views are then
cut by plain bilinear sampling without aliasing, and every feed starts from the same pixels."""


def source_shape(faces: Faces, image_size: int, *, grey: bool = False) -> tuple[int, int, int]:
    """(height, width, channels) of the pixels that views of ``image_size`` are cut from."""
    limit = math.ceil(image_size * DECODE_RATIO)
    if faces.images is None:
        side = faces.longest_side(limit)
        return side, side, 1 if grey else 3
    height, width = faces.images.shape[1:3]
    channels = 1 if grey or faces.images.ndim == 3 else 3
    return (limit, limit, channels) if max(height, width) > limit else (height, width, channels)


class SourcePixels:
    """uint8 [N, height, width, channels] of a dataset, decoded on demand where it is given as paths.

    ``grey`` turns colour into luma (a network trained on grey faces should see grey ones). Larger images than
    8/7 of ``image_size`` are reduced to a square of that. Path data become square too, of the largest image's longer
    side or that limit.
    """

    def __init__(self, faces: Faces, image_size: int, *, grey: bool = False):
        self.faces = faces
        self.grey = grey
        self.height, self.width, self.channels = source_shape(faces, image_size, grey=grey)
        self._images = None
        if faces.images is not None:
            images = to_grey(faces.images) if grey and faces.images.ndim == 4 else faces.images
            if images.shape[1:3] != (self.height, self.width):
                images = resize_images(images, self.width)
            self._images = images if images.ndim == 4 else images[..., None]

    def for_size(self, image_size: int) -> "SourcePixels":
        """The source of views of ``image_size``: itself where that is cut from the same pixels."""
        same = source_shape(self.faces, image_size, grey=self.grey) == (self.height, self.width, self.channels)
        return self if same else SourcePixels(self.faces, image_size, grey=self.grey)

    def __len__(self) -> int:
        return len(self.faces)

    @property
    def in_memory(self) -> bool:
        """Whether the pixels are in memory already."""
        return self._images is not None

    @property
    def num_bytes(self) -> int:
        """Memory that all pixels take."""
        return len(self) * self.height * self.width * self.channels

    def take(self, rows: np.ndarray, pool: ThreadPoolExecutor | None = None) -> np.ndarray:
        """uint8 [B, height, width, channels] of the given rows; ``pool`` decodes in parallel."""
        if self._images is not None:
            return self._images[rows]
        images = (map if pool is None else pool.map)(self._decode, rows)
        return np.stack(list(images))

    def load_all(self, workers: int = 4) -> np.ndarray:
        """All rows. Path data are decoded in threads, with progress."""
        if self._images is None:
            images = np.empty((len(self), self.height, self.width, self.channels), np.uint8)

            def fill(row: int) -> None:
                images[row] = self._decode(row)

            map_images(fill, range(len(self)), desc="decoding faces", workers=workers)
            self._images = images
        return self._images

    def _decode(self, row: int) -> np.ndarray:
        image = decode_image(self.faces.paths[row], grey=self.grey, side=self.width)
        return image if image.ndim == 3 else image[..., None]


def drop_unreadable(faces: Faces, workers: int = 4) -> Faces:
    """Decode every image once; the faces that can be read. Says how many cannot, and the first of them.

    Raises UserError when none can be read.
    """
    if faces.paths is None:
        return faces

    def readable(path: str) -> bool:
        try:
            decode_image(path)
        except UserError:
            return False
        return True

    good = np.array(map_images(readable, faces.paths, desc="checking images", workers=workers), bool)
    if not good.any():
        raise UserError(f"{faces.source}: none of its {len(faces)} images can be read, first {faces.paths[0]}")
    if good.all():
        return faces
    first = faces.paths[int(np.argmin(good))]
    say(f"{faces.source}: left out {int((~good).sum())} unreadable images, first {first}")
    return faces.subset(good)
