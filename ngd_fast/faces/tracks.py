"""Faces of a video linked over its frames, and what is said about them smoothed along each link."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ngd_fast.errors import UserError
from ngd_fast.faces.detection import FaceBox

MAX_GAP = 1.0
"""Seconds after which a face that is gone starts a new track when it comes back."""
MIN_OVERLAP = 0.3


@dataclass
class _Track:
    number: int
    box: FaceBox
    seen: float


class Tracker:
    """Numbers boxes so that one that overlaps an earlier one has its number: greedily, the largest overlap first."""

    def __init__(self, *, max_gap: float = MAX_GAP, min_overlap: float = MIN_OVERLAP):
        self.max_gap, self.min_overlap = max_gap, min_overlap
        self._open: list[_Track] = []
        self._count = 0

    def __call__(self, time: float, boxes: Sequence[FaceBox]) -> tuple[list[int], list[int]]:
        """(the track of each box, the tracks that have ended) at ``time`` in seconds, which must not fall."""
        ended = [track.number for track in self._open if time - track.seen > self.max_gap]
        self._open = [track for track in self._open if track.number not in ended]
        pairs = sorted(
            ((box.overlap(track.box), i, track) for i, box in enumerate(boxes) for track in self._open),
            key=lambda pair: (-pair[0], pair[1], pair[2].number),
        )
        numbers: list[int | None] = [None] * len(boxes)
        taken = set()
        for overlap, i, track in pairs:
            if overlap >= self.min_overlap and numbers[i] is None and track.number not in taken:
                numbers[i] = track.number
                taken.add(track.number)
                track.box, track.seen = boxes[i], time
        for i, box in enumerate(boxes):
            if numbers[i] is None:
                numbers[i] = self._count
                self._open.append(_Track(self._count, box, time))
                self._count += 1
        return numbers, ended


@dataclass(frozen=True)
class Smoothing:
    """How probabilities are smoothed along a track.

    ``window`` odd n: the mean over the n samples about each one (fewer at a track's ends), which needs the n // 2 that
    follow. ``decay`` a: a times what was said before plus 1 - a times what is seen, which needs none. Neither: as seen.
    """

    window: int = 1
    decay: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Smoothing":
        """ "none", "window:15" or "ema:0.8". Raises UserError for anything else."""
        kind, _, value = text.partition(":")
        try:
            if text == "none":
                return cls()
            if kind == "window" and int(value) > 0 and int(value) % 2:
                return cls(window=int(value))
            if kind == "ema" and 0 <= float(value) < 1:
                return cls(decay=float(value))
        except ValueError:
            pass
        raise UserError(f"--smooth {text}: wanted none, window:N with an odd N, or ema:A with A from 0 to below 1")


@dataclass
class TrackSmoother:
    """Smooths the samples of one track as they come: every :meth:`push` and :meth:`close` gives those that are done."""

    smoothing: Smoothing
    _seen: deque = field(default_factory=deque)
    _waiting: deque = field(default_factory=deque)
    _said: np.ndarray | None = None

    def push(self, sample, probabilities: np.ndarray) -> list[tuple[object, np.ndarray]]:
        """[(sample, its smoothed probabilities [C])] that ``probabilities`` [C] of the next ``sample`` complete."""
        if self.smoothing.window == 1:
            a = self.smoothing.decay
            self._said = probabilities if self._said is None else a * self._said + (1 - a) * probabilities
            return [(sample, self._said)]
        reach = self.smoothing.window // 2
        self._seen.append(probabilities)
        self._waiting.append(sample)
        return [self._next(reach)] if len(self._waiting) > reach else []

    def close(self) -> list[tuple[object, np.ndarray]]:
        """The samples at the end, about which the window reaches beyond the track."""
        return [self._next(len(self._waiting) - 1) for _ in range(len(self._waiting))]

    def _next(self, after: int):
        """The oldest waiting sample, with ``after`` samples behind it."""
        made = np.mean(self._seen, axis=0)
        # of the samples before the one that waits next, the window holds half
        if len(self._seen) - after > self.smoothing.window // 2:
            self._seen.popleft()
        return self._waiting.popleft(), made
