"""How D-Geo's weight grows during training."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["late_cosine", "linear", "constant"]


@dataclass(frozen=True)
class Ramp:
    """Factor in [0, 1] on a weight, as a function of the epoch (section 4.3).

    The authors' knobs ``d_geo.schedule, start, end, hard_gate``.

    ``late_cosine``: 0 up to epoch ``start``, (1 - cos(pi t))/2 with t = (epoch - start)/(end - start) between, 1 from
    ``end`` on. ``linear``: t between. ``constant``: 1 at every epoch. Epochs may be fractions.

    ``hard_gate``: the authors name this knob without defining it. Here a factor below it counts as 0, so that the term
    stays off altogether instead of acting with a tiny weight, and sets in at that factor; 0, the default, switches
    the gate off.

    >>> Ramp()(40)
    0.5
    """

    kind: Kind = "late_cosine"
    start: float = 20
    end: float = 60
    hard_gate: float = 0.0

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: wanted one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if not 0 <= self.start <= self.end < math.inf:
            raise ValueError(f"start, end: wanted 0 <= start <= end, got {self.start}, {self.end}")
        if not 0 <= self.hard_gate <= 1:
            raise ValueError(f"hard_gate: wanted a number from 0 to 1, got {self.hard_gate}")

    def __call__(self, epoch: float) -> float:
        """The factor at ``epoch``."""
        if self.kind == "constant" or epoch >= self.end:
            return 1.0
        if epoch <= self.start:
            return 0.0
        t = (epoch - self.start) / (self.end - self.start)
        # sin^2 is (1 - cos)/2 without its cancellation near t = 0.
        factor = t if self.kind == "linear" else math.sin(math.pi * t / 2) ** 2
        return factor if factor >= self.hard_gate else 0.0
