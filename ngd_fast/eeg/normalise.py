"""Normalisation of each subject by itself: z-scores of band power, then maps in [0, 1].

Both steps use one subject's windows in one band and nothing else. A split by subject therefore stays clean: no number
of a validation subject depends on a training subject, nor the other way round. Ratings are not used at all.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from ngd_fast.config import Config
from ngd_fast.errors import UserError


class NormaliseConfig(Config):
    """How a subject's features are scaled before they are drawn; the maps are always brought to [0, 1] after that."""

    z_score: bool = True
    clip: float | None = Field(None, gt=0, description="z-scores are cut off at this many standard deviations")


def z_score(features: np.ndarray, subject: np.ndarray, bands: Sequence[str], config: NormaliseConfig) -> np.ndarray:
    """Z-scores float64 of features [N, channels, bands], over all windows and channels of a subject and band.

    The channels share one mean and one deviation, so that a map keeps its shape. Raises UserError for a subject whose
    feature is the same in every window and channel.
    """
    result = np.array(features, np.float64)
    for number in np.unique(subject):
        own = result[subject == number]
        deviation = own.std(axis=(0, 1))
        constant = deviation <= 1e-12 * np.abs(own).max(axis=(0, 1))
        if constant.any():
            names = ", ".join(np.asarray(bands)[constant])
            raise UserError(f"{names} of subject {number} is the same in every window and channel: nothing to draw")
        if config.z_score:
            own = (own - own.mean(axis=(0, 1))) / deviation
            if config.clip is not None:
                own = own.clip(-config.clip, config.clip)
        result[subject == number] = own
    return result
