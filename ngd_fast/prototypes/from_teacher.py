"""From a trained teacher and a file of topomaps to a bank."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ngd_fast.eeg.join import load_maps
from ngd_fast.errors import UserError
from ngd_fast.prototypes.analysis import rating_levels, silhouette
from ngd_fast.prototypes.bank import PrototypeBank
from ngd_fast.prototypes.clusters import build_clusters
from ngd_fast.teacher.inputs import embed
from ngd_fast.teacher.network import load_teacher

SPLITS = ("validation", "train", "all")


def rated_features(
    teacher_path: str | Path,
    maps_path: str | Path | Sequence[str | Path],
    *,
    split: Literal["validation", "train", "all"] = "validation",
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Features [n, 256] and ratings [n, 2] of the labelled windows on one side of the teacher's split; their origin.

    ``validation`` (the paper's choice) is disjoint by subject from the teacher's training side. The origin holds
    which subjects these are and the checksums of teacher and maps. Raises UserError for maps that are not the
    teacher's kind, that are not the teacher's file while ``split`` names one of its sides (the subjects of another
    file are other people under the same numbers), or that hold no rating.
    """
    if split not in SPLITS:
        raise ValueError(f"split: must be one of {', '.join(SPLITS)}, got {split!r}")
    teacher, meta = load_teacher(teacher_path, device=device)
    maps, maps_sha256, _ = load_maps(maps_path)
    if split != "all" and maps_sha256 != meta["maps_sha256"]:
        raise UserError(
            f"{_said(maps_path)}: not what this teacher was trained on, so its {split} subjects are unknown there;"
            " give that file (or those files, in that order), or --split all"
        )
    rows = maps.labelled if split == "all" else maps.labelled & np.isin(maps.subject, meta[f"{split}_subjects"])
    if not rows.any():
        raise UserError(
            f"{_said(maps_path)}: no window has both valence and arousal ({split}); prototypes need ratings"
        )
    # Standardisation by subject and context take all of a subject's windows, rated or not, as in training.
    _, features = embed(teacher, meta, maps, device=device)
    ratings = np.stack([maps.valence, maps.arousal], axis=1)[rows]
    origin = {
        "teacher_sha256": meta["sha256"],
        "teacher_arch": meta["arch"],
        "maps_sha256": maps_sha256,
        "split": split,
        "subjects": np.unique(maps.subject[rows]).tolist(),
        "subject_disjoint_from_training": split == "validation",
    }
    return features[rows], ratings, origin


def _said(paths) -> str:
    return str(paths) if isinstance(paths, (str, Path)) else ", ".join(map(str, paths))


def build_bank(
    teacher_path: str | Path,
    maps_path: str | Path | Sequence[str | Path],
    *,
    split: Literal["validation", "train", "all"] = "validation",
    grid: int = 5,
    fill_radius: float | None = None,
    device: str = "cpu",
) -> PrototypeBank:
    """:meth:`PrototypeBank.build` on :func:`rated_features`; its metadata adds rating_levels and silhouette."""
    features, ratings, meta = rated_features(teacher_path, maps_path, split=split, device=device)
    bank = PrototypeBank.build(
        features,
        ratings[:, 0],
        ratings[:, 1],
        grid=grid,
        fill_radius=fill_radius,
        meta={**meta, "rating_levels": rating_levels(ratings)},
    )
    return replace(bank, meta={**bank.meta, "silhouette": silhouette(bank, features, ratings)})


def build_cluster_bank(
    teacher_path: str | Path,
    maps_path: str | Path | Sequence[str | Path],
    *,
    split: Literal["validation", "train", "all"] = "validation",
    k: int = 25,
    seed: int = 0,
    device: str = "cpu",
) -> PrototypeBank:
    """:func:`build_clusters` on :func:`rated_features`; its metadata adds rating_levels."""
    features, ratings, meta = rated_features(teacher_path, maps_path, split=split, device=device)
    meta = {**meta, "rating_levels": rating_levels(ratings)}
    return build_clusters(features, ratings[:, 0], ratings[:, 1], k=k, seed=seed, meta=meta)
