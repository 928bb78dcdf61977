"""Training end to end on drawn-up faces: images a second and the share of waiting, by feed, against plain PyTorch.

Ours is ``train_student`` itself, into a temporary folder; its numbers are those that it logs for each epoch (without
validation) after the first, which compiles. Plain PyTorch (:mod:`plain`) draws its views from device memory.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from ngd_fast.bench import feeds, plain, step

VARIANTS = ("B0", "B3")
COLUMNS = ("variant", "batch", "implementation", "feed", "images/s", "waiting %")


def measure(
    variant: str,
    batch: int,
    image_size: int,
    device: torch.device,
    *,
    kinds: Sequence[str] | None = None,
    hows: Sequence[str] | None = None,
    arch: str = "resnet18",
    teacher_arch: str = "resnet50",
    images: int = 28_160,
    epochs: int = 3,
    settings: Sequence[str] = (),
) -> list[dict]:
    """Rows for one variant: our trainer with each feed of ``kinds``, plain PyTorch in each way of ``hows``.

    ``images`` is the number of faces in an epoch, ``settings`` are key=value overrides of the configuration.
    """
    hows = hows if hows is not None else plain.HOWS if device.type == "cuda" else ("eager",)
    rows = []
    for kind in kinds if kinds is not None else feeds.kinds(device):
        torch.compiler.reset()
        overrides = [f"model.arch={arch}", f"data.image_size={image_size}", f"train.batch_size={batch}", *settings]
        speeds = _trained(variant, kind, device, teacher_arch, images, epochs + 1, overrides)
        rows.append({"implementation": "ngd_fast", "feed": kind, **speeds})
    for how in hows:
        torch.compiler.reset()
        inputs = step.Inputs(variant, batch, image_size, device, arch, teacher_arch)
        speed = _plain(how, inputs, images, epochs)
        rows.append({"implementation": f"PyTorch {how}", "feed": "on the device", "images/s": speed, "waiting %": None})
    return [{"variant": variant, "batch": batch, **row} for row in rows]


def table(rows: Sequence[dict]) -> list[list[str]]:
    """Cells in the order of COLUMNS."""
    waiting = lambda row: "" if row["waiting %"] is None else f"{row['waiting %']:.2f}"  # noqa: E731
    return [[*(str(row[name]) for name in COLUMNS[:4]), f"{row['images/s']:,.0f}", waiting(row)] for row in rows]


def _trained(
    variant: str, kind: str, device: torch.device, teacher_arch: str, images: int, epochs: int, overrides: list[str]
) -> dict[str, float]:
    """Medians over the epochs but the first of a run of ours."""
    from ngd_fast.student.config import load_student_config
    from ngd_fast.student.run import train_student
    from ngd_fast.student.runlog import LOG_NAME

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = _write_files(folder, images, teacher_arch)
        config = load_student_config(
            variant,
            [
                *(f"{key}={path}" for key, path in files.items() if variant == "B3" or key.startswith("data")),
                f"device={device.type}",
                f"feed.kind={kind}",
                f"train.precision={'bf16' if device.type == 'cuda' else 'fp32'}",
                f"train.epochs={epochs}",
                "train.bootstrap=0",
                "objective.geo.schedule.kind=constant",
                *overrides,
            ],
        )
        train_student(config, folder / "run")
        lines = [json.loads(line) for line in (folder / "run" / LOG_NAME).read_text().splitlines()[1:]]
    return {
        "images/s": statistics.median(line["images_per_second"] for line in lines),
        "waiting %": 100 * statistics.median(line["data_wait"] for line in lines),
    }


def _write_files(folder: Path, images: int, teacher_arch: str) -> dict[str, Path]:
    """Random faces, a bank of random prototypes and a teacher that has learned nothing, by their keys."""
    from ngd_fast.faces.classes import CLASS_NAMES
    from ngd_fast.prototypes.bank import PrototypeBank
    from ngd_fast.student.networks import build_student
    from ngd_fast.student.weights import save_student

    files = {
        "data.train": folder / "train.npz",
        "data.valid": folder / "valid.npz",
        "objective.proto.bank": folder / "bank.npz",
        "objective.kd.teacher": folder / "teacher.safetensors",
    }
    feeds.make_faces(images).save(files["data.train"])
    feeds.make_faces(64).save(files["data.valid"])
    rng = torch.Generator().manual_seed(0)
    ratings = torch.rand(2, 500, generator=rng) * 2 - 1
    bank = PrototypeBank.build(torch.randn(500, 256, generator=rng), ratings[0], ratings[1])
    bank.save(files["objective.proto.bank"])
    torch.manual_seed(0)
    meta = {"arch": teacher_arch, "class_names": list(CLASS_NAMES), "image_size": 224, "mean": 0.5, "std": 0.25}
    teacher = build_student(teacher_arch).state_dict()
    save_student(files["objective.kd.teacher"], teacher, {**meta, "embedding_dim": 256})
    return files


def _plain(how: str, inputs: "step.Inputs", images: int, epochs: int) -> float:
    """Images a second of plain PyTorch over ``epochs`` after one to warm up."""
    faces = feeds.make_faces(images)
    pixels = torch.from_numpy(faces.images).unsqueeze(1).to(inputs.device)
    labels = torch.from_numpy(faces.labels).to(inputs.device)
    rows = torch.zeros(inputs.batch, dtype=torch.int64, device=inputs.device)
    views = plain.make_views(pixels, labels, rows, inputs.image_size, compiled=how != "eager")
    call = step.plain_step(how, inputs, views)

    def epoch():
        order = torch.randperm(images, device=inputs.device)
        for first in range(0, images - inputs.batch + 1, inputs.batch):
            rows.copy_(order[first : first + inputs.batch])
            call()
        if inputs.device.type == "cuda":
            torch.cuda.synchronize()

    with step.kept_settings():
        torch.set_float32_matmul_precision("high")
        epoch()
        start = time.perf_counter()
        for _ in range(epochs):
            epoch()
        return epochs * (images // inputs.batch) * inputs.batch / (time.perf_counter() - start)
