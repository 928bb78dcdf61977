"""Runs as a trainer leaves them, with predictions drawn from a known model instead of a network; an untrained student
and faces for it; the command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ngd_fast.artifacts.files import write_json, write_sums, write_text
from ngd_fast.artifacts.fingerprint import make_fingerprint
from ngd_fast.cli import main
from ngd_fast.evaluation.metrics import evaluate_predictions
from ngd_fast.evaluation.predictions import Predictions
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.student.networks import build_student
from ngd_fast.student.weights import save_student

VALID_COUNTS = (120, 90, 40, 35, 30, 6, 8, 5)  # FERPlus' imbalance, a tenth of its size


def draw(counts=VALID_COUNTS, *, signal=2.0, seed=0, dataset="faces_valid"):
    """Predictions whose labels are the same for every ``seed``; the true class's logit stands out by ``signal``."""
    labels = np.repeat(np.arange(len(CLASS_NAMES)), counts)
    labels = np.random.default_rng(7).permutation(labels)
    rng = np.random.default_rng((seed, 1))
    logits = rng.normal(size=(len(labels), len(CLASS_NAMES)))
    logits[np.arange(len(labels)), labels] += signal
    centers = np.random.default_rng(3).normal(size=(len(CLASS_NAMES), 16))
    features = centers[labels] * 0.3 * signal + rng.normal(size=(len(labels), 16))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    names = [f"face{i:05d}.png" for i in range(len(labels))]
    return Predictions(logits, labels, names, CLASS_NAMES, dataset, features=features)


def write_run(folder, *, variant="B0", seed=1, signal=2.0, resamples=50):
    """A finished run: predictions, metrics, log, configuration, fingerprint, checksums."""
    predictions = draw(signal=signal, seed=seed)
    predictions.save(folder / "predictions_valid.npz")
    metrics = {
        "run": folder.name,
        "variant": variant,
        "seed": seed,
        "dataset": predictions.dataset,
        "best_epoch": 3,
        "valid": evaluate_predictions(predictions, bootstrap=resamples),
        "config": {
            "arch": "resnet18",
            "image_size": 48,
            "epochs": 4,
            "batch_size": 64,
            "lr": 2e-4,
            "precision": "bf16",
        },
    }
    write_json(folder / "metrics.json", metrics)
    geo = "{var_cap: 0.2, margin: 0.5, schedule: {kind: late_cosine, start: 1.0, end: 3.0}}"
    write_text(folder / "config.yaml", f"name: {variant}\nseed: {seed}\nobjective:\n  geo: {geo}\n")
    epochs = [
        {
            "event": "epoch",
            "epoch": epoch,
            "loss": 2.0 / (epoch + 1),
            "ce": 1.5 / (epoch + 1),
            "geo_var": 0.3,
            "geo_weight": 0.012 * min(1.0, max(0.0, (epoch - 1) / 2)),
            "lr": 2e-4,
            "images_per_second": 900.0,
            "valid": {"accuracy": 0.5 + 0.05 * epoch, "macro_f1": 0.4 + 0.05 * epoch},
        }
        for epoch in range(5)
    ]
    write_text(folder / "log.jsonl", "".join(json.dumps(e) + "\n" for e in epochs))
    on = {"kd": variant != "B0", "proto": variant in ("B2", "B3"), "d_geo": variant == "B3"}
    weights = {"kd": 0.30, "proto": 0.12, "d_geo": 0.012}
    make_fingerprint(
        folder, variant=variant, seed=seed, switches=on, weights=weights, files={"config": folder / "config.yaml"}
    )
    write_sums(folder)
    return folder


def call(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code


def error_of(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    return next(line for line in lines if line.startswith(("error:", "Error:")))


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    """B0 to B3 with two seeds each; B3 is clearly better than B0. Read only."""
    root = tmp_path_factory.mktemp("outs")
    for i, variant in enumerate(("B0", "B1", "B2", "B3")):
        for seed in (1, 2):
            write_run(root / f"{variant}_seed{seed}", variant=variant, seed=seed, signal=1.8 + 0.3 * i)
    return root


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "B3_seed1", variant="B3")


@pytest.fixture
def make_predictions():
    return draw


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A run folder with an untrained student and its sums."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("outs") / "B1_seed7"
    meta = {
        "arch": "resnet18-w16", "class_names": CLASS_NAMES, "image_size": 32, "mean": 0.5, "std": 0.25,
        "embedding_dim": 256, "logit_scale": 1.0, "epoch": 1, "config_name": "B1", "seed": 7,
    }  # fmt: skip
    save_student(folder / "student_best.safetensors", build_student("resnet18-w16").state_dict(), meta)
    write_sums(folder)
    return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Twelve faces as NPZ, class folders, and CSV with AffectNet's numbers; no one shows disgust or contempt."""
    root = tmp_path_factory.mktemp("faces")
    images = np.random.default_rng(0).integers(0, 256, (12, 24, 24), dtype=np.uint8)
    names = [CLASS_NAMES[c] for c in (0, 1, 2, 3, 4, 6) * 2]
    dist = np.eye(8, dtype=np.float32)[[CLASS_NAMES.index(n) for n in names]]
    np.savez(root / "toy.npz", images=images, label_dist=dist, names=np.array([f"{i}.png".encode() for i in range(12)]))
    lines = ["filepath,label"]
    affectnet = {"neutral": 0, "happiness": 1, "sadness": 2, "surprise": 3, "fear": 4, "anger": 6}
    for i, (image, name) in enumerate(zip(images, names)):
        (root / "tree" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "tree" / name / f"{i}.png")
        lines.append(f"{name}/{i}.png,{affectnet[name]}")
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    (root / "map.json").write_text(json.dumps(affectnet))
    return root
