"""Drawn faces in the official file formats: FER2013 with FER+'s two label sources, CK+'s tree, AffectNet's CSVs."""

import json
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import write_text
from ngd_fast.faces.classes import AFFECTNET_IDS, CKPLUS_IDS, CLASS_NAMES
from ngd_fast.synthetic.faces import FREQUENCIES, draw_faces

_USAGES = {"train": "Training", "valid": "PublicTest", "test": "PrivateTest"}
_FOLDERS = {"train": "FER2013Train", "valid": "FER2013Valid", "test": "FER2013Test"}


def write_fer2013(folder: str | Path, counts: dict[str, int], seed: int = 0, *, label_folders: bool = False) -> Path:
    """Write fer2013.csv and fer2013new.csv of drawn faces; ``counts`` is {"train": n, "valid": n, "test": n}.

    As in the official files some rows have no name (votes NF) and the names' numbers are not row indices. With
    ``label_folders`` also FER2013Train/, FER2013Valid/ and FER2013Test/ with label.csv and PNGs. Returns ``folder``.
    """
    folder = Path(folder)
    rng = np.random.default_rng((seed, 10))
    pixels, votes = ["emotion,pixels,Usage"], ["Usage,Image name," + ",".join((*CLASS_NAMES, "unknown", "NF"))]
    number = 0
    for offset, (split, count) in enumerate(counts.items()):
        expressions = _expressions(count, rng)
        images, label_dist = draw_faces(expressions, seed * 3 + offset)
        labels = []
        for image, dist in zip(images, label_dist):
            # Every 37th picture shows no face, and its file was never written.
            nameless = rng.random() < 1 / 37
            number += 1 if nameless else int(rng.integers(1, 3))
            name = "" if nameless else f"fer{number:07d}.png"
            row = [0] * 9 + [10] if nameless else _votes(dist, rng)
            pixels.append(f"0,{' '.join(map(str, image.ravel()))},{_USAGES[split]}")
            votes.append(",".join([_USAGES[split], name, *map(str, row)]))
            if label_folders and not nameless:
                labels.append(f'{name},"(0, 0, 48, 48)",{",".join(map(str, row))}')
                _write_image(folder / _FOLDERS[split] / name, image)
        if label_folders:
            write_text(folder / _FOLDERS[split] / "label.csv", "\n".join(labels) + "\n")
    write_text(folder / "fer2013.csv", "\n".join(pixels) + "\n")
    write_text(folder / "fer2013new.csv", "\n".join(votes) + "\n")
    return folder


def write_ckplus_tree(folder: str | Path, subjects: int = 12, seed: int = 0, *, frames: int = 5) -> Path:
    """Write CK+'s official tree: three sequences a subject from neutral to a posed peak, most of them labelled."""
    folder = Path(folder)
    rng = np.random.default_rng((seed, 11))
    kinds = [number for number, name in CKPLUS_IDS.items() if name != "neutral"]
    for subject in range(subjects):
        codes = rng.choice(kinds, 3, replace=False)
        for sequence, code in enumerate(codes, 1):
            expression = CLASS_NAMES.index(CKPLUS_IDS[int(code)])
            # Neutral first, then the expression; one head throughout.
            drawn = np.where(np.arange(frames) < frames - 3, 0, expression)
            images, _ = draw_faces(
                drawn, seed * 100 + subject, style="ckplus", size=64, identities=np.zeros(frames, np.int64)
            )
            stem = f"S{subject + 5:03d}_{sequence:03d}"
            place = Path(f"S{subject + 5:03d}", f"{sequence:03d}")
            for frame, image in enumerate(images, 1):
                # The camera's frames are wider than high.
                wide = np.pad(image, ((0, 0), (12, 12)), mode="edge")
                _write_image(folder / "cohn-kanade-images" / place / f"{stem}_{frame:08d}.png", wide)
            if not (subject % 4 == 3 and sequence == 3):
                label = folder / "Emotion" / place / f"{stem}_{frames:08d}_emotion.txt"
                write_text(label, f"   {float(code):.7e}\n")
    return folder


