"""Decoding image files. Faces live as uint8 arrays [H, W] (grey) or [H, W, 3] (RGB)."""

import contextlib
import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ngd_fast.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif")
IMAGE_SUFFIXES += (".pgm", ".ppm", ".pbm", ".pnm")
"""Of the formats that Pillow reads those that hold pictures; of several frames the first is taken."""

_FORMATS = ("PNG", "JPEG", "JPEG2000", "BMP", "DIB", "GIF", "TIFF", "WEBP", "AVIF", "PPM")
"""Pillow goes by the content, not the name, and starts a program (Ghostscript) for a picture in PostScript."""

MAX_PIXELS = 1 << 28
"""The largest cameras for sale make 200 million."""
_FREE_PIXELS, _PIXELS_PER_BYTE = 1 << 25, 200
"""An image above 33 million pixels must have a byte for 200 of them: photographs have one for 2 to 30."""


@functools.cache
def _formats() -> list[str]:
    """Those that this Pillow has: AVIF is in the newer ones, and one that is not there ends the search at its place."""
    from PIL import Image

    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def list_images(folder: str | Path, *, deep: bool = True) -> tuple[list[Path], Counter]:
    """Image files in a folder, sorted, with ``deep`` those in its subfolders too; and the other files by suffix.

    Hidden files and folders count as neither: .DS_Store, and the ._NAME.jpg that macOS puts beside every picture.
    """
    images, others = [], Counter()
    for place, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if deep and not name.startswith(".")]
        for path in (Path(place, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                images.append(path)
            else:
                others[path.suffix.lower() or "without a suffix"] += 1
    return sorted(images), others


def describe_suffixes(counts: Counter) -> str:
    """ "12 .npy, 1 .txt": the usual ones first."""
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def longest_side(paths: Sequence[str], limit: int) -> int:
    """Longer side, in pixels, of the largest image; ``limit`` as soon as one is as long. Only headers are read.

    Unreadable files are passed over: decoding them names them.
    """
    longest = 1
    for path in paths:
        try:
            with open_image(path) as image:
                longest = max(longest, *image.size)
        except UserError:
            continue
        if longest >= limit:
            return limit
    return longest


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator["Image.Image"]:
    """The image in ``path``, of which only the header is read yet; UserError for whatever is wrong with the file."""
    from PIL import Image

    # Its own limit is below the largest photographs, and at half of it already it warns those who can do nothing.
    Image.MAX_IMAGE_PIXELS = max(2 * MAX_PIXELS, Image.MAX_IMAGE_PIXELS or 0)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("no file")  # a pipe would be waited for
        with open(path, "rb") as file, Image.open(file, formats=_formats()) as image:
            pixels = image.width * image.height
            if pixels > min(MAX_PIXELS, max(_FREE_PIXELS, _PIXELS_PER_BYTE * os.fstat(file.fileno()).st_size)):
                raise ValueError(f"its header promises {image.width} x {image.height} pixels")
            yield image
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such image; if the paths are relative to another folder, give --image-root"
        ) from None
    except Exception as error:  # a damaged image provokes anything in Pillow, from struct.error to MemoryError
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason}); --skip-bad leaves such images out") from None


def decode_image(
    path: str | Path, *, grey: bool = False, side: int | None = None, box: Sequence[float] | None = None
) -> np.ndarray:
    """Decode one image to uint8 [H, W, 3], or [H, W] with ``grey`` (ITU-R 601 luma), upright as its EXIF tag says.

    box   (left, top, right, bottom) in pixels: only this part; what lies beyond the border is black
    side  resize to side x side with a triangle filter that widens when it shrinks (antialiased)
    Raises UserError naming the file when it is missing, no image, or of more pixels than a file of its size holds.
    """
    from PIL import Image, ImageOps

    with open_image(path) as image:
        if image.mode == "F":  # of unknown range: 0 to 1 would come out black
            raise ValueError("pixels are floating-point numbers, must be integers")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit PNG: PIL would clip, not scale
            image = image.point(lambda value: value / 256)
        image = image.convert("L" if grey else "RGB")
        if box is not None:
            left, top, right, bottom = (round(edge) for edge in box)
            if not 0 < (right - left) * (bottom - top) <= max(16 * image.width * image.height, 1 << 20):
                raise ValueError(f"no box of a face in {image.width} x {image.height}: {left, top, right, bottom}")
            image = image.crop((left, top, right, bottom))
        if side is not None and image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.BILINEAR)
        return np.array(image)


def resize_images(images: np.ndarray, side: int) -> np.ndarray:
    """Resize uint8 [N, H, W] or [N, H, W, 3] to [N, side, side(, 3)], as :func:`decode_image` does."""
    from PIL import Image

    out = np.empty((len(images), side, side, *images.shape[3:]), np.uint8)
    for i, image in enumerate(images):
        out[i] = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    return out


def to_grey(images: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma of uint8 [..., 3], rounded as PIL's convert("L") does."""
    weights = np.array([19595, 38470, 7471], np.uint32)
    grey = np.empty(images.shape[:-1], np.uint8)
    for start in range(0, len(images), 16):  # in 32 bits, all at once would take four times the images' memory
        part = slice(start, start + 16)
        grey[part] = (images[part].astype(np.uint32) @ weights + 0x8000) >> 16
    return grey


def map_images(function: Callable, items: Sequence, *, desc: str, workers: int = 4, show: bool = True) -> list:
    """``[function(item) for item in items]`` in threads (decoding releases the GIL), in order, with progress."""
    from ngd_fast.console import progress

    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = pool.map(function, items)
        return list(progress(results, desc=desc, total=len(items), unit="image") if show else results)


def decode_all(
    paths: Sequence[str],
    *,
    side: int,
    grey: bool = False,
    boxes: Sequence | None = None,
    skip_bad: bool = False,
    desc: str = "reading images",
) -> tuple[np.ndarray, np.ndarray]:
    """Decode, cut and resize every image -> uint8 [M, side, side(, 3)] and the rows (int64 [M]) that they come from.

    An unreadable image is a UserError; with ``skip_bad`` it is left out, and the number of such images is said.
    """
    from ngd_fast.console import say

    shape = (len(paths), side, side) if grey else (len(paths), side, side, 3)
    try:
        images = np.empty(shape, np.uint8)
    except MemoryError:
        size = f"{math.prod(shape) / 1e9:,.1f} GB"
        raise UserError(f"{desc}: {len(paths)} images of {side} x {side} take {size}, more than is free") from None

    def work(row: int) -> bool:
        try:
            images[row] = decode_image(paths[row], grey=grey, side=side, box=boxes[row] if boxes else None)
        except UserError:
            if not skip_bad:
                raise
            return False
        return True

    good = np.array(map_images(work, range(len(paths)), desc=desc), bool)
    rows = np.flatnonzero(good)
    if not len(rows):
        raise UserError(f"{desc}: none of the {len(paths)} images can be read, first {paths[0]}")
    if good.all():
        return images, rows
    say(f"{desc}: left out {len(paths) - len(rows)} unreadable images, first {paths[int(np.argmin(good))]}")
    return images[rows], rows
