"""Wrong labels on purpose, for studies of robustness: which faces, and which class instead, by (seed, row)."""

import dataclasses

import numpy as np

from ngd_fast.faces.augment import NOISE, NOISE_CLASS, seed_key, uniform
from ngd_fast.faces.dataset import Faces


def with_label_noise(faces: Faces, fraction: float, seed: int) -> Faces:
    """``faces`` with wrong labels on about ``fraction`` of them, the same for the same seed; at 0 ``faces`` itself.

    Row i is chosen where a uniform number of (seed, i) is below ``fraction``, from 0 to below 1. Its class becomes one
    of the others, each as likely, and its row of label_dist (float32 [N, C]) one-hot. Faces without a label stay so.
    Pixels are shared, and the checksum stays that of the faces as they were.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: must be from 0 to below 1, is {fraction!r}")
    if not fraction:
        return faces
    draws = uniform(seed_key(seed), 0, np.arange(len(faces)), np.array([[NOISE], [NOISE_CLASS]]))
    rows = np.flatnonzero((draws[0] < np.float32(fraction)) & (faces.labels >= 0))
    classes = len(faces.class_names)
    step = 1 + (draws[1, rows].astype(np.float64) * (classes - 1)).astype(np.int64)  # 1 to classes - 1
    labels, label_dist = faces.labels.copy(), faces.label_dist.copy()
    labels[rows] = (labels[rows] + step) % classes
    label_dist[rows] = np.eye(classes, dtype=np.float32)[labels[rows]]
    return dataclasses.replace(faces, labels=labels, label_dist=label_dist, true=(faces.label_dist, faces.labels))
