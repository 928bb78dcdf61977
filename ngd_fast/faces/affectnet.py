"""AffectNet: its official CSV, its later layout of images/ and annotations/, the mini CSVs of the paper's authors."""

import itertools
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.headers import load_npy
from ngd_fast.console import say
from ngd_fast.errors import UserError
from ngd_fast.faces.classes import AFFECTNET_IDS, AFFECTNET_UNUSED_IDS, CLASS_NAMES, LabelMap
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.pixels import drop_unreadable
from ngd_fast.faces.table import check_paths, image_path, label_map_for, read_cells

MINI_SPLITS = ("train", "valid", "test", "all")
AFFECTNET_MAP = LabelMap({name: number for number, name in AFFECTNET_IDS.items()}, "AffectNet's codes")
_BOX = ("face_x", "face_y", "face_width", "face_height")
_COLUMNS = ("subdirectory_filepath", *_BOX, "facial_landmarks", "expression", "valence", "arousal")
_SPLIT_OF_STEM = {"training": "train", "validation": "valid", "train_set": "train", "val_set": "valid"}


def convert_affectnet(
    source: str | Path,
    *,
    image_root: str | Path | None = None,
    class_map=None,
    size: int | None = None,
    grey: bool = False,
    skip_bad: bool = False,
) -> tuple[dict[str, Faces], int]:
    """AffectNet -> ({split: Faces}, rows left out because they carry none of the eight expressions).

    source  a CSV in AffectNet's layout (subDirectory_filePath, face_x, ..., expression; its validation.csv has come
            without that header too) or with the headers of the authors' README; a folder with
            labels_{train,valid,test,all}.csv and class_map.json; or a folder with images/ and annotations/*_exp.npy,
            or train_set/ and val_set/ of those
    size    cut out the face's box where the CSV has one, resize and hold uint8 pixels [N, size, size(, 3)] in memory;
            None leaves the images where they are (faces as paths; not possible with boxes)
    skip_bad  leave unreadable images out (counted)
    Says which map of labels it used.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.is_file():
        split = _SPLIT_OF_STEM.get(source.stem, "all")
        for name in MINI_SPLITS:
            split = name if source.stem.endswith(name) else split
        tables = {split: _read_table(source, image_root, class_map)}
    elif any((source / f"labels_{split}.csv").is_file() for split in MINI_SPLITS):
        tables = {
            split: _read_table(source / f"labels_{split}.csv", image_root, class_map)
            for split in MINI_SPLITS
            if (source / f"labels_{split}.csv").is_file()
        }
    else:
        tables = _read_annotations(source, AFFECTNET_MAP if class_map is None else LabelMap.load(class_map))
    for text in dict.fromkeys(str(label_map) for *_, label_map in tables.values() if label_map is not None):
        say(f"AffectNet's labels: {text}")
    splits, left_out = {}, 0
    for split, (paths, names, label_dist, boxes, unused, _) in tables.items():
        left_out += unused
        where = f"AffectNet {split}"
        if not paths:
            raise UserError(f"{source}: {where}: no row carries one of the eight expressions")
        if size is None and any(box is not None for box in boxes):
            raise UserError(f"{source}: gives a box for each face; choose --size so that they are cut out")
        faces = Faces(paths=paths, label_dist=label_dist, names=names, source=where)
        if size is not None:
            faces = faces.decoded(size, grey=grey, boxes=boxes, skip_bad=skip_bad)
        splits[split] = drop_unreadable(faces) if skip_bad else faces
    return splits, left_out


def _read_table(path: Path, image_root, class_map):
    rows = read_cells(path)
    first = next(rows, (1, []))
    header = [cell.strip().lower() for cell in first[1]]
    if len(header) == len(_COLUMNS) and header[_COLUMNS.index("expression")].isdigit():
        header, rows = list(_COLUMNS), itertools.chain([first], rows)
    if "subdirectory_filepath" not in header or "expression" not in header:
        faces = Faces.load(path, class_map=class_map, image_root=image_root)
        boxes = [None] * len(faces)
        return faces.paths, faces.names, faces.label_dist, boxes, 0, label_map_for(path, class_map)
    label_map = AFFECTNET_MAP if class_map is None else LabelMap.load(class_map)
    file_column, expression = header.index("subdirectory_filepath"), header.index("expression")
    box_columns = [header.index(name) for name in _BOX] if all(name in header for name in _BOX) else None
    root = path.parent if image_root is None else image_root
    paths, names, labels, boxes, unused = [], [], [], [], 0
    for line, cells in rows:
        index = label_map.index_of_id(cells[expression])
        if index is None:
            _require_unused(cells[expression], label_map, f"{path}: line {line}")
            unused += 1
            continue
        names.append(cells[file_column].strip())
        paths.append(image_path(root, names[-1]))
        labels.append(index)
        boxes.append(_box([cells[column] for column in box_columns], f"{path}: line {line}") if box_columns else None)
    check_paths(paths, str(path))
    return paths, names, _one_hot(labels), boxes, unused, label_map


def _box(cells, where: str) -> tuple[float, float, float, float] | None:
    try:
        x, y, width, height = (float(cell) for cell in cells)
    except ValueError:
        raise UserError(f"{where}: face_x to face_height must be numbers, are {','.join(cells)}") from None
    # AffectNet writes -1 or 0 where no box was found: then the whole image is the face.
    return (x, y, x + width, y + height) if width > 0 and height > 0 else None


def _read_annotations(source: Path, label_map: LabelMap):
    parts = [source / name for name in ("train_set", "val_set") if (source / name).is_dir()] or [source]
    tables = {}
    for part in parts:
        files = sorted((part / "annotations").glob("[!.]*_exp.npy"))
        if not files:
            raise UserError(f"{source}: neither labels_*.csv, nor annotations/*_exp.npy with images/, "
                            "nor train_set/ and val_set/ of those")  # fmt: skip
        paths, names, labels, unused = [], [], [], 0
        for file in files:
            value = load_npy(file)
            if value.size != 1:
                raise UserError(f"{file}: must hold one annotation, holds {value.size}")
            code = str(value.item())
            index = label_map.index_of_id(code)
            if index is None:
                _require_unused(code, label_map, str(file))
                unused += 1
                continue
            names.append(file.name.removesuffix("_exp.npy") + ".jpg")
            paths.append(str(part / "images" / names[-1]))
            labels.append(index)
        check_paths(paths, str(part))
        split = _SPLIT_OF_STEM.get(part.name, "all")
        tables[split] = paths, names, _one_hot(labels), [None] * len(paths), unused, label_map
    return tables


def _require_unused(code: str, label_map: LabelMap, where: str) -> None:
    try:
        unused = float(code) in AFFECTNET_UNUSED_IDS  # "8.0" too, as of any other code
    except ValueError:
        unused = False
    if not unused:
        raise UserError(f"{where}: expression {code!r} is not in {label_map.source}, which has "
                        f"{sorted(label_map.by_id)}")  # fmt: skip


def _one_hot(labels) -> np.ndarray:
    return np.eye(len(CLASS_NAMES), dtype=np.float32)[np.asarray(labels, np.int64)]
