"""What ``python -m ngd_fast.bench.fuzz`` throws bytes at, the other half: configurations, weights, a run's folder."""

import io
import json
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
from ngd_fast.bench.fuzz_targets import DATA, Target, finite, prediction_arrays, some_maps, texts, write

from ngd_fast.artifacts.files import save_npz, write_sums, write_text
from ngd_fast.faces.classes import CLASS_NAMES


def _json(data: bytes):
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _student_yaml(folder: Path, data: bytes) -> None:
    from ngd_fast.config import dump_config, load_config
    from ngd_fast.student.config import StudentConfig

    config = load_config(StudentConfig, write(folder / "c.yaml", data))
    write_text(folder / "again.yaml", dump_config(config))
    if load_config(StudentConfig, folder / "again.yaml") != config:
        raise AssertionError("a configuration that was written reads back as another")


def _overrides(folder: Path, data: bytes) -> None:
    from ngd_fast.config import load_config
    from ngd_fast.student.config import StudentConfig

    load_config(StudentConfig, None, data.decode("utf-8", "replace").split("\n"))


def _eeg_config(folder: Path, data: bytes) -> None:
    """The configuration is applied too: a setting must not take the memory or the time of a day."""
    from ngd_fast.config import load_config
    from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings
    from ngd_fast.eeg.trials import Trial, TrialSource

    config = load_config(EegConfig, write(folder / "c.yaml", data))
    channels = ("Fp1", "F3", "F4", "C3", "C4", "P3", "O2")
    signals = np.random.default_rng(0).normal(size=(7, 640)) * 20
    trial = lambda number: Trial(number, 1, signals + number, signals[:, :300], 128.0, 0.5, -0.5, "a trial")  # noqa: E731
    maps = topomaps_from_recordings(TrialSource("fuzz", channels, 2, lambda _: iter((trial(1), trial(2)))), config)
    finite(maps.maps, maps.power)


_EEG = {
    "window_seconds": 2.0, "window_overlap": 0.5, "bad_channels": "interpolate", "exclude_channels": ["O2"],
    "last_seconds": 4.0, "topomap": {"resolution": 16, "sphere": [0, 0, 0, 0.1], "border": "mean", "method": "linear"},
    "cleaning": {"band_pass": [1, 40], "notch": [50], "resample": 100, "reference": ["F3", "F4"], "detrend": "linear"},
    "power": {"segment_seconds": 1.0, "bands": {"alpha": [8, 13]}, "kind": "absolute", "baseline": "none"},
    "normalise": {"z_score": True, "clip": 3.0},
}  # fmt: skip


@cache
def _student_state():
    from ngd_fast.student.networks import build_student

    meta = {"arch": "resnet18-w1", "class_names": list(CLASS_NAMES), "image_size": 32, "mean": 0.5, "std": 0.25,
            "embedding_dim": 4, "logit_scale": 1.0, "seed": 1, "grey": False, "config_name": "B0"}  # fmt: skip
    return build_student("resnet18-w1", embedding_dim=4).state_dict(), meta


def _student_weights(folder: Path, data: bytes) -> None:
    """JSON is the metadata of a good network; anything else the whole file."""
    from safetensors.torch import save

    from ngd_fast.faces.dataset import Faces
    from ngd_fast.student.inference import predict
    from ngd_fast.student.weights import load_student

    state, _ = _student_state()
    if (meta := _json(data)) is not None:
        data = save(state, metadata={"ngd_fast": json.dumps(meta)})
    student, meta = load_student(write(folder / "student_best.safetensors", data))
    finite(*(p.detach().numpy() for p in student.state_dict().values()))
    if tuple(meta["class_names"]) == CLASS_NAMES and meta["image_size"] <= 64:
        faces = Faces(images=np.zeros((2, 9, 9), np.uint8))
        finite(predict(student, meta, faces).logits)


