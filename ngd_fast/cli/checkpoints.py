"""What the commands that use a trained student share: opening it, finding out which run it is, reading the faces."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ngd_fast.errors import UserError

device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
ckpt_option = click.option(
    "--ckpt", required=True, type=click.Path(), help="A run's folder or a student_best.safetensors file."
)

raw_option = click.option("--raw", is_flag=True, help="Leave the student's calibration out, where it has one.")


@dataclass
class Checkpoint:
    """A student that was read from ``file``, and the run it came from."""

    module: Any
    meta: dict
    file: Path
    sha256: str
    run: str
    variant: str
    seed: int | None
    calibration: Any = None
    """The Calibration that lies beside the student, or None."""

    @classmethod
    def open(cls, path: str | Path, *, image_size: int | None = None, raw: bool = False) -> "Checkpoint":
        """Read a student, and unless ``raw`` its calibration, where it has one.

        Raises UserError for a file that is no student or not the one its run's sums name, and for a calibration of
        other weights.
        """
        from ngd_fast.artifacts.files import read_json, require_untouched, sha256
        from ngd_fast.evaluation.predictions import is_name
        from ngd_fast.student.weights import load_student, student_file

        file = student_file(path)
        require_untouched(file)
        module, meta = load_student(file)
        if image_size is not None:
            meta = {**meta, "image_size": image_size}
        metrics = file.parent / "metrics.json"
        known = read_json(metrics) if metrics.exists() else {}
        for key in ("run", "variant"):
            if not is_name(known.get(key) or "-"):
                raise UserError(f"{metrics}: {key} is no name")
        run = known.get("run") or (file.resolve().parent.name if metrics.exists() else file.stem)
        digest = sha256(file)
        return cls(
            module,
            meta,
            file,
            digest,
            run=str(run),
            variant=str(known.get("variant") or meta.get("config_name") or run),
            seed=known.get("seed", meta.get("seed")),
            calibration=None if raw else _calibration(file, digest, len(meta["class_names"])),
        )


def _calibration(student: Path, digest: str, classes: int):
    from ngd_fast.artifacts.files import require_untouched
    from ngd_fast.evaluation.calibration import CALIBRATION_NAME, Calibration

    path = student.parent / CALIBRATION_NAME
    if not path.exists():
        return None
    require_untouched(path)
    found = Calibration.load(path, classes)
    if found.info.get("weights_sha256") != digest:
        raise UserError(f"{path}: was fitted for other weights than {student.name}; calibrate again, or give --raw")
    return found


def load_faces(path: str, *, class_map: str | None = None, image_root: str | None = None, class_names):
    """Faces whose classes are the student's. Raises UserError where they are not."""
    from ngd_fast.faces.dataset import Faces

    faces = Faces.load(path, class_map=class_map, image_root=image_root)
    if tuple(faces.class_names) != tuple(class_names):
        raise UserError(
            f"{path}: its classes are {', '.join(faces.class_names)}, the student's {', '.join(class_names)}"
        )
    return faces
