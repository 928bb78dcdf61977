"""CK+ (extended Cohn-Kanade): the official tree, the 48-pixel class folders, or a CSV; subject ids are kept."""

import re
from pathlib import Path

import numpy as np

from ngd_fast.console import say
from ngd_fast.errors import UserError
from ngd_fast.faces.classes import CKPLUS_IDS, CLASS_MAP, CLASS_NAMES, LabelMap
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.images import decode_image, list_images, map_images
from ngd_fast.faces.table import label_map_for

PEAK_FRAMES = 3
"""Customary: the last three frames of a labelled sequence show the expression (981 images of the official 327)."""

CKPLUS_MAP = LabelMap({name: number for number, name in CKPLUS_IDS.items()}, "CK+'s codes")
_SUBJECT = re.compile(r"(?:^|/)(S\d+)(?=[_/])")


def convert_ckplus(
    source: str | Path,
    *,
    size: int = 48,
    neutral: bool = False,
    peak_frames: int = PEAK_FRAMES,
    image_root: str | Path | None = None,
    class_map=None,
    skip_bad: bool = False,
) -> Faces:
    """CK+ -> grey Faces [N, size, size] with subject ids ("S005"; "" where a name tells none).

    source       the official tree (cohn-kanade-images/ and Emotion/), a folder of class folders, or a CSV
    neutral      of the official tree also take each labelled sequence's first frame, as neutral
    peak_frames  how many last frames of a sequence carry its label
    skip_bad     leave unreadable images of folders and CSVs out (counted); of the official tree they are an error
    Where the tree has Landmarks/, the face is cut out around them; else the middle square of the frame is taken. Says
    which map of labels it used.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if (source / "Emotion").is_dir():
        if class_map is not None:
            raise UserError(f"{source}: the official tree has CK+'s own codes; --class-map is for folders and lists")
        say(f"CK+'s labels: {CKPLUS_MAP}")
        return _read_tree(source, size, neutral, peak_frames)
    if neutral:
        raise UserError(f"{source}: has no Emotion/; --neutral needs the official tree")
    faces = Faces.load(source, class_map=class_map, image_root=image_root)
    if (label_map := label_map_for(source, class_map)) is not None:
        say(f"CK+'s labels: {label_map}")
    faces.subjects = faces.subjects or [subject_of(name) for name in faces.names]
    return faces.decoded(size, grey=True, skip_bad=skip_bad)


def subject_of(name: str) -> str:
    """ "anger/S010_004_00000017.png" -> "S010"; "" where the name does not follow CK+."""
    match = _SUBJECT.search(name)
    return match.group(1) if match else ""


def _read_tree(source: Path, size: int, neutral: bool, peak_frames: int) -> Faces:
    pictures = source / "cohn-kanade-images"
    if not pictures.is_dir():
        raise UserError(f"{source}: has Emotion/ but no cohn-kanade-images/")
    label_files = sorted((source / "Emotion").glob("S*/*/S*_emotion.txt"))
    if not label_files:
        raise UserError(f"{source / 'Emotion'}: holds no Sxxx/yyy/*_emotion.txt")
    files, labels = [], []
    for label_file in label_files:
        index = _read_label(label_file)
        sequence = pictures / label_file.parent.parent.name / label_file.parent.name
        frames, _ = list_images(sequence, deep=False)
        if not frames:
            raise UserError(f"{sequence}: holds no frames, but {label_file} labels it")
        peak = frames[-peak_frames:]
        if neutral and frames[0] not in peak:
            files.append(frames[0])
            labels.append(CLASS_MAP["neutral"])
        files += peak
        labels += [index] * len(peak)
    images = map_images(lambda file: _face(file, source, size), files, desc="reading CK+")
    return Faces(
        images=np.stack(images),
        label_dist=np.eye(len(CLASS_NAMES), dtype=np.float32)[labels],
        names=[file.name for file in files],
        subjects=[file.parent.parent.name for file in files],
        source=f"CK+ ({source})",
    )


def _read_label(path: Path) -> int:
    text = path.read_text(encoding="ascii", errors="replace").strip()
    try:
        return CLASS_MAP[CKPLUS_IDS[int(float(text))]]
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"{path}: holds {text[:20]!r}, must hold a code from 0 to 7") from None


def _face(file: Path, source: Path, size: int) -> np.ndarray:
    landmarks = source / "Landmarks" / file.parent.parent.name / file.parent.name / f"{file.stem}_landmarks.txt"
    return decode_image(file, grey=True, side=size, box=_face_box(landmarks) if landmarks.is_file() else _middle(file))


def _face_box(landmarks: Path) -> tuple[float, float, float, float]:
    """A square around the 68 landmarks (brows to chin), a quarter larger and raised to show the forehead."""
    try:
        points = np.loadtxt(landmarks, ndmin=2)
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    except ValueError:
        raise UserError(f"{landmarks}: must hold one landmark a line, x and y") from None
    side = 1.25 * max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2 - 0.08 * side
    return x - side / 2, y - side / 2, x + side / 2, y + side / 2


def _middle(file: Path) -> tuple[float, float, float, float]:
    height, width = decode_image(file, grey=True).shape
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
