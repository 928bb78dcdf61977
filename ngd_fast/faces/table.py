"""Reading CSV lists of faces and folders of class folders: headers as the paper's authors accept them."""

import csv
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import delimiter_of
from ngd_fast.console import say
from ngd_fast.errors import UserError
from ngd_fast.faces.classes import CLASS_NAMES, LabelMap, class_index
from ngd_fast.faces.images import IMAGE_SUFFIXES, describe_suffixes, list_images

PATH_COLUMNS = ("image_path", "path", "img", "image", "file", "filepath", "filename")
NAME_COLUMNS = ("label_name", "class_name", "label_str")
ID_COLUMNS = ("label_id", "label", "cls", "class", "target", "y")
SUBJECT_COLUMNS = ("subject", "subject_id")


def read_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every line that holds any, the first one included. A short or long row is a UserError.

    Cells are parted by commas, or by semicolons or tabs where the first line has more of those.
    """
    try:
        # utf-8-sig: spreadsheets put a byte-order mark before the first header.
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            reader = csv.reader(itertools.chain([first], file), delimiter=delimiter_of(first))
            width = None
            for cells in reader:
                if not any(cells):  # spreadsheets may write rows of empty cells below the list
                    continue
                width = width or len(cells)
                if len(cells) != width:
                    raise UserError(
                        f"{path}: line {reader.line_num} has {len(cells)} cells, the first one has {width}; "
                        "is the file truncated?"
                    )
                yield reader.line_num, cells
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        # Read and decoded in blocks: the line is not known.
        raise UserError(f"{path}: not UTF-8 text ({error}); save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num + 1}: not readable as CSV ({error})") from None


def read_rows(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The first line as header (lower case, stripped), and an iterator of (line number, cells) of the others."""
    rows = read_cells(path)
    _, header = next(rows, (1, []))
    header = [cell.strip().lower() for cell in header]
    if not any(header):
        raise UserError(f"{path}: has no header; its first line must name the columns")
    return header, rows


def find_column(path: Path, header: Sequence[str], names: Sequence[str]) -> int | None:
    """Index of the first of ``names`` that the header has. Raises UserError where it has it twice."""
    name = next((name for name in names if name in header), None)
    if name is not None and header.count(name) > 1:
        first = header.index(name)
        second = header.index(name, first + 1)
        raise UserError(f"{path}: columns {first + 1} and {second + 1} are both called {name}; leave one out")
    return None if name is None else header.index(name)


def read_csv(path: Path, class_map, image_root) -> dict:
    """Rows of a CSV list -> paths, names, label_dist [N, 8] float32, subjects or None. For Faces.load."""
    header, rows = read_rows(path)
    path_column = find_column(path, header, PATH_COLUMNS)
    if path_column is None:
        raise UserError(f"{path}: no column of image paths; its header is {','.join(header)}, "
                        f"wanted one of {', '.join(PATH_COLUMNS)}")  # fmt: skip
    name_column, id_column = find_column(path, header, NAME_COLUMNS), find_column(path, header, ID_COLUMNS)
    subject_column = find_column(path, header, SUBJECT_COLUMNS)
    dist_columns = [find_column(path, header, (name,)) for name in CLASS_NAMES]
    soft = None not in dist_columns
    if not soft and name_column is None and id_column is None:
        say(f"{path}: has no labels; a column of them is called one of {', '.join(NAME_COLUMNS + ID_COLUMNS)}, "
            f"its header is {','.join(header)}")  # fmt: skip
    label_map = label_map_for(path, class_map)

    root = path.parent if image_root is None else image_root
    paths, names, dist, subjects, lines = [], [], [], [], []
    for line, cells in rows:
        name = cells[path_column].strip()
        names.append(name)
        paths.append(image_path(root, name))
        subjects.append(cells[subject_column].strip() if subject_column is not None else "")
        lines.append(line)
        if soft:
            # Spreadsheets that part cells by semicolons write 0,5.
            dist.append([cells[column].replace(",", ".") for column in dist_columns])
        elif name_column is not None or id_column is not None:
            dist.append(_label(cells, name_column, id_column, label_map, f"{path}: line {line}"))
    if not paths:
        raise UserError(f"{path}: holds no rows")
    check_paths(paths, str(path))
    label_dist = _distributions(dist, lines, path) if soft else _one_hot(dist, len(paths))
    return {"paths": paths, "names": names, "label_dist": label_dist, "subjects": subjects if any(subjects) else None}


