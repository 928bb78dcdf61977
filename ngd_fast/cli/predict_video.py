"""``ngd-fast predict-video``."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from ngd_fast.cli.checkpoints import Checkpoint, ckpt_option, device_option, raw_option
from ngd_fast.console import print_table, progress, say
from ngd_fast.errors import UserError

_CONTAINERS = {".mp4": "mp4", ".mkv": "matroska"}
_MOST_TRACKS = 12


@click.command("predict-video")
@click.argument("source")
@ckpt_option
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="Table: .csv, .parquet or .jsonl.")
@click.option("--every", type=click.IntRange(1), default=1, show_default=True, help="Take every N-th frame.")
@click.option("--fps", type=click.FloatRange(0, min_open=True), help="Take so many frames of each second instead.")
@click.option("--detect/--no-detect", default=True, show_default=True,
              help="Find faces first (needs the detect extra); without, each frame is one cropped face.")  # fmt: skip
@click.option("--margin", type=click.FloatRange(0, 2), default=0.0, show_default=True,
              help="Room on every side of a face's box, as a share of the box's longer side.")  # fmt: skip
@click.option("--smooth", default="window:15", show_default=True,
              help="Along a track: none, window:N (mean over the N about each), ema:A (for cameras).")  # fmt: skip
@click.option("--annotate", type=click.Path(dir_okay=False), help="Video with boxes and classes to write (.mp4, .mkv).")
@click.option("--timeline", type=click.Path(dir_okay=False), help="Picture of probabilities over time (.png, .pdf).")
@click.option("--summary", is_flag=True, help="Print each track's share of time per class, and switches a minute.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Faces classified at once.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True)
@raw_option
@device_option
def command(source, ckpt, out, every, fps, detect, margin, smooth, annotate, timeline, summary, batch_size, precision,
            raw, device):  # fmt: skip
    """Classify the faces in a video: SOURCE is a file, or camera:0.

    Written is a row for each face of each frame: frame, time (seconds), track (a face linked over frames), its box in
    pixels of the upright frame, top_class, confidence, each class's smoothed probability and, as raw_CLASS, the one
    seen in that frame. Frames without a face and damaged ones have a row that says so. With --no-detect and a camera
    give --batch-size 1 for the least delay.

    Research use only: not for diagnosis, identification or surveillance.
    """
    from ngd_fast.artifacts.files import atomic_path
    from ngd_fast.artifacts.rows import KINDS, read_rows, row_writer
    from ngd_fast.devices import pick_device
    from ngd_fast.faces.tracks import Smoothing
    from ngd_fast.faces.video import CAMERA, read_frames
    from ngd_fast.student.video import Classifier, predict_frames

    smoothing, camera = Smoothing.parse(smooth), source.startswith(CAMERA)
    kind = _suffix("--out", out, KINDS)
    if annotate:
        _suffix("--annotate", annotate, _CONTAINERS)
        if camera:
            raise UserError("--annotate reads the video a second time; record the camera first")
    if timeline:
        _suffix("--timeline", timeline, {".png": "png", ".pdf": "pdf", ".svg": "svg"})
    if fps is not None and every > 1:
        raise UserError("--every and --fps both choose frames; give one of them")
    detector = _detector() if detect else None
    student = Checkpoint.open(ckpt, raw=raw)
    names = tuple(student.meta["class_names"])
    classify = Classifier(student.module, student.meta, device=pick_device(device), precision=precision,
                          calibration=student.calibration)  # fmt: skip
    rows = predict_frames(
        read_frames(source, every=every, fps=fps), classify, student.meta["image_size"], detector=detector,
        margin=margin, smoothing=smoothing, batch_size=batch_size,
    )  # fmt: skip
    account, started = _Account(names), time.perf_counter()
    with atomic_path(out) as temporary:
        with contextlib.closing(row_writer(temporary, kind, _columns(names))) as writer:
            try:
                for row in progress(rows, desc=f"{Path(source).name}", unit="row"):
                    writer.write(_values(row, names))
                    account.add(row)
            except KeyboardInterrupt:  # how a camera is stopped: what was seen so far is kept
                if not camera:
                    raise
    seconds = time.perf_counter() - started
    say(
        f"{account.frames} frames ({account.frames / seconds:.1f} a second), {account.faces} faces in "
        f"{len(account.tracks)} tracks, {account.without} frames without a face, {account.damaged} damaged; wrote {out}"
    )
    if summary:
        account.print()
    if timeline:
        account.draw(timeline)
    if annotate:
        _annotate(annotate, read_frames(source, every=every, fps=fps), read_rows(out, kind))
        say(f"wrote {annotate}")


def _suffix(option: str, path: str, kinds: dict[str, str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in kinds:
        raise UserError(f"{option} {path}: its name must end in {' or '.join(kinds)}")
    return kinds[suffix]


def _detector():
    from ngd_fast.faces.detection import FaceDetector

    return FaceDetector()


class _Account:
    """What is said at the end; its size depends on the number of tracks alone."""

    def __init__(self, names):
        self.names = names
        self.frames = self.faces = self.without = self.damaged = 0
        self.tracks: dict[int, dict] = {}
        self._last_frame = -1

    def add(self, row) -> None:
        from ngd_fast.evaluation.figures_video import Timeline

        if row.frame != self._last_frame:
            self.frames += 1
            self._last_frame = row.frame
        self.damaged += row.note == "damaged" and row.track is None
        self.without += row.note == "no face"
        if row.track is None:
            return
        self.faces += 1
        new = {"counts": np.zeros(len(self.names)), "first": row.time, "said": None, "switches": [0, 0],
               "timeline": Timeline()}  # fmt: skip
        track = self.tracks.setdefault(row.track, new)
        said = (int(row.raw.argmax()), int(row.smoothed.argmax()))
        track["counts"][said[1]] += 1
        if track["said"] is not None:
            track["switches"] = [n + (a != b) for n, a, b in zip(track["switches"], said, track["said"])]
        track["said"], track["last"] = said, row.time
        track["timeline"].add(row.time, row.raw, row.smoothed)

    def print(self) -> None:
        rows = []
        for number, track in self.tracks.items():
            minutes = (track["last"] - track["first"]) / 60
            rate = [f"{n / minutes:.1f}" if minutes else "" for n in track["switches"]]
            shares = track["counts"] / track["counts"].sum()
            rows.append([number, f"{track['first']:.1f}", f"{60 * minutes:.1f}", int(track["counts"].sum()),
                         *(f"{100 * share:.0f}" for share in shares), *rate])  # fmt: skip
        head = ["track", "from, s", "lasts, s", "faces", *(f"{name} %" for name in self.names)]
        print_table([*head, "switches/min raw", "smoothed"], rows, title="share of faces by smoothed class")

    def draw(self, path: str) -> None:
        from ngd_fast.artifacts.figure_style import render
        from ngd_fast.artifacts.files import atomic_path
        from ngd_fast.evaluation.figures_video import timeline_figure

        longest = sorted(self.tracks, key=lambda n: -self.tracks[n]["counts"].sum())[:_MOST_TRACKS]
        if not longest:
            return say(f"{path}: not drawn, no face was found")
        figure = timeline_figure([(n, self.tracks[n]["timeline"]) for n in sorted(longest)], self.names)
        with atomic_path(path) as temporary:
            temporary.write_bytes(render(figure, Path(path).suffix[1:].lower()))
        more = f", the {_MOST_TRACKS} longest of {len(self.tracks)} tracks" if len(self.tracks) > _MOST_TRACKS else ""
        say(f"wrote {path}{more}")


_BOX = ("x", "y", "width", "height", "score")


def _columns(names) -> dict[str, type]:
    numbers = [*(f"face_{name}" for name in _BOX), "confidence", *names, *(f"raw_{name}" for name in names)]
    head = {"frame": int, "time": float, "track": int, "note": str, "top_class": str}
    return head | dict.fromkeys(numbers, float)


def _values(row, names) -> list:
    if row.track is None:
        return [row.frame, round(row.time, 6), None, row.note, *[None] * (len(_BOX) + 2 + 2 * len(names))]
    box = [round(getattr(row.box, name), 3 if name == "score" else 1) for name in _BOX]
    smoothed, raw = ([round(float(p), 6) for p in values] for values in (row.smoothed, row.raw))
    best = int(row.smoothed.argmax())
    return [row.frame, round(row.time, 6), row.track, row.note, names[best], *box, smoothed[best], *smoothed, *raw]


def _annotate(path: str, frames, rows: Iterator[dict]) -> None:
    """The frames once more, with what the table says about each drawn on it."""
    from PIL import Image, ImageDraw

    from ngd_fast.artifacts.figure_style import color_of
    from ngd_fast.artifacts.files import atomic_path
    from ngd_fast.faces.video import VideoWriter

    row = next(rows, None)
    with atomic_path(path) as temporary:
        with contextlib.closing(VideoWriter(temporary, _CONTAINERS[Path(path).suffix.lower()])) as writer:
            for frame in progress(frames, desc="annotating", unit="frame"):
                here = []
                while row is not None and int(row["frame"]) <= frame.index:
                    here.append(row)
                    row = next(rows, None)
                if frame.image is None:
                    continue
                image = Image.fromarray(frame.image)
                draw = ImageDraw.Draw(image)
                for face in here:
                    if face["track"] in (None, ""):
                        continue
                    left, top, width, height = (float(face[f"face_{name}"]) for name in _BOX[:4])
                    color = color_of(1 + int(face["track"]) % 7)
                    line = max(1, round(min(image.size) / 240))
                    draw.rectangle([left, top, left + width - 1, top + height - 1], outline=color, width=line)
                    text = f"{face['track']}: {face['top_class']} {100 * float(face['confidence']):.0f} %"
                    size = max(10, round(min(image.size) / 30))
                    place = (left + line, max(0, top - 1.3 * size))
                    box = draw.textbbox(place, text, font_size=size)
                    draw.rectangle(box, fill=color)
                    draw.text(place, text, fill="white", font_size=size)
                writer.write(np.asarray(image), frame.time)
