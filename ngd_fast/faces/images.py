"""Decoding image files. Faces live as uint8 arrays [H, W] (grey) or [H, W, 3] (RGB)."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ngd_fast.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif")
IMAGE_SUFFIXES += (".pgm", ".ppm", ".pbm", ".pnm")
"""Of the formats that Pillow reads those that hold pictures; of several frames the first is taken."""


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
    from PIL import Image

    longest = 1
    for path in paths:
        try:
            with Image.open(path) as image:
                longest = max(longest, *image.size)
        except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError):
            continue
        if longest >= limit:
            return limit
    return longest


def decode_image(
    path: str | Path, *, grey: bool = False, side: int | None = None, box: Sequence[float] | None = None
) -> np.ndarray:
    """Decode one image to uint8 [H, W, 3], or [H, W] with ``grey`` (ITU-R 601 luma), upright as its EXIF tag says.

    box   (left, top, right, bottom) in pixels: only this part; what lies beyond the border is black
    side  resize to side x side with a triangle filter that widens when it shrinks (antialiased)
    Raises UserError naming the file when it is missing or no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode == "F":  # of unknown range: 0 to 1 would come out black
                raise ValueError("pixels are floating-point numbers, must be integers")
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16-bit PNG: PIL would clip, not scale
                image = image.point(lambda value: value / 256)
            image = image.convert("L" if grey else "RGB")
            if box is not None:
                image = image.crop(tuple(round(edge) for edge in box))
            if side is not None and image.size != (side, side):
                image = image.resize((side, side), Image.Resampling.BILINEAR)
            return np.array(image)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such image; if the paths are relative to another folder, give --image-root"
        ) from None
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        # RuntimeError: what Pillow raises for a damaged AVIF.
        raise UserError(f"{path}: not a readable image ({error}); --skip-bad leaves such images out") from None


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

    images = np.empty((len(paths), side, side) if grey else (len(paths), side, side, 3), np.uint8)

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