def read_groups(path: Path) -> dict[str, dict[str, str]]:
    """A list of faces and what they are (age, gender, source, ...) -> {column: {face: value}}, labels left out.

    The face stands in a column called name, or as paths are called in lists of faces.
    """
    header, rows = read_rows(path)
    key = find_column(path, header, ("name", *PATH_COLUMNS))
    if key is None:
        raise UserError(f"{path}: no column of faces; its header is {','.join(header)}, "
                        f"wanted one of name, {', '.join(PATH_COLUMNS)}")  # fmt: skip
    known = {*NAME_COLUMNS, *ID_COLUMNS, *CLASS_NAMES, "name", *PATH_COLUMNS}
    columns = {name: i for i, name in enumerate(header) if name and name not in known}
    if not columns:
        raise UserError(f"{path}: no column of groups beside {header[key]}; its header is {','.join(header)}")
    groups: dict[str, dict[str, str]] = {name: {} for name in columns}
    for line, cells in rows:
        face = cells[key].strip()
        for name, column in columns.items():
            value = cells[column].strip()
            if groups[name].setdefault(face, value) != value:
                raise UserError(f"{path}: line {line}: {face} is {value} here and {groups[name][face]} above ({name})")
    return groups


def image_path(root: str | Path, name: str) -> str:
    """Where the image lies that a list calls ``name``, which may be written as on Windows."""
    path = os.path.join(root, name)
    return path if "\\" not in name or os.path.exists(path) else path.replace("\\", "/")


def label_map_for(path: Path, class_map) -> LabelMap | None:
    """``class_map``, else the class_map.json beside a list."""
    beside = path.parent / "class_map.json"
    if class_map is None and path.is_file() and beside.exists():
        class_map = beside
    return None if class_map is None else LabelMap.load(class_map)


def _label(cells, name_column, id_column, label_map: LabelMap | None, where: str) -> int:
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
    return index


def _one_hot(labels: Sequence[int], count: int) -> np.ndarray:
    """float32 [count, 8]; all 0 without labels."""
    if not labels:
        return np.zeros((count, len(CLASS_NAMES)), np.float32)
    return np.eye(len(CLASS_NAMES), dtype=np.float32)[labels]


def _distributions(cells: Sequence[Sequence[str]], lines: Sequence[int], path: Path) -> np.ndarray:
    try:
        dist = np.array(cells, np.float32)
    except ValueError:
        line, row = next((line, row) for line, row in zip(lines, cells) if not _are_numbers(row))
        raise UserError(
            f"{path}: line {line}: a label distribution must be eight numbers, is {','.join(row)}"
        ) from None
    sums = dist.sum(axis=1)
    bad = ~np.isfinite(sums) | (dist < 0).any(axis=1) | (dist.any(axis=1) & (np.abs(sums - 1) > 1e-3))
    if bad.any():
        row = int(bad.argmax())
        raise UserError(f"{path}: line {lines[row]}: a label distribution must sum to 1 (or be 0: unlabelled), "
                        f"sums to {sums[row]:g}")  # fmt: skip
    return dist


def _are_numbers(cells: Sequence[str]) -> bool:
    try:
        np.array(cells, np.float32)
    except ValueError:
        return False
    return True


def read_folder(folder: Path, class_map) -> dict:
    """Class folders (named by class, or by id with a class map), or images without labels directly inside.

    Says how many files it leaves out, and of which suffixes.
    """
    label_map = label_map_for(folder, class_map)
    loose, others = list_images(folder, deep=False)
    paths, labels = [], []
    for subfolder in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        index = class_index(subfolder.name) if label_map is None else label_map.index_of_name(subfolder.name)
        index = label_map.index_of_id(subfolder.name) if index is None and label_map is not None else index
        files, no_images = list_images(subfolder)
        if index is None and files:
            known = ", ".join(CLASS_NAMES) if label_map is None else label_map.source
            raise UserError(f"{subfolder}: the folder's name is no class ({known}); rename it or give --class-map")
        paths += files
        labels += [index] * len(files)
        others += no_images
    if paths and loose:
        say(f"{folder}: left out {len(loose)} images that lie in no class folder, first {loose[0]}")
    if not paths:
        paths = loose
    found = f"{others.total()} files that are not read as images ({describe_suffixes(others)})"
    if not paths:
        raise UserError(
            f"{folder}: holds no images, neither in class folders nor directly; read are {', '.join(IMAGE_SUFFIXES)}"
            + (f", it has {found}" if others else "")
        )
    if others:
        say(f"{folder}: skipped {found}")
    # A name that is not UTF-8, as old archives leave them, can be opened but not written.
    names = [os.fsencode(path.relative_to(folder).as_posix()).decode(errors="replace") for path in paths]
    label_dist = _one_hot(labels, len(paths))
    return {"paths": list(map(str, paths)), "names": names, "label_dist": label_dist, "subjects": None}


def check_paths(paths: Sequence[str], source: str) -> None:
    """Raise UserError when images do not resolve: names the first, counts all."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{source}: {len(missing)} of {len(paths)} images do not exist, first {missing[0]}; "
                        "give --image-root, the folder that the paths start from")  # fmt: skip
