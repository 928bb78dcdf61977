"""Checks of the public functions' arguments: shapes, dtypes, devices and ranges; never values that lie on a device."""

import math
import numbers
import os

import torch
from torch import Tensor

#: F.cross_entropy's ignore_index: such a row has no target (and, where labels default to the target, no label).
IGNORE_INDEX = -100
#: Such a row is left out of D-Geo.
NO_LABEL = -1
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Read once: it decides whether class indices on a GPU are looked at, which stops the host until the GPU is done.
DEBUG = os.environ.get("NGD_FAST_DEBUG", "0") == "1"


def floating(name: str, value, *shapes: tuple, device: torch.device | None = None) -> None:
    """``value`` must be a floating tensor of one of ``shapes``; a size is a number, or a letter for any."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: wanted float32, bfloat16, float16 or float64, got {_dtype(value)}")
    _shape_and_device(name, value, shapes, device)


def indices(name: str, value, rows: int, device: torch.device) -> None:
    """``value`` must be int64 [rows]."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted a tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: wanted int64 class indices, got {_dtype(value)}")
    _shape_and_device(name, value, ((rows,),), device)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _fits(shape, wanted) -> bool:
    if len(shape) != len(wanted):
        return False
    for size, want in zip(shape, wanted):
        if isinstance(want, str):
            continue
        if size != want:
            return False
    return True


def _shape_and_device(name, value, shapes, device) -> None:
    for wanted in shapes:
        if _fits(value.shape, wanted):
            break
    else:
        text = " or ".join(f"[{', '.join(str(size) for size in wanted)}]" for wanted in shapes)
        raise ValueError(f"{name}: wanted shape {text}, got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: wanted a tensor on {device} as the others, got one on {value.device}")


def finite(name: str, value) -> None:
    """``value`` must be a finite number."""
    if type(value) is not float and (not isinstance(value, numbers.Real) or isinstance(value, bool)):
        raise TypeError(f"{name}: wanted a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # type: ignore[operator]  # any Real compares with a float
        raise ValueError(f"{name}: wanted a finite number, got {value}")


def positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is above 0."""
    if not value > 0:
        raise ValueError(f"{name}: wanted a number above 0, got {value}")


def different_classes(name: str, value) -> None:
    """Different class indices; whether there are so many classes, ``known_classes`` asks."""
    if not isinstance(value, (list, tuple)):  # not list | tuple, which Dynamo of PyTorch 2.8 cannot trace
        raise TypeError(f"{name}: wanted a list or tuple of class indices, got {type(value).__name__}")
    for c in value:
        if not isinstance(c, int) or isinstance(c, bool):
            raise TypeError(f"{name}: wanted class indices (int), got {c!r}")
    if len(set(value)) != len(value):
        raise ValueError(f"{name}: wanted different classes, got {tuple(value)}")


def known_classes(name: str, value, num_classes: int) -> None:
    """Class indices in [0, num_classes)."""
    for c in value:
        if not 0 <= c < num_classes:
            raise ValueError(f"{name}: wanted classes from 0 to {num_classes - 1}, got {c}")


def index_values(target: Tensor | None, labels: Tensor | None, num_classes: int) -> None:
    """Raise IndexError for a class index out of range. Reads values: for the CPU, and for NGD_FAST_DEBUG=1.

    Does nothing where tensors have no values (torch.compile, fake tensors); there the term becomes NaN.
    """
    for name, value, left_out in (("target", target, (IGNORE_INDEX,)), ("labels", labels, (NO_LABEL, IGNORE_INDEX))):
        if value is None or value.is_floating_point() or type(value) is not Tensor:
            continue
        bad = (value < 0) | (value >= num_classes)
        for allowed in left_out:
            bad = bad & (value != allowed)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"{name}: wanted classes from 0 to {num_classes - 1} (or {' or '.join(map(str, left_out))}), "
                f"got {int(value[row])} in row {row}"
            )
