"""``ngd-fast predict``."""

import io
import json
import time
from pathlib import Path

import click

from ngd_fast.cli.checkpoints import Checkpoint, ckpt_option, device_option
from ngd_fast.console import say
from ngd_fast.errors import UserError


@click.command("predict")
@click.argument("inputs", nargs=-1, required=True, type=click.Path())
@ckpt_option
@click.option("--out", type=click.Path(dir_okay=False), help="File to write.  [default: standard output]")
@click.option("--format", "kind", type=click.Choice(["csv", "json"]), help="[default: by --out's name, else csv]")
@click.option("--image-root", type=click.Path(), help="Folder that a CSV's paths start from.")
@click.option("--img-size", type=click.IntRange(8), help="Side of the network's input.  [default: as trained]")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Threads that decode images.")
@click.option("--flip-tta", is_flag=True, help="Average with the mirror image.")
@click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be read instead of stopping.")
@device_option
def command(inputs, ckpt, out, kind, image_root, img_size, batch_size, workers, flip_tta, skip_bad, device):
    """Classify faces: INPUTS are images, folders of images, CSV lists or NPZ files.

    Each image is taken as one cropped face. Research use only: not for diagnosis, identification or surveillance.
    """
    kind = kind or _kind_of(out)
    from ngd_fast.devices import pick_device
    from ngd_fast.student.inference import predict

    student = Checkpoint.open(ckpt, image_size=img_size)
    groups = _faces(inputs, image_root, student.meta["class_names"])
    rows, start = [], time.perf_counter()
    for faces in groups:
        made = predict(
            student.module,
            student.meta,
            faces,
            device=pick_device(device),
            batch_size=batch_size,
            workers=workers,
            flip_tta=flip_tta,
            skip_bad=skip_bad,
        )
        rows += [
            {
                "image": name,
                "top_class": made.class_names[probabilities.argmax()],
                "confidence": round(float(probabilities.max()), 6),
                "probabilities": {c: round(float(p), 6) for c, p in zip(made.class_names, probabilities)},
            }
            for name, probabilities in zip(made.names, made.probabilities())
        ]
    seconds = time.perf_counter() - start
    text = json.dumps(rows, indent=2) + "\n" if kind == "json" else _csv(rows)
    if out:
        from ngd_fast.artifacts.files import write_text

        write_text(out, text)
    else:
        click.echo(text, nl=False)
    say(f"{len(rows)} faces in {seconds:.2f} s ({len(rows) / seconds:.0f}/s, reading and first-call costs included)")


def _kind_of(out: str | None) -> str:
    suffix = Path(out).suffix.lower() if out else ".csv"
    if suffix not in (".csv", ".json"):
        raise UserError(f"--out {out}: its name must end in .csv or .json, or give --format")
    return suffix[1:]


def _faces(inputs, image_root, class_names) -> list:
    """One Faces over all image files, and one for each NPZ."""
    from ngd_fast.faces.dataset import Faces

    paths, groups = [], []
    for path in map(Path, inputs):
        if path.suffix.lower() == ".npz":
            groups.append(Faces.load(path))
        elif path.is_dir():
            paths += _images_below(path)
        elif path.suffix.lower() == ".csv":
            paths += _paths_in(path, image_root)
        elif path.is_file():
            paths.append(str(path))
        else:
            raise UserError(f"{path}: no such image, folder, CSV list or NPZ")
    if paths:
        groups.insert(0, Faces(paths=paths, names=paths, class_names=tuple(class_names), source="inputs"))
    return groups


def _images_below(folder: Path) -> list[str]:
    from ngd_fast.faces.images import IMAGE_SUFFIXES

    found = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _paths_in(path: Path, image_root: str | None) -> list[str]:
    """Only the paths of a CSV list: labels, where it has them, play no part here."""
    from ngd_fast.faces.table import PATH_COLUMNS, check_paths, find_column, read_rows

    header, rows = read_rows(path)
    column = find_column(header, PATH_COLUMNS)
    if column is None:
        raise UserError(
            f"{path}: no column of image paths; its header is {','.join(header)}, "
            f"wanted one of {', '.join(PATH_COLUMNS)}"
        )
    root = Path(image_root) if image_root is not None else path.parent
    found = [str(root / cells[column].strip()) for _, cells in rows]
    if not found:
        raise UserError(f"{path}: holds no rows")
    check_paths(found, str(path))
    return found


def _csv(rows: list[dict]) -> str:
    import csv

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "top_class", "confidence", *rows[0]["probabilities"]])
    for row in rows:
        writer.writerow([row["image"], row["top_class"], row["confidence"], *row["probabilities"].values()])
    return text.getvalue()