def _teacher_weights(folder: Path, data: bytes) -> None:
    from ngd_fast.eeg.manifest import Topomaps  # noqa: F401
    from ngd_fast.teacher.inputs import embed
    from ngd_fast.teacher.network import load_teacher

    state, _ = _teacher_state()
    if (meta := _json(data)) is not None:
        from safetensors.torch import save

        data = save(state, metadata={"ngd_fast": json.dumps(meta)})
    teacher, meta = load_teacher(write(folder / "teacher_best.safetensors", data))
    finite(*embed(teacher, meta, some_maps()))


@cache
def _teacher_state():
    from ngd_fast.teacher.config import InputConfig, NetworkConfig
    from ngd_fast.teacher.network import Teacher

    network = NetworkConfig(width=4)
    meta = {"network": network.model_dump(mode="json"), "bands": 2, "resolution": 8, "band_names": ["alpha", "beta"],
            "input": InputConfig().model_dump(mode="json"), "maps_sha256": "0" * 64, "train_subjects": [1],
            "validation_subjects": [2]}  # fmt: skip
    return {k: v.contiguous() for k, v in Teacher(2, 8, network).state_dict().items()}, meta


def _torch_zip(data: bytes) -> bytes:
    """The members of a torch file with their checksums made right again."""
    if not data.startswith(b"\x80"):
        return data
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n"), ("data/0", bytes(64))):
            archive.writestr(f"a/{name}", content)
    return file.getvalue()


def _torch_weights(folder: Path, data: bytes) -> None:
    from ngd_fast.student.resnet import ResNet
    from ngd_fast.student.weights import load_backbone_weights

    backbone = ResNet(18, 1)
    load_backbone_weights(backbone, write(folder / "w.pth", _torch_zip(data)))
    finite(*(p.detach().numpy() for p in backbone.state_dict().values()))


def _checkpoint(folder: Path, data: bytes) -> None:
    from ngd_fast.student.checkpoint import load_checkpoint, progress_of

    path = write(folder / "student_last.ckpt", _torch_zip(data))
    progress_of(path)
    load_checkpoint(path, config={"seed": 1}, checksums={"bank": "0"})


