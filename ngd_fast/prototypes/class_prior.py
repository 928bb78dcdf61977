"""A prior over the bins for each expression, from its place in the valence/arousal plane.

The paper's prior is one vector for all samples, so Proto-KD carries no word about the class. This is the alternative,
off by default.
"""

import math
from collections.abc import Sequence

import torch

from ngd_fast.prototypes.bank import bin_centers

# Pleasure and arousal of the adjectives happy, surprised, sad, angry, disgusted and fearful in Russell and Mehrabian,
# "Evidence for a three-factor theory of emotions", J. Research in Personality 11 (1977); their places agree with
# Russell's circumplex (1980). Neutral is the origin by definition. Contempt is not among the six: its place, beside
# disgust and below anger, is an assumption made here.
VA_OF_LABEL = {
    "neutral": (0.0, 0.0),
    "happiness": (0.81, 0.51),
    "surprise": (0.40, 0.67),
    "sadness": (-0.63, -0.27),
    "anger": (-0.51, 0.59),
    "disgust": (-0.60, 0.35),
    "fear": (-0.64, 0.60),
    "contempt": (-0.55, 0.30),
}


def class_conditional_prior(class_names: Sequence[str], grid: int, *, width: float = 0.4) -> torch.Tensor:
    """float32 [C, K], rows sum to 1: a Gaussian of deviation ``width`` about each class's place, at the bin centres.

    ``width`` is in units of the plane, 0.2 to 10; 0.4 is one bin of a 5x5 grid. Raises ValueError for a class without
    a place in VA_OF_LABEL or a width out of range.
    """
    unknown = [name for name in class_names if name not in VA_OF_LABEL]
    if unknown or not len(class_names):
        raise ValueError(f"class_names: no place for {unknown}; known: {', '.join(VA_OF_LABEL)}")
    # Below 0.2 the far bins underflow to a prior of 0 in float32.
    if not (math.isfinite(width) and 0.2 <= width <= 10):
        raise ValueError(f"width: must be from 0.2 to 10, got {width!r}")
    centers = torch.from_numpy(bin_centers(grid)).double()
    place = torch.tensor([VA_OF_LABEL[name] for name in class_names], dtype=torch.float64)
    valence = (centers - place[:, :1]).square()
    arousal = (centers - place[:, 1:]).square()
    squared = (valence[:, :, None] + arousal[:, None, :]).flatten(1)
    return torch.softmax(-squared / (2 * width**2), dim=1).float()
