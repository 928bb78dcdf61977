"""What every converter writes: NPZ, manifest, class map."""

import csv
import io
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import write_json, write_text
from ngd_fast.console import print_table
from ngd_fast.errors import UserError
from ngd_fast.faces.classes import CLASS_MAP, CLASS_NAMES
from ngd_fast.faces.dataset import Faces


def write_split(faces: Faces, folder: str | Path, dataset: str, split: str) -> Path:
    """Write DATASET_SPLIT.npz (faces in memory) and DATASET_manifest_SPLIT.csv; the path of the file to train on.

    Of path data only the manifest is written, with absolute image paths: Faces.load reads it.
    """
    folder = Path(folder)
    manifest, archive = folder / f"{dataset}_manifest_{split}.csv", folder / f"{dataset}_{split}.npz"
    if faces.images is not None:
        faces.save(archive)
    write_text(manifest, _manifest(faces))
    return manifest if faces.images is None else archive


def write_class_map(folder: str | Path, dataset: str) -> None:
    """Write class_map_DATASET.json: the taxonomy's names and ids, which all written labels follow."""
    write_json(Path(folder) / f"class_map_{dataset}.json", CLASS_MAP)


def print_counts(splits: dict[str, Faces], title: str) -> None:
    """Print how many faces of each class each split has."""
    rows = [
        (name, *(int(faces.class_counts[index]) for faces in splits.values())) for index, name in enumerate(CLASS_NAMES)
    ]
    unlabelled = [int((faces.labels < 0).sum()) for faces in splits.values()]
    if any(unlabelled):
        rows.append(("unlabelled", *unlabelled))
    rows.append(("all", *(len(faces) for faces in splits.values())))
    print_table(("class", *splits), rows, title=title)


def _manifest(faces: Faces) -> str:
    with_paths, with_subjects = faces.paths is not None, faces.subjects is not None
    header = ["row", "name", "label_id", "label_name", *CLASS_NAMES]
    header += (["image_path"] if with_paths else []) + (["subject"] if with_subjects else [])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in range(len(faces)):
        label = int(faces.labels[row])
        # float32's shortest form that reads back to the same number.
        dist = [np.format_float_positional(value, trim="-") for value in faces.label_dist[row]]
        cells = [str(row), faces.names[row], str(label), CLASS_NAMES[label] if label >= 0 else "", *dist]
        cells += [_absolute(faces.paths[row])] if with_paths else []
        cells += [faces.subjects[row]] if with_subjects else []
        writer.writerow(cells)
    return text.getvalue()


def _absolute(path: str) -> str:
    path = str(Path(path).resolve())
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path!a}: its name is not UTF-8, so no list can hold it; rename it, or give --size") from None
    return path
