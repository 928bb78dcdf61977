"""Whole runs: what a run folder holds, the same bits from the same seed, students side by side."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import assert_same_run, final_state

from ngd_fast.artifacts.files import sha256
from ngd_fast.artifacts.verify import verify
from ngd_fast.errors import UserError
from ngd_fast.evaluation.predictions import Predictions
from ngd_fast.faces.dali import DaliFeed
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.feeds import Feed
from ngd_fast.student.inference import predict
from ngd_fast.student.run import train_student, train_students
from ngd_fast.student.trainer import _Clock
from ngd_fast.student.weights import load_student


def test_run_folder_holds_what_it_should_and_verifies(finished):
    _, folder, metrics = finished
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "config.yaml",
        "ablation_fingerprint.json",
        "metrics.json",
        "log.jsonl",
        "student_best.safetensors",
        "student_last.ckpt",
        "predictions_valid.npz",
        "tb",
        "SHA256SUMS.txt",
    }
    (found,) = verify(folder)
    assert found.problems == [] and len(found.checked) == 3
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["variant"] == "B3" and metrics["dataset"] == "valid" and metrics["train"]["images_per_second"] > 0
    assert metrics["valid"]["eight_way"]["n"] == 40


def test_fingerprint_names_switches_weights_and_inputs(finished, files):
    _, folder, _ = finished
    fingerprint = json.loads((folder / "ablation_fingerprint.json").read_text())
    assert fingerprint["switches"] == {"ce": True, "kd": True, "proto": True, "d_geo": True}
    assert fingerprint["weights"] == {"ce": 1.0, "kd": 0.30, "proto": 0.12, "d_geo": 0.012}
    assert set(fingerprint["files"]) == {"config", "weights", "data_train", "data_valid", "bank", "teacher"}
    assert fingerprint["files"]["bank"]["sha256"] == sha256(files["bank"])


def test_log_has_every_term_and_the_ramp(finished):
    lines = [json.loads(line) for line in (finished[1] / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        kd, proto = 0.30 * line["kd"], 0.12 * line["proto"]
        assert line["loss"] >= line["ce"] + kd + proto - 1e-6
        assert 0 <= line["data_wait"] < 1 and line["images_per_second"] > 0
    assert 0 < lines[0]["geo_weight"] < lines[1]["geo_weight"] == pytest.approx(0.012)
    assert lines[0]["lr"] > lines[1]["lr"]


def test_reading_faces_again_in_another_size_is_waiting_for_data(small_config, tmp_path, monkeypatch):
    set_image_size = Feed.set_image_size
    monkeypatch.setattr(Feed, "set_image_size", lambda *args: (time.sleep(0.5), set_image_size(*args)))
    resolution = "train.resolution=[{from_epoch: 0, image_size: 16}]"
    train = train_student(small_config("B0", resolution, "train.epochs=1"), tmp_path / "run")["train"]
    assert 0.5 < train["data_wait"] * train["seconds"] < train["seconds"]


def test_a_gpu_waits_for_data_only_when_it_has_run_dry(monkeypatch):
    """And goes on waiting where the data come later on a stream of their own than the host has asked for them."""
    host, device = 0.0, 0.0  # now, and when the work that was given to the device is done; milliseconds

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(host, device)

        def elapsed_time(self, end):
            return end.at - self.at

        def synchronize(self):
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = _Clock(torch.device("cuda"), SimpleNamespace(preparing=0.0))
    for work, fetching, arrives, waited in ((7, 5, 0, 0), (0, 4, 0, 2), (1, 0, 15, 5)):
        device = max(host, device) + work
        with clock.waiting():
            host += fetching
            device = max(device, arrives)
        assert clock.take()["waited"] == pytest.approx(waited / 1000)


def test_dali_keeps_its_pipeline_over_epochs_that_end_within_a_step(small_config, tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    build, built = DaliFeed._build, []
    monkeypatch.setattr(DaliFeed, "_build", lambda feed: (built.append(feed.train), build(feed))[1])
    train_student(small_config("B0", "feed.kind=dali", "train.accumulation=4"), tmp_path / "run")
    assert built == [True, False], "one for training, one for validation"


def test_steps_that_fp16_leaves_out_are_not_in_the_log(small_config, tmp_path):
    """Their gradient's norm is infinite, which JSON cannot hold."""
    train_student(small_config("B0", "train.precision=fp16", "model.logit_scale=100"), tmp_path / "run")
    assert final_state(tmp_path / "run")["step"]["scaler"]["scale"] < 65536, "no step was left out"
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["grad_norm"] < 1000 for line in lines)


def test_predictions_come_from_the_best_student(finished, files):
    _, folder, metrics = finished
    kept = Predictions.load(folder / "predictions_valid.npz")
    student, meta = load_student(folder)
    assert meta["epoch"] == metrics["best_epoch"]
    again = predict(student, meta, Faces.load(files["valid"]), feed="torch")
    np.testing.assert_allclose(again.logits, kept.logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(kept.features, axis=1), 1, rtol=1e-5)
    assert kept.names == again.names and (kept.labels == again.labels).all()


def test_flip_averages_the_mirror_image(finished, files):
    student, meta = load_student(finished[1])
    faces = Faces.load(files["valid"])
    mirrored = Faces(images=faces.images[:, :, ::-1], label_dist=faces.label_dist, names=faces.names)
    one, other = (predict(student, meta, f, feed="torch") for f in (faces, mirrored))
    both = predict(student, meta, faces, feed="torch", flip_tta=True)
    np.testing.assert_allclose(both.logits, (one.logits + other.logits) / 2, rtol=0, atol=1e-5)


def test_validation_in_the_log_is_that_of_the_best_epoch(finished):
    _, folder, metrics = finished
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    best = lines[metrics["best_epoch"] - 1]["valid"]
    assert best["macro_f1"] == max(line["valid"]["macro_f1"] for line in lines)
    assert best["macro_f1"] == pytest.approx(metrics["valid"]["eight_way"]["macro_f1"], abs=1e-12)


def test_same_seed_same_bits(finished, tmp_path):
    config, folder, _ = finished
    train_student(config, tmp_path / "again")
    assert_same_run(folder, tmp_path / "again")


def test_finished_run_is_left_alone(finished):
    config, folder, metrics = finished
    before = sha256(folder / "SHA256SUMS.txt")
    assert train_student(config, folder, resume=True) == metrics
    assert sha256(folder / "SHA256SUMS.txt") == before


def test_finished_run_of_another_configuration_is_refused(finished, small_config):
    with pytest.raises(UserError, match=r"finished run that differs in name, objective\.geo\.schedule\.end"):
        train_student(small_config("B0"), finished[1], resume=True)


def test_side_by_side_students_are_the_same_as_alone(finished, small_config, tmp_path):
    config, folder, _ = finished
    outs = [tmp_path / "B0", tmp_path / "B3"]
    train_students([small_config("B0"), config], outs)
    assert_same_run(folder, outs[1])


@pytest.mark.parametrize("change", ["data.image_size=32", "data.train=other.npz", "train.log_every=3"])
def test_students_on_other_data_or_at_another_pace_cannot_train_side_by_side(small_config, tmp_path, change):
    configs = [small_config("B0"), small_config("B0", change)]
    with pytest.raises(UserError, match=f"differ in {change.partition('=')[0]}"):
        train_students(configs, [tmp_path / "a", tmp_path / "b"])
