"""What every reader of recordings hands to the pipeline: trials one at a time, and a count of what was left out."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ngd_fast.console import say
from ngd_fast.errors import UserError

# What is known of each window beside its band power.
ROW = np.dtype(
    [("subject", np.int64), ("trial", np.int64), ("window", np.int64), ("valence", np.float32), ("arousal", np.float32)]
)


@dataclass
class Trial:
    """One subject watching one clip.

    stimulus  float [channels, samples] in uV, while the clip runs
    baseline  float [channels, samples] in uV before it, or None
    valence, arousal   in [-1, 1], or NaN where the trial is unlabelled
    where     names the trial to a person, for messages
    eog       float [k, samples] in uV beside the stimulus, or None
    bad, baseline_bad   spans [first, last) of samples that are marked as bad; no window touches them
    """

    subject: int
    trial: int
    stimulus: np.ndarray
    baseline: np.ndarray | None
    rate: float
    valence: float
    arousal: float
    where: str
    eog: np.ndarray | None = None
    bad: tuple[tuple[int, int], ...] = ()
    baseline_bad: tuple[tuple[int, int], ...] = ()


class TrialFault(UserError):
    """Why one trial (or row of a table) cannot be used; ``reason`` is the kind under which it is counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class Exclusions:
    """Counts what was left out and why, and says each case; the counts end up in the file of topomaps."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.details: list[str] = []

    def add(self, reason: str, detail: str, count: int = 1) -> None:
        """``reason`` is the kind of exclusion that is counted, ``detail`` the line that is printed."""
        self.counts[reason] += count
        self.details.append(detail)
        if self.counts[reason] <= 20:
            say(f"left out: {detail}")
        elif self.counts[reason] - count <= 20:
            say(f"left out: more of the same ({reason}), only counted from here on")

    def __str__(self) -> str:
        return "; ".join(f"{count} {reason}" for reason, count in self.counts.items()) or "nothing was left out"


@dataclass
class TrialSource:
    """A dataset of recordings. ``trials(exclusions)`` yields its trials one by one, once, and keeps none of them.

    name      stem of the files that are written
    channels  names of the rows of every trial's signals
    count     how many trials it will yield at most
    meta      JSON-able: files with their SHA-256, sampling rate, what the reader chose
    positions float64 [channels, 3] in metres, head coordinates; None: those of the configured montage
    with_baseline, with_eog   false lets the reader pass over what the configuration does not use
    """

    name: str
    channels: tuple[str, ...]
    count: int
    trials: Callable[[Exclusions], Iterator[Trial]]
    meta: Mapping[str, Any] = field(default_factory=dict)
    positions: np.ndarray | None = None
    with_baseline: bool = True
    with_eog: bool = False


def scale_rating(rating: float, low: float, high: float, where: str) -> float:
    """Map a rating on [low, high] linearly to [-1, 1]. Raises UserError outside of that range or for NaN.

    The rating is made a float first: DREAMER's are uint8, in which 1 - 3 is 254.
    """
    rating = float(rating)
    if not low <= rating <= high:
        raise UserError(f"{where}: rating {rating:g} is not on the scale from {low:g} to {high:g}")
    return (rating - (low + high) / 2) / ((high - low) / 2)