def _torch_seeds() -> list[bytes]:
    import torch

    seeds = []
    for content in (
        {"bn1.weight": torch.ones(1), "bn1.bias": torch.zeros(1)},
        {"format": 1, "config": {"seed": 1}, "checksums": {"bank": "0"},
         "state": {"progress": {"epoch": 1, "step": 0}}},
    ):
        file = io.BytesIO()
        torch.save(content, file)
        seeds.append(file.getvalue())
        with zipfile.ZipFile(file) as archive:
            seeds.append(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
    return seeds


def _run_seed() -> dict:
    from ngd_fast.evaluation.metrics import evaluate_predictions
    from ngd_fast.evaluation.predictions import Predictions

    p = prediction_arrays()
    found = Predictions(p["logits"], p["labels"], p["names"].tolist(), CLASS_NAMES, "fuzz_valid")
    config = {"arch": "resnet18", "image_size": 48, "epochs": 4, "batch_size": 64, "lr": 2e-4, "precision": "bf16"}
    geo = {"var_cap": 0.2, "margin": 0.5, "schedule": {"kind": "late_cosine", "start": 1.0, "end": 3.0}}
    source = {"path": "metrics.json", "sha256": "0"}
    return {
        "metrics.json": {
            "run": "B3_seed1", "variant": "B3", "seed": 1, "dataset": "fuzz_valid", "best_epoch": 3, "config": config,
            "valid": evaluate_predictions(found, bootstrap=3), "train": {"images_per_second": 9.0, "seconds": 3.0},
        },
        "ablation_fingerprint.json": {
            "variant": "B3", "seed": 1, "switches": {"kd": True, "d_geo": True}, "weights": {"kd": 0.3},
            "files": {"config": {"path": "config.yaml", "sha256": "0"}}, "checksums": {}, "commit": "abc",
            "environment": {"torch": "2", "devices": []},
        },
        "config.yaml": {"name": "B3", "objective": {"geo": geo}},
        "log.jsonl": {"event": "epoch", "epoch": 0, "loss": 2.0, "ce": 1.5, "lr": 2e-4, "valid": {"accuracy": 0.5}},
        "xval_main.json": {"kind": "xval_main", "blocks": [], "sources": [source]},
        "ablation_lite.json": {"kind": "ablation_lite", "protocol": "eight_way", "baseline": "B3", "resamples": 3,
                               "sources": [source], "rows": []},
        "SHA256SUMS.txt": "0" * 64 + "  ../../x\n",
    }  # fmt: skip


def _run(folder: Path, data: bytes) -> None:
    """A run's folder handed to verify, table and report; figures are drawn, not saved."""
    from ngd_fast.artifacts import report_sections
    from ngd_fast.artifacts.report import write_report
    from ngd_fast.artifacts.verify import verify

    files = _json(data)
    folder = folder / "run"
    save_npz(folder / "predictions_valid.npz", prediction_arrays())
    for name, content in files.items() if isinstance(files, dict) else [("metrics.json", None)]:
        name = name if name in _run_seed() else "metrics.json"
        text = content if isinstance(content, str) else json.dumps(content)
        write(folder / name, data if content is None else text.encode("utf-8", "surrogatepass"))
    write(folder / "ablation_lite.tex", b"")
    for found in verify(folder):
        "\n".join((*found.problems, *found.checked, *found.notes)).encode()
    (folder / "SHA256SUMS.txt").unlink(missing_ok=True)
    whole, report_sections.Report.figure = report_sections.Report.figure, lambda *_: ""
    try:
        page = write_report([folder], folder.parent / "report.html", viz=None, embedding="none").read_text()
    finally:
        report_sections.Report.figure = whole
    if "<script" in page or "onerror=" in page.replace("&quot;", ""):
        raise AssertionError("HTML was injected")


def _log(folder: Path, data: bytes) -> None:
    from ngd_fast.evaluation.figures_training import read_log, timeline_figure
    from ngd_fast.student.runlog import RunLog

    epochs = read_log(write(folder / "log.jsonl", data))
    timeline_figure({"a": [epochs], "b": [epochs, epochs]}, (0, 3))
    log = RunLog(folder, 1)
    log.close()
    read_log(folder / "log.jsonl")


def _sums(folder: Path, data: bytes) -> None:
    from ngd_fast.artifacts.verify import verify

    write(folder / "a.txt", b"a")
    write_sums(folder)
    verify(write(folder / "SHA256SUMS.txt", data).parent)


TARGETS = {
    **DATA,
    "student_yaml": Target(
        _student_yaml,
        texts(json.dumps({"seed": 1, "name": "x", "model": {"arch": "resnet18"}, "optimizer": {"lr": 1e-3}}),
               "a: &a [1]\nb: *a\n", "train:\n  resolution: [{from_epoch: 0, image_size: 48}]\n"),
    ),
    "overrides": Target(_overrides, texts("optimizer.lr=1e-3\nname=a", "objective.geo={weight: 0.1}")),
    "eeg_yaml": Target(_eeg_config, lambda: [json.dumps(_EEG).encode()]),
    "student": Target(_student_weights, lambda: [json.dumps(_student_state()[1]).encode()]),
    "teacher": Target(_teacher_weights, lambda: [json.dumps(_teacher_state()[1]).encode()]),
    "torch_weights": Target(_torch_weights, _torch_seeds),
    "checkpoint": Target(_checkpoint, _torch_seeds),
    "run": Target(_run, lambda: [json.dumps(_run_seed()).encode(), b'{"metrics.json": {}}']),
    "log": Target(_log, lambda: [(json.dumps(_run_seed()["log.jsonl"]) + "\n").encode() * 2]),
    "sums": Target(_sums, texts("0" * 64 + "  a.txt\n")),
}  # fmt: skip
