"""The objective's settings as one value, checked when it is made; every backend takes its numbers from it."""

import functools
from collections import namedtuple
from dataclasses import dataclass, fields

import torch

from ngd_fast.objective import checks

#: sigma2_c of unit vectors lies in [0, 1] and is 1 minus the mean cosine between two rows of the class. 0.2 asks for a
#: mean cosine of 0.8, about 37 degrees between two rows; a class tighter than that is left alone.
VAR_CAP = 0.2
#: Means of unit vectors are at most 2 apart. For two classes just as tight as VAR_CAP asks, 0.5 asks that rows of
#: different classes have a mean cosine 0.125 below that of rows of one class: it acts on classes that CE leaves
#: confused, and on no others.
MARGIN = 0.5
#: The values of ``kd_mode`` that fused backends have; the kernels take its place in this list.
FUSED_KD_MODES = ("mse", "kl", "logitstd")
#: What ``kd_mode`` may be; the others are computed by the reference alone.
KD_MODES = (*FUSED_KD_MODES, "dkd", "dist")


@dataclass(frozen=True)
class Settings:
    """What ``functional.ngd_objective`` takes besides tensors and D-Geo's weight; documented there.

    The numbers up to ``high_valence``, their names and their order are those of NGD_SETTINGS in csrc/settings.h;
    ``backends`` compares the two. Raises ValueError (range) or TypeError (type), with the name.
    """

    label_smoothing: float = 0.055
    kd_weight: float = 0.30
    kd_temperature: float = 5.0
    kd_mode: str = "mse"
    kd_scale_by_t2: bool = False
    proto_weight: float = 0.12
    proto_temperature: float = 0.90
    var_cap: float = VAR_CAP
    margin: float = MARGIN
    var_weight: float = 1.0
    margin_weight: float = 1.0
    high_valence: tuple[int, ...] = (1, 2)
    kd_alpha: float = 1.0
    kd_beta: float = 8.0

    def __post_init__(self):
        for name in _FLOATS:
            checks.finite(name, getattr(self, name))
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing: wanted a number from 0 to 1, got {self.label_smoothing}")
        checks.positive("kd_temperature", self.kd_temperature)
        checks.positive("proto_temperature", self.proto_temperature)
        if self.kd_mode not in KD_MODES:
            raise ValueError(f"kd_mode: wanted {' or '.join(map(repr, KD_MODES))}, got {self.kd_mode!r}")
        checks.different_classes("high_valence", self.high_valence)

    @functools.cached_property
    def packed(self) -> "Packed":
        """The numbers as the operators take them."""
        return self.pack()

    def pack(self) -> "Packed":
        """``packed``, made anew: torch.compile traces this."""
        values = [getattr(self, name) for name in NAMES]
        # A mode that the operators lack reaches them only without a teacher, where it does not matter.
        fused = self.kd_mode in FUSED_KD_MODES
        values[NAMES.index("kd_mode")] = FUSED_KD_MODES.index(self.kd_mode) if fused else 0
        return Packed(*[float(value) for value in values])


#: Of the numbers that the operators take, in their order.
NAMES = tuple(field.name for field in fields(Settings) if field.name not in ("high_valence", "kd_alpha", "kd_beta"))
#: The numbers as floats; its names go with it as far as Triton's kernels.
Packed = namedtuple("Packed", NAMES)  # type: ignore[misc]  # wants the names as literals
_FLOATS = tuple(field.name for field in fields(Settings) if field.type is float)


@functools.lru_cache(maxsize=256, typed=True)
def _remembered(*values, **named) -> Settings:
    return Settings(*values, **named)


def make(*values, **named) -> Settings:
    """``Settings(...)``, made and checked once for the same values."""
    if torch.compiler.is_compiling():
        return Settings(*values, **named)
    try:
        return _remembered(*values, **named)
    except TypeError:  # a value that cannot be remembered: a list of classes
        return Settings(*values, **named)
