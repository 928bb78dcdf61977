"""The timeline of a face in a video."""

from collections.abc import Sequence

import numpy as np

from ngd_fast.artifacts.figure_style import LINES, WIDTH, color_of, new_figure


class Timeline:
    """Times and probabilities of one track, thinned as it grows so that it never holds more than ``most`` points."""

    def __init__(self, most: int = 4096):
        self.most, self._stride, self._count = most, 1, 0
        self.times: list[float] = []
        self.raw: list[np.ndarray] = []
        self.smoothed: list[np.ndarray] = []

    def add(self, time: float, raw: np.ndarray, smoothed: np.ndarray) -> None:
        """One sample: probabilities [C] as seen and smoothed, at ``time`` seconds."""
        if self._count % self._stride == 0:
            self.times.append(time)
            self.raw.append(raw)
            self.smoothed.append(smoothed)
            if len(self.times) >= self.most:
                self.times, self.raw, self.smoothed = self.times[::2], self.raw[::2], self.smoothed[::2]
                self._stride *= 2
        self._count += 1


def timeline_figure(timelines: Sequence[tuple[int, Timeline]], class_names: Sequence[str]):
    """One panel for each (track, its timeline): smoothed probabilities as lines, those as seen faint behind them."""
    with new_figure(WIDTH, 0.7 + 1.7 * len(timelines), len(timelines), 1, sharex=True) as (figure, axes):
        for axis, (track, timeline) in zip(axes[:, 0], timelines):
            raw, smoothed = np.array(timeline.raw), np.array(timeline.smoothed)
            for c, name in enumerate(class_names):
                axis.plot(timeline.times, raw[:, c], color=color_of(c), lw=0.5, alpha=0.25)
                style = {"color": color_of(c), "ls": LINES[c % len(LINES)], "lw": 1.4, "label": name}
                axis.plot(timeline.times, smoothed[:, c], **style)
            axis.set(ylim=(0, 1), ylabel="probability", title=f"track {track}")
        axes[-1, 0].set_xlabel("seconds")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(class_names))
    return figure