def write_ckplus_like(folder: str | Path, count: int = 160, seed: int = 0) -> Path:
    """Write CK+'s 48-pixel class folders (seven classes, no neutral) of posed drawn faces, named by subject."""
    folder = Path(folder)
    rng = np.random.default_rng((seed, 12))
    expressions = 1 + rng.permutation(np.arange(count) % (len(CLASS_NAMES) - 1))
    identities = np.arange(count) % max(1, count // 8)
    images, _ = draw_faces(expressions, seed * 3 + 500, style="ckplus", identities=identities)
    for row, (image, expression, subject) in enumerate(zip(images, expressions, identities)):
        name = f"S{subject + 5:03d}_{row // 8 + 1:03d}_{row:08d}.png"
        _write_image(folder / CLASS_NAMES[expression] / name, image)
    return folder


def write_affectnet_like(
    folder: str | Path, counts: dict[str, int] | None = None, seed: int = 0, *, size: int = 64, official: bool = False
) -> Path:
    """Write an AffectNet-mini of coloured drawn faces in the wild: images/, labels_SPLIT.csv, class_map.json.

    Labels carry AffectNet's own ids. ``official`` writes training.csv in AffectNet's full layout instead, with boxes
    around the faces and some rows of the codes 8 to 10. ``counts`` defaults to {"test": 200}; classes are balanced, as
    in AffectNet's validation set. Returns ``folder``.
    """
    folder = Path(folder)
    ids = {name: number for number, name in AFFECTNET_IDS.items()}
    everything, table = [], []
    for offset, (split, count) in enumerate((counts or {"test": 200}).items()):
        rng = np.random.default_rng((seed, 13, offset))
        expressions = rng.permutation(np.arange(count) % len(CLASS_NAMES))
        images, _ = draw_faces(expressions, seed * 3 + 700 + offset, style="affectnet", size=size)
        tint = rng.uniform(0.8, 1.0, (count, 1, 1, 3))
        rows = []
        for row, (image, expression) in enumerate(zip(images[..., None] * tint, expressions)):
            name = f"images/{split}_{row:05d}.jpg"
            number = ids[CLASS_NAMES[expression]]
            rows.append(f"{name},{number},{CLASS_NAMES[expression]}")
            coloured = image.astype(np.uint8)
            box = (0, 0, size, size)
            if official:
                coloured = np.pad(coloured, ((9, 5), (7, 11), (0, 0)))
                box = (7, 9, size, size)
                number = 8 + row % 3 if row % 10 == 9 else number
            _write_image(folder / name, coloured)
            table.append(f"{name},{','.join(map(str, box))},0;0,{number},0.1,-0.2")
        everything += rows
        if not official:
            write_text(folder / f"labels_{split}.csv", "\n".join(["image_path,label,label_name", *rows]) + "\n")
    if official:
        header = (
            "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
        )
        write_text(folder / "training.csv", "\n".join([header, *table]) + "\n")
        return folder
    write_text(folder / "labels_all.csv", "\n".join(["image_path,label,label_name", *everything]) + "\n")
    write_text(folder / "class_map.json", json.dumps(ids, indent=2) + "\n")
    return folder


def _expressions(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(len(CLASS_NAMES), count, p=np.array(FREQUENCIES) / sum(FREQUENCIES))


def _votes(dist: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Ten votes near a distribution, now and then one or two of them for "unknown"."""
    unknown = int(rng.choice([0, 1, 2, 5], p=[0.7, 0.2, 0.07, 0.03]))
    votes = np.floor(dist * (10 - unknown) + 0.5).astype(int)
    votes[votes.argmax()] += 10 - unknown - votes.sum()
    return [*votes.tolist(), unknown, 0]


def _write_image(path: Path, image: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    # PNG ignores the quality.
    Image.fromarray(image).save(path, quality=92)
