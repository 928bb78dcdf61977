"""Videos written here, read and classified frame by frame."""

import csv
import json
import struct

import numpy as np
import pytest
import torch

from ngd_fast.cli import main
from ngd_fast.errors import UserError
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.detection import FaceBox
from ngd_fast.faces.tracks import Smoothing
from ngd_fast.faces.video import Frame, VideoWriter, as_frames, read_frames
from ngd_fast.student.inference import predict
from ngd_fast.student.networks import build_student
from ngd_fast.student.video import Classifier, predict_frames
from ngd_fast.student.weights import save_student

av = pytest.importorskip("av")


def pictures(count, height=64, width=96):
    """A bright square that wanders over grey, told apart by its place."""
    images = np.full((count, height, width, 3), 90, np.uint8)
    for i, image in enumerate(images):
        image[8:24, 4 + i : 20 + i] = (250, 40, 40)
    return images


def write(path, images, times, kind="mp4"):
    writer = VideoWriter(path, kind)
    for image, time in zip(images, times):
        writer.write(image, time)
    writer.close()
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Thirty frames with uneven times."""
    times = np.cumsum([0.0, *([0.04] * 10), *([0.1] * 19)])
    return write(tmp_path_factory.mktemp("film") / "film.mp4", pictures(30), times), times


def test_frames_and_their_own_times(film):
    path, times = film
    frames = list(read_frames(path))
    assert [f.index for f in frames] == list(range(30))
    np.testing.assert_allclose([f.time for f in frames], times, atol=2e-3)
    for frame, image in zip(frames, pictures(30)):
        assert np.abs(frame.image.astype(int) - image).mean() < 6


def test_every_and_fps(film):
    path, times = film
    assert [f.index for f in read_frames(path, every=7)] == [0, 7, 14, 21, 28]
    chosen = [f.index for f in read_frames(path, fps=5)]
    want, due = [], 0.0
    for i, t in enumerate(times):
        if t >= due - 1e-3:
            want.append(i)
            due = (np.floor((t + 1e-3) * 5) + 1) / 5
    assert chosen == want
    assert [f.index for f in read_frames(path, fps=1000)] == list(range(30))


def turned(path, target, matrix):
    """A copy whose track header asks players to turn the picture."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4
    at += 4 + (32 if content[at] else 20) + 16
    assert struct.unpack(">9i", content[at : at + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    content[at : at + 36] = struct.pack(">9i", *matrix)
    target.write_bytes(content)
    return target


@pytest.mark.parametrize(
    ("degrees", "matrix"), [(90, (0, 65536, 0, -65536, 0, 0)), (180, (-65536, 0, 0, 0, -65536, 0))]
)
def test_a_turned_video_comes_upright(film, tmp_path, degrees, matrix):
    """The matrix of a telephone held upright turns the picture clockwise by ``degrees``."""
    path = turned(film[0], tmp_path / "turned.mp4", (*matrix, 0, 0, 1 << 30))
    frame = next(read_frames(path))
    want = np.rot90(pictures(1)[0], -degrees // 90)
    assert frame.image.shape == want.shape
    assert np.abs(frame.image.astype(int) - want).mean() < 8


def test_a_truncated_file_gives_the_frames_before_and_a_line(tmp_path, capsys):
    whole = write(tmp_path / "a.mkv", np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8),
                  np.arange(40) / 10, "matroska")  # fmt: skip
    content = whole.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    frames = list(read_frames(tmp_path / "cut.mkv"))
    assert 10 < len([f for f in frames if f.image is not None]) < 35
    said = capsys.readouterr().err
    assert "cut.mkv" in said


def test_damage_in_the_middle_loses_no_frame(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8)
    path = tmp_path / "a.mkv"
    container = av.open(str(path), "w", format="matroska")
    stream = container.add_stream("mjpeg", rate=10)
    stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p"
    packets = [p for i in images for p in stream.encode(av.VideoFrame.from_ndarray(i, format="rgb24"))]
    for packet in packets + stream.encode(None):
        container.mux(packet)
    container.close()
    content = bytearray(path.read_bytes())
    starts = [i for i in range(len(content) - 2) if content[i : i + 3] == b"\xff\xd8\xff"]
    assert len(starts) == 40
    content[starts[20] : starts[20] + 600] = bytes(600)
    path.write_bytes(content)
    frames = list(read_frames(path))
    assert [f.index for f in frames] == list(range(40))
    assert frames[20].problem == "damaged"
    assert all(f.image is not None and not f.problem for f in frames if f.index != 20)
    rows = list(predict_frames(frames, lambda faces: np.full((len(faces), 2), 0.5), 16))
    assert [r.frame for r in rows] == list(range(40))
    assert rows[20].note == "damaged"


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
def test_what_is_no_video(tmp_path, content):
    (tmp_path / "x.mp4").write_bytes(content)
    with pytest.raises(UserError, match="not a readable video"):
        list(read_frames(tmp_path / "x.mp4"))
    with pytest.raises(UserError, match="not a readable video"):
        list(read_frames(tmp_path / "missing.mp4"))


def colour_of(faces):
    """Class 1 for red faces, class 0 for others."""
    red = faces[..., 0].mean((1, 2)) - faces[..., 1].mean((1, 2)) > 50
    return np.where(red[:, None], [0.1, 0.9], [0.8, 0.2])


def plain(colour, count):
    return [Frame(i, i / 25, np.full((20, 20, 3), colour, np.uint8)) for i in range(count)]


def test_nothing_leaks_across_tracks():
    """Two faces side by side of different class; each keeps its own, whatever the window."""
    def detect(image):
        return [FaceBox(0, 0, 20, 20, 0.9), FaceBox(30, 0, 20, 20, 0.9)]

    image = np.zeros((20, 50, 3), np.uint8)
    image[:, 30:] = (200, 0, 0)
    frames = [Frame(i, i / 25, image) for i in range(12)]
    rows = list(predict_frames(frames, colour_of, 16, detector=detect, smoothing=Smoothing(window=7)))
    assert len(rows) == 24
    for row in rows:
        np.testing.assert_allclose(row.smoothed, [0.1, 0.9] if row.track else [0.8, 0.2])


def test_a_gap_of_more_than_a_second_ends_a_track():
    grey, red = plain(90, 5), plain((200, 0, 0), 5)
    late = [Frame(5 + i, 3 + f.time, f.image) for i, f in enumerate(red)]
    between = [Frame(100, 1.5, None, "damaged")]
    rows = list(predict_frames([*grey, *between, *late], colour_of, 16, smoothing=Smoothing(window=9)))
    assert [r.track for r in rows] == [0] * 5 + [None] + [1] * 5
    np.testing.assert_allclose([r.smoothed for r in rows[:5]], np.tile([0.8, 0.2], (5, 1)))
    np.testing.assert_allclose([r.smoothed for r in rows[6:]], np.tile([0.1, 0.9], (5, 1)))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_rows_come_in_order_whatever_the_batch(batch_size):
    frames = [*plain(90, 7), Frame(7, 0.28, None, "damaged"), *(Frame(8 + i, 0.3 + i / 25, f.image) for i, f in
              enumerate(plain((200, 0, 0), 9)))]  # fmt: skip
    rows = list(predict_frames(frames, colour_of, 16, smoothing=Smoothing(window=5), batch_size=batch_size))
    assert [r.frame for r in rows] == list(range(17))
    values = np.array([r.raw for r in rows if r.track is not None])
    want = [values[max(0, i - 2) : i + 3].mean(0) for i in range(16)]
    np.testing.assert_allclose([r.smoothed for r in rows if r.track is not None], want)


def test_what_is_held_does_not_grow_with_the_video():
    """One face, then an hour without any: rows come out all along."""
    frames = (Frame(i, i / 25, np.zeros((4, 4, 3), np.uint8)) for i in range(90_000))
    seen = iter(range(90_000))
    detect = lambda image: [FaceBox(0, 0, 4, 4, 1.0)] if next(seen) == 3 else []  # noqa: E731
    most = 0
    taken = 0

    def counted():
        nonlocal taken
        for frame in frames:
            taken += 1
            yield frame

    for row in predict_frames(counted(), colour_of, 4, detector=detect, smoothing=Smoothing(window=15)):
        most = max(most, taken - row.frame)
    assert most < 500


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    torch.manual_seed(0)
    meta = {"arch": "resnet18-w8", "class_names": CLASS_NAMES, "image_size": 24, "mean": 0.5, "std": 0.25,
            "embedding_dim": 256, "logit_scale": 8.0}  # fmt: skip
    path = tmp_path_factory.mktemp("student") / "student_best.safetensors"
    save_student(path, build_student("resnet18-w8", logit_scale=8.0).state_dict(), meta)
    return path


@pytest.mark.parametrize("grey", [False, True])
def test_a_frame_is_classified_as_the_picture_is(student, grey):
    from ngd_fast.student.weights import load_student

    module, meta = load_student(student)
    meta = meta | {"grey": grey}
    images = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)
    want = predict(module, meta, Faces(images=images), feed="torch").probabilities()
    classify = Classifier(module, meta, precision="fp32")
    np.testing.assert_allclose(classify(images), want, atol=1e-5)
    rows = list(predict_frames(as_frames(images, 10), classify, 24))
    np.testing.assert_allclose([r.raw for r in rows], want, atol=1e-5)
    assert [r.time for r in rows] == [0, 0.1, 0.2, 0.3, 0.4]


def call(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code


def test_the_command_in_every_form(film, student, tmp_path, capsys):
    common = ["predict-video", film[0], "--ckpt", student, "--no-detect", "--precision", "fp32", "--smooth", "window:3"]
    assert call(*common, "--out", tmp_path / "a.csv", "--summary", "--timeline", tmp_path / "t.png",
                "--annotate", tmp_path / "b.mp4") == 0  # fmt: skip
    shown = capsys.readouterr()
    assert "30 frames" in shown.err
    assert "switches/min" in shown.out
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [int(r["frame"]) for r in rows] == list(range(30))
    for row in rows:
        assert sum(float(row[name]) for name in CLASS_NAMES) == pytest.approx(1, abs=1e-5)
    raw = np.array([[float(r[f"raw_{name}"]) for name in CLASS_NAMES] for r in rows])
    smoothed = np.array([[float(r[name]) for name in CLASS_NAMES] for r in rows])
    np.testing.assert_allclose(smoothed[5], raw[4:7].mean(0), atol=2e-6)
    assert (tmp_path / "t.png").stat().st_size > 1000
    drawn = list(read_frames(tmp_path / "b.mp4"))
    np.testing.assert_allclose([f.time for f in drawn], film[1], atol=3e-3)
    assert np.abs(drawn[3].image.astype(int) - pictures(30)[3]).max() > 50, "a box and a text"
    assert call(*common, "--out", tmp_path / "a.jsonl") == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [str(line["confidence"]) for line in lines] == [r["confidence"] for r in rows]


def test_parquet(film, student, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    common = ["predict-video", film[0], "--ckpt", student, "--no-detect", "--out", tmp_path / "a.parquet", "--fps", 4]
    assert call(*common, "--annotate", tmp_path / "b.mkv") == 0
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.num_rows == len(list(read_frames(film[0], fps=4)))
    assert set(CLASS_NAMES) <= set(table.column_names)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--out", "x.txt"], ".csv or .jsonl or .parquet"), (["--out", "x.csv", "--smooth", "window:2"], "odd N"),
     (["--out", "x.csv", "--every", 2, "--fps", 3], "give one of them"),
     (["--out", "x.csv", "--annotate", "x.avi"], ".mp4 or .mkv")],
)  # fmt: skip
def test_bad_input_is_a_line_and_nothing_is_written(film, student, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert call("predict-video", film[0], "--ckpt", student, "--no-detect", *arguments) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_video_leaves_nothing(student, tmp_path, capsys):
    (tmp_path / "x.mp4").write_bytes(b"x" * 1000)
    assert call("predict-video", tmp_path / "x.mp4", "--ckpt", student, "--no-detect", "--out", tmp_path / "o.csv") == 2
    assert "not a readable video" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]
