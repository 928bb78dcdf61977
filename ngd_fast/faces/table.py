"""Reading CSV lists of faces and folders of class folders: headers as the paper's authors accept them."""

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import delimiter_of
from ngd_fast.errors import UserError
from ngd_fast.faces.classes import CLASS_NAMES, LabelMap, class_index
from ngd_fast.faces.images import IMAGE_SUFFIXES

PATH_COLUMNS = ("image_path", "path", "img", "image", "file", "filepath", "filename")
NAME_COLUMNS = ("label_name", "class_name", "label_str")
ID_COLUMNS = ("label_id", "label", "cls", "class", "target", "y")
SUBJECT_COLUMNS = ("subject", "subject_id")


def read_rows(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Header (lower case, stripped) and an iterator of (line number, cells). A short or long row is a UserError.

    Cells are parted by commas, or by semicolons or tabs where the header has more of those.
    """
    try:
        # utf-8-sig: spreadsheets put a byte-order mark before the first header.
        file = open(path, newline="", encoding="utf-8-sig")  # noqa: SIM115 (closed by the generator below)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        first = file.readline()
        reader = csv.reader(itertools.chain([first], file), delimiter=delimiter_of(first))
        header = [cell.strip().lower() for cell in next(reader, [])]
    except (csv.Error, UnicodeDecodeError) as error:
        file.close()
        raise UserError(f"{path}: not a CSV file ({error})") from None
    if not any(header):
        file.close()
        raise UserError(f"{path}: has no header; its first line must name the columns")

    def rows():
        with file:
            try:
                for cells in reader:
                    if not cells:
                        continue
                    if len(cells) != len(header):
                        raise UserError(
                            f"{path}: line {reader.line_num} has {len(cells)} cells, the header has {len(header)}; "
                            "is the file truncated?"
                        )
                    yield reader.line_num, cells
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{path}: line {reader.line_num + 1}: not readable as CSV ({error})") from None

    return header, rows()


def find_column(header: Sequence[str], names: Sequence[str]) -> int | None:
    """Index of the first of ``names`` that the header has."""
    return next((header.index(name) for name in names if name in header), None)


def read_csv(path: Path, class_map, image_root) -> dict:
    """Rows of a CSV list -> paths, names, label_dist [N, 8] float32, subjects or None. For Faces.load."""
    header, rows = read_rows(path)
    path_column = find_column(header, PATH_COLUMNS)
    if path_column is None:
        raise UserError(f"{path}: no column of image paths; its header is {','.join(header)}, "
                        f"wanted one of {', '.join(PATH_COLUMNS)}")  # fmt: skip
    name_column, id_column = find_column(header, NAME_COLUMNS), find_column(header, ID_COLUMNS)
    subject_column = find_column(header, SUBJECT_COLUMNS)
    dist_columns = [find_column(header, (name,)) for name in CLASS_NAMES]
    soft = None not in dist_columns
    label_map = _label_map_for(path, class_map)

    root = Path(image_root) if image_root is not None else path.parent
    paths, names, dist, subjects = [], [], [], []
    for line, cells in rows:
        name = cells[path_column].strip()
        names.append(name)
        paths.append(str(root / name))
        subjects.append(cells[subject_column].strip() if subject_column is not None else "")
        where = f"{path}: line {line}"
        if soft:
            dist.append(_distribution([cells[column] for column in dist_columns], where))
        elif name_column is not None or id_column is not None:
            dist.append(_one_hot(cells, name_column, id_column, label_map, where))
        else:
            dist.append(np.zeros(len(CLASS_NAMES), np.float32))
    if not paths:
        raise UserError(f"{path}: holds no rows")
    check_paths(paths, str(path))
    label_dist = np.stack(dist)
    return {"paths": paths, "names": names, "label_dist": label_dist, "subjects": subjects if any(subjects) else None}


def _label_map_for(path: Path, class_map) -> LabelMap | None:
    if class_map is not None:
        return LabelMap.load(class_map)
    beside = path.parent / "class_map.json"
    if beside.exists():
        return LabelMap.load(beside)
    return None


def _one_hot(cells, name_column, id_column, label_map: LabelMap | None, where: str) -> np.ndarray:
    column = name_column if name_column is not None else id_column
    text = cells[column].strip()
    if label_map is not None:
        index = label_map.index_of_name(text) if name_column is not None else label_map.index_of_id(text)
        # A column called "label" may hold names.
        index = label_map.index_of_name(text) if index is None else index
        known = f"{label_map.source} has {label_map.names} with ids {sorted(label_map.by_id)}"
    else:
        if text.lstrip("+-").replace(".", "", 1).isdigit():
            # The same number means different expressions in FER+, AffectNet and CK+: never guess.
            raise UserError(f"{where}: holds a label id and no name; give --class-map, or put class_map.json beside it")
        index, known = class_index(text), f"known are {', '.join(CLASS_NAMES)}"
    if index is None:
        raise UserError(f"{where}: label {text!r} is not in the class map; {known}")
    dist = np.zeros(len(CLASS_NAMES), np.float32)
    dist[index] = 1
    return dist


def _distribution(cells: Sequence[str], where: str) -> np.ndarray:
    try:
        dist = np.array(cells, np.float32)
    except ValueError:
        raise UserError(f"{where}: a label distribution must be eight numbers, is {','.join(cells)}") from None
    if not np.isfinite(dist).all() or (dist < 0).any() or (dist.any() and abs(dist.sum() - 1) > 1e-3):
        raise UserError(f"{where}: a label distribution must sum to 1 (or be 0: unlabelled), sums to {dist.sum():g}")
    return dist


def read_folder(folder: Path, class_map) -> dict:
    """Class folders (named by class, or by id with a class map), or images without labels directly inside."""
    label_map = LabelMap.load(class_map) if class_map is not None else None
    paths, names, dist = [], [], []

    def add(file: Path, index: int | None):
        paths.append(str(file))
        names.append(file.relative_to(folder).as_posix())
        dist.append(np.zeros(len(CLASS_NAMES), np.float32))
        if index is not None:
            dist[-1][index] = 1

    subfolders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    for subfolder in subfolders:
        index = class_index(subfolder.name) if label_map is None else label_map.index_of_name(subfolder.name)
        index = label_map.index_of_id(subfolder.name) if index is None and label_map is not None else index
        files = sorted(p for p in subfolder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if index is None and files:
            known = ", ".join(CLASS_NAMES) if label_map is None else label_map.source
            raise UserError(f"{subfolder}: the folder's name is no class ({known}); rename it or give --class-map")
        for file in files:
            add(file, index)
    if not paths:
        for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
            add(file, None)
    if not paths:
        raise UserError(f"{folder}: holds no images, neither in class folders nor directly")
    return {"paths": paths, "names": names, "label_dist": np.stack(dist), "subjects": None}


def check_paths(paths: Sequence[str], source: str) -> None:
    """Raise UserError when images do not resolve: names the first, counts all."""
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(f"{source}: {len(missing)} of {len(paths)} images do not exist, first {missing[0]}; "
                        "give --image-root, the folder that the paths start from")  # fmt: skip
