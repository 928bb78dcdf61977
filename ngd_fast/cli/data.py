"""``ngd-fast data``: face datasets into NPZ files, manifests and class maps."""

from pathlib import Path

import click

from ngd_fast.console import print_table, say
from ngd_fast.errors import UserError

_LABEL_MODES = ("plurality", "majority", "probability", "crossentropy", "multi_target")

_out = click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write into.")
_image_root = click.option(
    "--image-root", type=click.Path(path_type=Path), help="Folder that the image paths start from."
)
_class_map = click.option("--class-map", type=click.Path(path_type=Path), help="JSON: the dataset's {class name: id}.")
_skip_bad = click.option("--skip-bad", is_flag=True, help="Leave unreadable images out, and count them.")
_source = click.argument("source", type=click.Path(path_type=Path))


@click.group()
def command():
    """Turn face datasets into NPZ files, manifests and class maps."""


@command.command()
@click.option("--fer2013", type=click.Path(path_type=Path), help="fer2013.csv: the pixels.")
@click.option(
    "--labels",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="fer2013new.csv (joined with fer2013.csv row by row), and/or FER+'s folders with label.csv. Repeatable.",
)
@click.option("--label-mode", type=click.Choice(_LABEL_MODES), default="plurality", show_default=True)
@click.option(
    "--eval-label-mode",
    type=click.Choice(("same", *_LABEL_MODES)),
    default="same",
    show_default=True,
    help="Mode of validation and test; FER+'s own trainer takes majority.",
)
@click.option(
    "--drop-ties", is_flag=True, help="Leave out rows whose most votes several classes share; else the first is taken."
)
@_image_root
@_out
def ferplus(fer2013, labels, label_mode, eval_label_mode, drop_ties, image_root, out):
    """FER+ from its official files, in each of its label modes."""
    from ngd_fast.artifacts.files import sha256, write_json
    from ngd_fast.faces.ferplus import convert_ferplus

    splits, remarks = convert_ferplus(
        labels, fer2013, label_mode=label_mode, eval_label_mode=eval_label_mode, drop_ties=drop_ties,
        image_root=image_root,
    )  # fmt: skip
    for remark in remarks:
        say(remark)
    _write(splits, out, "ferplus")
    sources = [path for path in (fer2013, *labels) if path is not None and path.is_file()]
    origin = {
        "label_mode": label_mode,
        "eval_label_mode": eval_label_mode,
        "drop_ties": drop_ties,
        "rows": remarks,
        "sha256": {path.name: sha256(path) for path in sources},
    }
    write_json(out / "ferplus_conversion.json", origin)


@command.command()
@_source
@click.option("--size", type=click.IntRange(8, 1024), help="Hold pixels of this side in an NPZ; else only lists paths.")
@click.option("--grey", is_flag=True, help="Turn the images grey, like FERPlus.")
@_skip_bad
@_image_root
@_class_map
@_out
def affectnet(source, size, grey, skip_bad, image_root, class_map, out):
    """AffectNet from SOURCE: its CSV, a folder of labels_{train,valid,test,all}.csv, or images/ with annotations/."""
    from ngd_fast.faces.affectnet import convert_affectnet

    if grey and size is None:
        raise UserError("--grey needs --size: without it the images stay as they are")
    splits, left_out = convert_affectnet(
        source, image_root=image_root, class_map=class_map, size=size, grey=grey, skip_bad=skip_bad
    )
    if left_out:
        say(f"left out {left_out} rows of none, uncertain or no face")
    _write(splits, out, "affectnet")


@command.command()
@_source
@click.option("--size", type=click.IntRange(8, 1024), default=48, show_default=True)
@click.option("--neutral", is_flag=True, help="Also take each sequence's first frame, as neutral (official tree).")
@_skip_bad
@_image_root
@_class_map
@_out
def ckplus(source, size, neutral, skip_bad, image_root, class_map, out):
    """CK+ from SOURCE: the official tree, the 48-pixel class folders, or a CSV."""
    from ngd_fast.faces.ckplus import convert_ckplus

    faces = convert_ckplus(
        source, size=size, neutral=neutral, image_root=image_root, class_map=class_map, skip_bad=skip_bad
    )
    say(f"{len(set(faces.subjects or []) - {''})} subjects")
    _write({"all": faces}, out, "ckplus")


