"""``ngd-fast predict``."""

import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np

from ngd_fast.cli.checkpoints import Checkpoint, ckpt_option, device_option, raw_option
from ngd_fast.console import progress, say
from ngd_fast.errors import UserError

_BOX = ("x", "y", "width", "height", "score")
_BLOCK = 512
"""Faces cut from photographs that are classified together, so that a large folder's need not all be in memory."""


@click.command("predict")
@click.argument("inputs", nargs=-1, required=True, type=click.Path())
@ckpt_option
@click.option("--out", type=click.Path(dir_okay=False), help="File to write.  [default: standard output]")
@click.option("--format", "kind", type=click.Choice(["csv", "json"]), help="[default: by --out's name, else csv]")
@click.option("--image-root", type=click.Path(), help="Folder that a CSV's paths start from.")
@click.option("--img-size", type=click.IntRange(8), help="Side of the network's input.  [default: as trained]")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--workers", type=click.IntRange(0), help="Threads that decode images; default: 0 on a CPU, up to 8 for a GPU."
)
@click.option("--flip-tta", is_flag=True, help="Average with the mirror image.")
@click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be read instead of stopping.")
@click.option(
    "--detect/--no-detect", default=False, show_default=True,
    help="Find the largest face in each image and classify that (needs the detect extra).",
)  # fmt: skip
@click.option("--all-faces", is_flag=True, help="With --detect: every face in an image, largest first.")
@click.option(
    "--margin", type=click.FloatRange(0, 2),
    help="With --detect: room on every side of a face's box, as a share of the box's longer side.  [default: 0]",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
    help="Arithmetic of the network; auto: bfloat16 on a CPU that multiplies it, else float32.",
)  # fmt: skip
@raw_option
@device_option
def command(inputs, ckpt, out, kind, image_root, img_size, skip_bad, detect, all_faces, margin, raw, device, **options):
    """Classify faces: INPUTS are images, folders of images, CSV lists or NPZ files.

    Each image is taken as one cropped face; with --detect, as a photograph in which faces are found first. A photograph
    without a face is listed without a class. Written are image, top_class, confidence and each class's probability;
    with --detect also faces (how many were found), face_x, face_y, face_width, face_height (pixels of the image turned
    upright) and face_score.

    Research use only: not for diagnosis, identification or surveillance.
    """
    kind = kind or _kind_of(out)
    if not detect and (all_faces or margin is not None):
        raise UserError("--all-faces and --margin say what to take from a photograph; give --detect with them")
    from ngd_fast.devices import pick_device
    from ngd_fast.faces.dataset import Faces
    from ngd_fast.student.inference import predict

    student = Checkpoint.open(ckpt, image_size=img_size, raw=raw)
    class_names = tuple(student.meta["class_names"])
    paths, archives = _inputs(inputs, image_root, class_names)
    if detect and archives:
        raise UserError(f"{archives[0].source}: an NPZ holds cropped faces; leave --detect out")

    options |= {"device": pick_device(device), "skip_bad": skip_bad, "calibration": student.calibration}
    rows, start = [], time.perf_counter()
    if detect:
        side = student.meta["image_size"]
        for found, crops in _detected(paths, side, every=all_faces, margin=margin or 0.0, skip_bad=skip_bad):
            made = ()
            if crops:
                faces = Faces(images=np.stack(crops), class_names=class_names)
                made = predict(student.module, student.meta, faces, feed="torch", **options).probabilities()
            verdicts = iter(made)
            rows += [{**row, **_verdict(class_names, next(verdicts) if row["face"] else None)} for row in found]
    else:
        listed = [Faces(paths=paths, names=paths, class_names=class_names, source="inputs")] if paths else []
        for faces in (*listed, *archives):
            made = predict(student.module, student.meta, faces, **options)
            rows += [{"image": n, **_verdict(class_names, p)} for n, p in zip(made.names, made.probabilities())]
    seconds = time.perf_counter() - start
    text = json.dumps(rows, indent=2) + "\n" if kind == "json" else _csv(rows, class_names)
    if out:
        from ngd_fast.artifacts.files import write_text

        write_text(out, text)
    else:
        click.echo(text, nl=False)
    without = sum(row["top_class"] is None for row in rows)
    if without:
        say(f"no face found in {without} of {len({row['image'] for row in rows})} images")
    count = len(rows) - without
    taken = "" if detect else ", each image taken as one cropped face (--detect finds faces)"
    say(f"{count} faces in {seconds:.2f} s ({count / seconds:.0f}/s, reading and first-call costs included){taken}")


def _kind_of(out: str | None) -> str:
    suffix = Path(out).suffix.lower() if out else ".csv"
    if suffix not in (".csv", ".json"):
        raise UserError(f"--out {out}: its name must end in .csv or .json, or give --format")
    return suffix[1:]


