"""Videos, frame by frame, with PyAV (the ``video`` extra): times as the file has them, frames upright, damage named."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from ngd_fast.console import say
from ngd_fast.errors import UserError

CAMERA = "camera:"


@dataclass(frozen=True)
class Frame:
    """One frame of a video."""

    index: int
    """Its number in the file, from 0."""
    time: float
    """Seconds from the first frame."""
    image: np.ndarray | None
    """uint8 [H, W, 3] RGB, upright; None where it could not be decoded."""
    problem: str = ""


def as_frames(images: Sequence[np.ndarray], fps: float) -> Iterator[Frame]:
    """Arrays uint8 [H, W, 3] as frames at ``fps`` frames a second."""
    if not fps > 0:
        raise ValueError(f"fps must be above 0, is {fps}")
    for index, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"frame {index} must be uint8 [H, W, 3], is {image.dtype} {list(image.shape)}")
        yield Frame(index, index / fps, image)


def read_frames(source: str | Path, *, every: int = 1, fps: float | None = None) -> Iterator[Frame]:
    """The frames of a video file or of "camera:0": every N-th, or ``fps`` of them for each second of the video.

    A frame that cannot be decoded comes without an image. Where the file ends early, what is there comes first and then
    a line says so. Raises UserError for what is no video.
    """
    av = _av()
    container = _open(av, str(source))
    with container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        index, last, due, start, problem = -1, 0.0, 0.0, None, ""
        for frame in _decode(av, container, stream):
            index += 1
            if isinstance(frame, Exception):
                problem = str(frame)
                yield Frame(index, last, None, "damaged")
                continue
            time = _time(frame, stream, index)
            start = time if start is None else start
            # a clock that jumps back must not end in tracks that run backwards
            last = max(last, time - start)
            if index % every or (fps and last < due - 1e-6):
                continue
            if fps:
                due = (np.floor(last * fps + 1e-6) + 1) / fps
            image = frame.to_ndarray(format="rgb24")
            if frame.rotation:
                image = np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))
            yield Frame(index, last, image, "damaged" if frame.is_corrupt else "")
        promised = _seconds(container, stream)
        if problem:
            say(f"{source}: damaged ({problem}); the frames concerned have no class")
        if index >= 0 and promised and last < promised - max(1.0, 0.02 * promised):
            say(f"{source}: ends after {last:.1f} of {promised:.1f} s; is it truncated?")
    if index < 0:
        raise UserError(f"{source}: holds no frame that can be decoded")


def _av():
    try:
        import av
    except ImportError as error:
        raise UserError(f"reading videos needs PyAV ({error}): pip install 'ngd-fast[video]'") from None
    return av


def _open(av, source: str):
    options = {}
    if source.startswith(CAMERA):
        options, source = {"format": "v4l2"}, f"/dev/video{source.removeprefix(CAMERA)}"
    try:
        container = av.open(source, **options)
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{source}: not a readable video ({error.strerror or error})") from None
    if not container.streams.video:
        container.close()
        raise UserError(f"{source}: holds no video")
    return container


def _decode(av, container, stream) -> Iterator:
    """Frames, and an exception in place of each packet that cannot be decoded."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError as error:  # the container itself is cut off
            yield error
            return
        if packet is None:
            return
        try:
            yield from packet.decode()
        except av.error.FFmpegError as error:
            if packet.size:
                yield error


def _time(frame, stream, index: int) -> float:
    if frame.time is not None:
        return float(frame.time)
    return index / float(stream.average_rate or 25)


def _seconds(container, stream) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else None


class VideoWriter:
    """Writes frames with their times, H.264 where PyAV has an encoder for it, else MPEG-4."""

    def __init__(self, path: str | Path, kind: str):
        self._av = _av()
        self._container = self._av.open(str(path), "w", format=kind)
        self._stream = None
        self._last = -1

    def write(self, image: np.ndarray, time: float) -> None:
        """Append ``image`` (uint8 [H, W, 3]) at ``time`` seconds; odd sides lose their last pixel."""
        image = np.ascontiguousarray(image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2])
        if self._stream is None:
            name = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(name, rate=30)
            self._stream.height, self._stream.width = image.shape[:2]
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, 1000)
        if image.shape[:2] != (self._stream.height, self._stream.width):
            return  # a stream has one size; a camera that changes it mid-way is left out
        frame = self._av.VideoFrame.from_ndarray(image, format="rgb24")
        self._last = frame.pts = max(self._last + 1, round(time * 1000))
        frame.time_base = Fraction(1, 1000)
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder still holds."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
