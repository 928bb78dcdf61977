"""A student on the frames of a video: faces found, linked, classified in batches, smoothed along their tracks."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ngd_fast.evaluation.calibration import Calibration
from ngd_fast.evaluation.predictions import softmax
from ngd_fast.faces.augment import render
from ngd_fast.faces.detection import FaceBox
from ngd_fast.faces.images import to_grey
from ngd_fast.faces.tracks import Smoothing, Tracker, TrackSmoother
from ngd_fast.faces.video import Frame
from ngd_fast.student.inference import at_precision


class Classifier:
    """uint8 faces [N, S, S, 3] -> probabilities [N, C] float64; S is the student's ``image_size``."""

    def __init__(
        self,
        module: nn.Module,
        meta: Mapping[str, Any],
        *,
        device: torch.device | str = "cpu",
        precision: str = "auto",
        calibration: Calibration | None = None,
    ):
        self.device, self.meta, self.calibration = torch.device(device), meta, calibration
        self.network, self.autocast = at_precision(module.to(self.device).eval(), self.device, precision)
        self.mean, self.std = (torch.as_tensor(meta[key], dtype=torch.float32, device=self.device).reshape(-1).expand(3)
                               for key in ("mean", "std"))  # fmt: skip

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        if self.meta.get("grey", False):
            images = to_grey(images)[..., None]
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        values = render(pixels, None, self.meta["image_size"], mean=self.mean[: pixels.shape[3]],
                        std=self.std[: pixels.shape[3]], dtype=torch.float32)  # fmt: skip
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.network(values)[1].float().cpu().numpy()
        return softmax(logits if self.calibration is None else self.calibration.apply(logits))


@dataclass
class FaceInFrame:
    """One face in one frame; or a frame without any, which has no track."""

    frame: int
    time: float
    track: int | None = None
    box: FaceBox | None = None
    note: str = ""
    """"damaged" or "no face"; empty where there is a face."""
    raw: np.ndarray | None = None
    """[C] probabilities as seen."""
    smoothed: np.ndarray | None = None
    """[C] probabilities along the track."""
    done: bool = field(default=False, repr=False)


def predict_frames(
    frames: Iterable[Frame],
    classify: Callable[[np.ndarray], np.ndarray],
    side: int,
    *,
    detector: Callable[[np.ndarray], list[FaceBox]] | None = None,
    margin: float = 0.0,
    smoothing: Smoothing | None = None,
    batch_size: int = 64,
) -> Iterator[FaceInFrame]:
    """Every face of every frame, in the frames' order; memory does not grow with the video's length.

    frames    from :func:`~ngd_fast.faces.video.read_frames` or :func:`~ngd_fast.faces.video.as_frames`
    classify  a :class:`Classifier`, or anything from uint8 [N, side, side, 3] to probabilities [N, C]
    detector  a :class:`~ngd_fast.faces.detection.FaceDetector`; None takes each frame as one cropped face
    margin    room about a box as a share of its longer side
    A frame without a face, and one that is damaged, gives one row without probabilities. A track ends when its face is
    gone for more than a second; nothing is smoothed across tracks.
    """
    smoothing = smoothing or Smoothing()
    tracker, smoothers = Tracker(), {}
    waiting: deque[FaceInFrame] = deque()
    events: list[tuple[FaceInFrame | int, np.ndarray | None]] = []
    held = 0

    def settle() -> None:
        """Classify the crops that are held, then let tracks go on and end in the order in which they did."""
        nonlocal held
        crops = [crop for _, crop in events if crop is not None]
        made = iter(classify(np.stack(crops)) if crops else ())
        for what, crop in events:
            if crop is None:
                finished = smoothers.pop(what).close()
            else:
                what.raw = next(made)
                finished = smoothers.setdefault(what.track, TrackSmoother(smoothing)).push(what, what.raw)
            for row, probabilities in finished:
                row.smoothed, row.done = probabilities, True
        events.clear()
        held = 0

    for frame in frames:
        boxes = _boxes(frame, detector)
        tracks, ended = tracker(frame.time, boxes)
        events += [(track, None) for track in ended]
        note = frame.problem or ("" if boxes else "no face")
        if not boxes:
            waiting.append(FaceInFrame(frame.index, frame.time, note=note, done=True))
        for track, box in zip(tracks, boxes):
            row = FaceInFrame(frame.index, frame.time, track, box, note)
            waiting.append(row)
            events.append((row, box.crop(frame.image, side, margin) if detector else _whole(frame.image, side)))
            held += 1
        # a face before a long stretch of none must not hold that stretch back
        if held >= batch_size or len(waiting) >= 4 * batch_size:
            settle()
        while waiting and waiting[0].done:
            yield waiting.popleft()
    events += [(track, None) for track in _open_tracks(events, smoothers)]
    settle()
    yield from waiting


def _open_tracks(events, smoothers) -> list[int]:
    """Tracks that have not ended, those whose first face is still held among them."""
    ended = {what for what, crop in events if crop is None}
    known = dict.fromkeys([*smoothers, *(what.track for what, crop in events if crop is not None)])
    return [track for track in known if track not in ended]


def _boxes(frame: Frame, detector) -> list[FaceBox]:
    if frame.image is None:
        return []
    if detector is None:
        height, width = frame.image.shape[:2]
        return [FaceBox(0.0, 0.0, float(width), float(height), 1.0)]
    return detector(frame.image)


def _whole(image: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    if image.shape[:2] == (side, side):
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