def _inputs(inputs, image_root, class_names) -> tuple[list[str], list]:
    """Paths of all image files, and the faces of each NPZ."""
    if image_root is not None and not any(Path(path).suffix.lower() == ".csv" for path in inputs):
        raise UserError("--image-root is where a CSV's paths start from; give a CSV list with it")
    paths, archives = [], []
    for path in map(Path, inputs):
        if path.suffix.lower() == ".npz":
            archives.append(_faces_in(path, class_names))
        elif path.is_dir():
            paths += _images_below(path)
        elif path.suffix.lower() == ".csv":
            paths += _paths_in(path, image_root)
        elif path.is_file():
            paths.append(str(path))
        else:
            raise UserError(f"{path}: no such image, folder, CSV list or NPZ")
    return paths, archives


def _detected(paths, side, *, every, margin, skip_bad) -> Iterator[tuple[list[dict], list[np.ndarray]]]:
    """Blocks of rows {"image", "faces": how many it has, "face": a box or None}, and the crop of each box, uint8
    [side, side, 3]."""
    from ngd_fast.faces.detection import FaceDetector
    from ngd_fast.faces.images import decode_image

    detector, unreadable = FaceDetector(), []
    rows, crops = [], []
    for path in progress(paths, desc="finding faces", unit="image"):
        try:
            image = decode_image(path)
        except UserError:
            if not skip_bad:
                raise
            unreadable.append(path)
            continue
        found = detector(image)
        for face in found[: None if every else 1]:
            box = {name: round(getattr(face, name), 3 if name == "score" else 1) for name in _BOX}
            rows.append({"image": path, "faces": len(found), "face": box})
            crops.append(face.crop(image, side, margin))
        if not found:
            rows.append({"image": path, "faces": 0, "face": None})
        if len(crops) >= _BLOCK:
            yield rows, crops
            rows, crops = [], []
    yield rows, crops
    if len(unreadable) == len(paths):
        raise UserError(f"none of the {len(paths)} images can be read, first {paths[0]}")
    if unreadable:
        say(f"left out {len(unreadable)} unreadable images, first {unreadable[0]}")


def _verdict(class_names: Sequence[str], probabilities: np.ndarray | None) -> dict:
    """What is said about a face; None stands in for what cannot be said without one."""
    if probabilities is None:
        return {"top_class": None, "confidence": None, "probabilities": None}
    return {
        "top_class": class_names[probabilities.argmax()],
        "confidence": round(float(probabilities.max()), 6),
        "probabilities": {name: round(float(p), 6) for name, p in zip(class_names, probabilities)},
    }


def _images_below(folder: Path) -> list[str]:
    from ngd_fast.faces.images import IMAGE_SUFFIXES, describe_suffixes, list_images

    found, others = list_images(folder)
    if not found:
        raise UserError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    if others:
        say(f"{folder}: skipped {others.total()} files that are not read as images ({describe_suffixes(others)})")
    return list(map(str, found))


def _faces_in(path: Path, class_names: Sequence[str]):
    """The images of an NPZ and their names: labels, where it has them, play no part here."""
    from ngd_fast.artifacts.files import load_npz
    from ngd_fast.faces.dataset import Faces

    arrays = load_npz(path, ("images",), rows=("images", "names"))
    names = None
    if "names" in arrays:
        names = [n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in arrays["names"].ravel()]
    return Faces(images=arrays["images"], names=names, class_names=class_names, source=str(path))


def _paths_in(path: Path, image_root: str | None) -> list[str]:
    """Only the paths of a CSV list: labels, where it has them, play no part here."""
    from ngd_fast.faces.table import PATH_COLUMNS, check_paths, find_column, image_path, read_rows

    header, rows = read_rows(path)
    column = find_column(path, header, PATH_COLUMNS)
    if column is None:
        raise UserError(
            f"{path}: no column of image paths; its header is {','.join(header)}, "
            f"wanted one of {', '.join(PATH_COLUMNS)}"
        )
    root = path.parent if image_root is None else image_root
    found = [image_path(root, cells[column].strip()) for _, cells in rows]
    if not found:
        raise UserError(f"{path}: holds no rows")
    check_paths(found, str(path))
    return found


def _csv(rows: list[dict], class_names: Sequence[str]) -> str:
    import csv

    detected = "face" in rows[0]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["faces", *(f"face_{name}" for name in _BOX)] if detected else []
    writer.writerow(["image", *columns, "top_class", "confidence", *class_names])
    for row in rows:
        box = [row["faces"], *((row["face"] or {}).get(name) for name in _BOX)] if detected else []
        probabilities = [(row["probabilities"] or {}).get(name) for name in class_names]
        writer.writerow([row["image"], *box, row["top_class"], row["confidence"], *probabilities])
    return text.getvalue()
