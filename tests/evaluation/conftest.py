"""Runs as a trainer leaves them, with predictions drawn from a known model instead of a network."""

import json

import numpy as np
import pytest

from ngd_fast.artifacts.files import write_json, write_sums, write_text
from ngd_fast.artifacts.fingerprint import make_fingerprint
from ngd_fast.evaluation.metrics import evaluate_predictions
from ngd_fast.evaluation.predictions import Predictions

CLASSES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
VALID_COUNTS = (120, 90, 40, 35, 30, 6, 8, 5)  # FERPlus' imbalance, a tenth of its size


def draw(counts=VALID_COUNTS, *, signal=2.0, seed=0, dataset="faces_valid"):
    """Predictions whose labels are the same for every ``seed``; the true class's logit stands out by ``signal``."""
    labels = np.repeat(np.arange(len(CLASSES)), counts)
    labels = np.random.default_rng(7).permutation(labels)
    rng = np.random.default_rng((seed, 1))
    logits = rng.normal(size=(len(labels), len(CLASSES)))
    logits[np.arange(len(labels)), labels] += signal
    centers = np.random.default_rng(3).normal(size=(len(CLASSES), 16))
    features = centers[labels] * 0.3 * signal + rng.normal(size=(len(labels), 16))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    names = [f"face{i:05d}.png" for i in range(len(labels))]
    return Predictions(logits, labels, names, CLASSES, dataset, features=features)


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