@command.command()
@_source
@click.option("--name", default="faces", show_default=True, help="What the written files are called.")
@click.option("--split", default="all", show_default=True)
@click.option("--size", type=click.IntRange(8, 1024), help="Hold pixels of this side in an NPZ; else only lists paths.")
@click.option("--grey", is_flag=True, help="Turn the images grey.")
@_skip_bad
@_image_root
@_class_map
@_out
def folder(source, name, split, size, grey, skip_bad, image_root, class_map, out):
    """Any folder of class folders, or CSV of paths and labels."""
    from ngd_fast.faces.dataset import Faces
    from ngd_fast.faces.pixels import drop_unreadable
    from ngd_fast.faces.table import label_map_for

    if grey and size is None:
        raise UserError("--grey needs --size: without it the images stay as they are")
    faces = Faces.load(source, class_map=class_map, image_root=image_root)
    if (label_map := label_map_for(source, class_map)) is not None:
        say(f"{name}'s labels: {label_map}")
    if size is not None:
        faces = faces.decoded(size, grey=grey, skip_bad=skip_bad)
    elif skip_bad:
        faces = drop_unreadable(faces)
    _write({split: faces}, out, name)


@command.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@_image_root
@_class_map
def check(files, image_root, class_map):
    """Read FILES (NPZ, CSV or folders) as training would; print classes, duplicates, an NPZ's sizes and grey values.

    Duplicates are faces with the same pixels, or image files with the same content, as one before them. Image files
    are decoded; those that cannot be are counted and left out.
    """
    import numpy as np

    from ngd_fast.faces.dataset import Faces
    from ngd_fast.faces.pixels import drop_unreadable
    from ngd_fast.faces.writing import print_counts

    load = lambda path: Faces.load(path, class_map=class_map, image_root=image_root)  # noqa: E731
    loaded = {str(path): drop_unreadable(load(path)) for path in files}
    rows = []
    seen: dict[bytes, str] = {}
    for name, faces in loaded.items():
        shape = mean = std = "paths"
        if faces.images is not None:
            shape = "x".join(map(str, faces.images.shape[1:]))
            mean, std = (f"{value / 255:.4f}" for value in (faces.images.mean(), faces.images.std()))
        dist = faces.label_dist[faces.labels >= 0].astype(np.float64)
        entropy = -(dist * np.log2(np.where(dist > 0, dist, 1))).sum(axis=1).mean() + 0.0 if len(dist) else float("nan")
        twice = _count_duplicates(faces, name, seen)
        rows.append((name, len(faces), shape, mean, std, f"{entropy:.3f}", twice, faces.checksum[:16]))
    print_counts(loaded, "labels (the class with most votes)")
    print_table(("file", "faces", "size", "mean", "std", "label bits", "duplicates", "sha256"), rows)


def _count_duplicates(faces, name: str, seen: dict[bytes, str]) -> str:
    """Faces that occurred before, in this file or in one named earlier (a leak between splits)."""
    import hashlib

    from ngd_fast.console import progress

    inside = across = 0
    if faces.images is not None:
        contents = (image.tobytes() for image in faces.images)
    else:
        contents = (Path(path).read_bytes() for path in progress(faces.paths, desc=f"comparing {name}", unit="image"))
    for content in contents:
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest not in seen:
            seen[digest] = name
        elif seen[digest] == name:
            inside += 1
        else:
            across += 1
    return f"{inside} inside, {across} across"


def _write(splits, out: Path, dataset: str) -> None:
    from ngd_fast.faces.writing import print_counts, write_class_map, write_split

    for split, faces in splits.items():
        say(f"wrote {write_split(faces, out, dataset, split)}")
    write_class_map(out, dataset)
    print_counts(splits, f"{dataset}: faces by class")
