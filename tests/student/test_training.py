"""Whole runs: what a run folder holds, exact resume after any end, and every fault that a user can cause."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ngd_fast.artifacts.files import sha256
from ngd_fast.artifacts.verify import verify
from ngd_fast.config import dump_config
from ngd_fast.errors import UserError
from ngd_fast.evaluation.predictions import Predictions
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.feeds import make_feed
from ngd_fast.student import graph, run, session
from ngd_fast.student.config import FeedConfig
from ngd_fast.student.distributed import Ranks
from ngd_fast.student.inference import predict
from ngd_fast.student.networks import Student
from ngd_fast.student.run import train_student, train_students
from ngd_fast.student.session import Session
from ngd_fast.student.step import StudentStep
from ngd_fast.student.trainer import Trainer
from ngd_fast.student.weights import load_student
from ngd_fast.synthetic.faces import make_faces

RAMP = ("objective.geo.schedule.start=0", "objective.geo.schedule.end=1")


def final_state(folder) -> dict:
    return torch.load(folder / "student_last.ckpt", weights_only=True)["state"]


def assert_same_run(a, b):
    """Weights, optimizer, best epoch and best student: bit for bit."""
    left, right = final_state(a), final_state(b)
    for name, value in left["step"]["student"].items():
        assert torch.equal(value, right["step"]["student"][name]), name
    for key, state in left["step"]["optimizer"].items():
        for name, value in state.items():
            assert torch.equal(value, right["step"]["optimizer"][key][name]), (key, name)
    assert left["step"]["step"] == right["step"]["step"]
    for name in ("epoch", "step", "best", "best_epoch"):
        assert left["progress"][name] == right["progress"][name], name
    assert sha256(a / "student_best.safetensors") == sha256(b / "student_best.safetensors")
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (a, b)]
    assert [line["epoch"] for line in logs[0]] == [line["epoch"] for line in logs[1]]
    for ours, theirs in zip(*logs):
        assert ours["valid"] == theirs["valid"] and ours["loss"] == pytest.approx(theirs["loss"], rel=1e-12)


@pytest.fixture(scope="module")
def finished(small_config, teacher, tmp_path_factory):
    """A B3 run, and the configuration it was made from."""
    config = small_config("B3", f"objective.kd.teacher={teacher}", *RAMP)
    folder = tmp_path_factory.mktemp("finished") / "B3_seed1"
    return config, folder, train_student(config, folder)


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


def test_students_on_other_data_cannot_train_side_by_side(small_config, tmp_path):
    configs = [small_config("B0"), small_config("B0", "data.image_size=32")]
    with pytest.raises(UserError, match=r"differ in data\.image_size"):
        train_students(configs, [tmp_path / "a", tmp_path / "b"])


# -- ends before the end -------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch, step: int, what):
    """Call ``what`` when the optimizer is about to make its step number ``step``."""
    run, count = StudentStep.run, [0]

    def counted(self, *args):
        count[0] += 1
        if count[0] == step:
            what()
        return run(self, *args)

    monkeypatch.setattr(StudentStep, "run", counted)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [1, 5, 6, 7, 12])
def test_resume_after_an_end_at_any_step(finished, tmp_path, monkeypatch, step):
    """Steps 1-6 are the first epoch: before any checkpoint, between two of an epoch, at its edge, at the end."""
    config, folder, _ = finished
    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every": 2})})

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        interrupt_at(patch, step, kill)
        with pytest.raises(Killed):
            train_student(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()
    train_student(config, tmp_path / "run", resume=True)
    assert_same_run(folder, tmp_path / "run")
    assert verify(tmp_path / "run")[0].problems == []


def test_resume_within_an_epoch_fed_by_dali(small_config, tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    config = small_config("B0", "feed.kind=dali", "train.checkpoint_every=2")

    def kill():
        raise Killed

    train_student(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 10, kill)
        with pytest.raises(Killed):
            train_student(config, tmp_path / "parts")
    assert final_state(tmp_path / "parts")["progress"]["step"] == 2
    train_student(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resident_feed_trains_the_same_and_resumes_within_an_epoch(finished, tmp_path, monkeypatch):
    """Its batches are made inside the steps; a run may also go on with another feed."""
    config, folder, _ = finished
    train = config.train.model_copy(update={"checkpoint_every": 2})
    config = config.model_copy(update={"train": train, "feed": FeedConfig(kind="resident")})

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        interrupt_at(patch, 10, kill)
        with pytest.raises(Killed):
            train_student(config, tmp_path / "run")
    assert final_state(tmp_path / "run")["progress"]["step"] == 2
    train_student(config, tmp_path / "run", resume=True)
    assert_same_run(folder, tmp_path / "run")


STAGES = "train.resolution=[{from_epoch: 0, image_size: 16}, {from_epoch: 1, image_size: 20}]"


@pytest.fixture(scope="module")
def grown(small_config, teacher, tmp_path_factory):
    """A run whose views grow from 16 to 20 px and whose validation is at 24 px, and its configuration."""
    config = small_config("B3", f"objective.kd.teacher={teacher}", *RAMP, STAGES, "train.checkpoint_every=4")
    folder = tmp_path_factory.mktemp("grown") / "B3_seed1"
    return config, folder, train_student(config, folder)


def test_progressive_resolution_is_for_training_alone(grown, files):
    config, folder, metrics = grown
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["image_size"] for line in lines] == [16, 20]
    assert metrics["config"]["image_size"] == 24
    assert [tuple(stage.values()) for stage in metrics["config"]["resolution"]] == [(0, 16), (1, 20)]
    student, meta = load_student(folder)
    assert meta["image_size"] == 24
    predictions = predict(student, meta, Faces.load(files["valid"]), feed="torch")
    accuracy = (predictions.logits.argmax(1) == predictions.labels).mean()
    assert lines[metrics["best_epoch"] - 1]["valid"]["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("kind", ["torch", "resident", "dali"])
@pytest.mark.parametrize("step", [2, 6, 7, 12])
def test_progressive_resolution_resumes_in_any_stage(grown, kind, step, tmp_path, monkeypatch):
    config, folder, _ = grown
    config = config.model_copy(update={"feed": FeedConfig(kind=kind)})
    if kind == "dali":  # resamples to 1e-3 of the other feeds' views
        pytest.importorskip("nvidia.dali")
        folder = tmp_path / "whole"
        train_student(config, folder)

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        interrupt_at(patch, step, kill)
        with pytest.raises(Killed):
            train_student(config, tmp_path / "run")
    train_student(config, tmp_path / "run", resume=True)
    assert_same_run(folder, tmp_path / "run")


@pytest.mark.parametrize("kind", ["torch", "resident"])
def test_graphs_train_the_same_and_their_making_is_no_training(grown, kind, tmp_path, monkeypatch):
    """With a "graph" that runs its step line by line when replayed, and takes half a second to make."""
    config, folder, _ = grown
    monkeypatch.setattr(run, "_on", lambda name, *args, **options: name == "cuda_graph")
    monkeypatch.setattr(graph, "_aside", contextlib.nullcontext)
    made = []

    def record(step):
        time.sleep(0.5)
        made.append(step)
        return SimpleNamespace(replay=step)

    monkeypatch.setattr(graph, "_record", record)
    begin = time.perf_counter()
    metrics = train_student(config.model_copy(update={"feed": FeedConfig(kind=kind)}), tmp_path / "run")
    elapsed = time.perf_counter() - begin
    assert_same_run(folder, tmp_path / "run")
    assert len(made) == 2, "each stage has a graph of its own"
    train = metrics["train"]
    assert train["preparing"] > 1 and train["seconds"] + train["preparing"] < elapsed
    assert train["images_per_second"] == pytest.approx(2 * 96 / train["seconds"])
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["total_seconds"] == train["seconds"]


def test_progressive_resolution_with_cached_logits_of_the_full_size(small_config, teacher, tmp_path):
    kd = (f"objective.kd.teacher={teacher}", "objective.kd.cached=true")
    for out, more in (("plain", ()), ("grown", (STAGES,))):
        train_student(small_config("B1", *kd, *more), tmp_path / out)
    assert len(list((tmp_path / "kd_cache").iterdir())) == 1, "one file of logits serves both"


def test_network_for_one_size_alone_is_refused(small_config, tmp_path, monkeypatch):
    def forward(self, images):
        assert images.shape[-1] == 24, f"Wrong image width! Expected 24 but got {images.shape[-1]}"

    monkeypatch.setattr(Student, "forward", forward)
    with pytest.raises(UserError, match=r"train\.resolution: model\.arch resnet18-w4 takes no images of 16 px: Wrong"):
        train_student(small_config("B0", STAGES), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_feed_with_an_incomplete_last_batch_is_refused(files):
    options = {"batch_size": 10, "image_size": 24, "train": True, "drop_last": False}
    feed = make_feed(Faces.load(files["train"]), kind="resident", **options)
    with pytest.raises(ValueError, match="train_feed: must leave incomplete batches out"):
        Trainer([], feed, feed, ranks=Ranks(), use_graph=False)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["resident", "dali", "torch"])
def test_graph_resumes_within_an_epoch_bit_for_bit(kind, small_config, teacher, tmp_path, monkeypatch):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    settings = ("device=cuda", f"feed.kind={kind}", "train.cuda_graph=true", "train.compile=false")
    kd = (f"objective.kd.teacher={teacher}", "objective.kd.cached=true")
    config = small_config("B3", *settings, *kd, *RAMP, STAGES, "train.checkpoint_every=2")
    train_student(config, tmp_path / "whole")
    read, seen = Session.read_history, [0]

    def dying(self, steps, done):
        seen[0] += steps
        if seen[0] >= 9:
            raise Killed
        return read(self, steps, done)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "read_history", dying)
        with pytest.raises(Killed):
            train_student(config, tmp_path / "parts")
    assert final_state(tmp_path / "parts")["progress"]["step"] == 2
    train_student(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def command(config, out, tmp_path, *more):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    return [sys.executable, "-m", "ngd_fast", "student", "train", "--config", str(path), "--out", str(out), *more]


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def wait_for(path, process, seconds=240):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


def test_killed_process_resumes_bit_for_bit(finished, tmp_path):
    config, folder, _ = finished
    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every": 1})})
    out = tmp_path / "run"
    with subprocess.Popen(
        command(config, out, tmp_path), stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        wait_for(out / "student_last.ckpt", process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    train_student(config, out, resume=True)
    assert_same_run(folder, out)


def test_sigterm_writes_a_checkpoint_and_exits_0(small_config, tmp_path):
    """1000 epochs cannot end by themselves while the signal is on its way."""
    config = small_config("B0", "train.epochs=1000")
    out = tmp_path / "run"
    with subprocess.Popen(
        command(config, out, tmp_path), stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        wait_for(out / "log.jsonl", process)
        wait_for(out / "student_last.ckpt", process)
        before = (out / "student_last.ckpt").stat().st_mtime_ns
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "--resume" in process.stderr.read()
    assert (out / "student_last.ckpt").stat().st_mtime_ns > before
    progress = final_state(out)["progress"]
    assert final_state(out)["step"]["step"] == progress["epoch"] * 6 + progress["step"] > 0
    assert not (out / "metrics.json").exists()


def test_sigterm_in_the_middle_of_an_epoch_resumes_bit_for_bit(finished, tmp_path, monkeypatch):
    config, folder, _ = finished
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train_student(config, tmp_path / "run") is None
    assert final_state(tmp_path / "run")["progress"]["step"] == 3
    train_student(config, tmp_path / "run", resume=True)
    assert_same_run(folder, tmp_path / "run")


def test_ctrl_c_writes_a_checkpoint_too(finished, tmp_path, monkeypatch, capsys):
    config, folder, _ = finished
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_student(config, tmp_path / "run")
    assert "--resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train_student(config, tmp_path / "run", resume=True)
    assert_same_run(folder, tmp_path / "run")


def test_checkpoints_at_epochs_ends_wait_their_time(finished, tmp_path, monkeypatch):
    """With the default of 20 s a run of one second writes its checkpoint and its best student once, at the end."""
    config, folder, _ = finished
    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_seconds": 20.0})})
    written = []

    def noting(save):
        return lambda path, *args, **options: (written.append(path.name), save(path, *args, **options))

    for name in ("save_student", "save_checkpoint"):
        monkeypatch.setattr(session, name, noting(getattr(session, name)))
    train_student(config, tmp_path / "run")
    assert written == ["student_best.safetensors", "student_last.ckpt"]
    assert_same_run(folder, tmp_path / "run")


def test_full_disk_keeps_the_old_checkpoint(small_config, tmp_path, monkeypatch):
    config = small_config("B0", "train.checkpoint_every=2")
    save, count = torch.save, [0]

    def full(content, file):
        count[0] += 1
        if count[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="no space left"):
            train_student(config, tmp_path / "run")
    assert final_state(tmp_path / "run")["progress"]["step"] == 2
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(small_config, tmp_path, monkeypatch):
    """(configuration, folder) of a run that ended after its first epoch."""
    config = small_config("B0")

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        interrupt_at(patch, 8, kill)
        with pytest.raises(Killed):
            train_student(config, tmp_path / "run")
    return config, tmp_path / "run"


def test_checkpoint_of_another_configuration_is_refused(started, small_config):
    _, folder = started
    with pytest.raises(UserError, match=r"differs in optimizer\.lr \(0\.001 there, 0\.002 here\)"):
        train_student(small_config("B0", "optimizer.lr=2e-3"), folder, resume=True)


def test_checkpoint_of_other_data_is_refused(started, small_config, tmp_path):
    _, folder = started
    make_faces(96, 5).save(tmp_path / "other.npz")
    with pytest.raises(UserError, match="another train data"):
        train_student(small_config("B0", f"data.train={tmp_path / 'other.npz'}"), folder, resume=True)


def test_moved_data_is_no_other_data(started, small_config, files, tmp_path):
    _, folder = started
    Faces.load(files["train"]).save(tmp_path / "moved.npz")
    assert train_student(small_config("B0", f"data.train={tmp_path / 'moved.npz'}"), folder, resume=True)


def test_truncated_checkpoint_is_refused(started):
    config, folder = started
    path = folder / "student_last.ckpt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated"):
        train_student(config, folder, resume=True)


def test_folder_of_another_run_is_not_overwritten(started):
    config, folder = started
    with pytest.raises(UserError, match="not empty"):
        train_student(config, folder)


def test_nan_names_step_and_term_and_keeps_the_last_good_checkpoint(started, monkeypatch):
    config, folder = started
    before = sha256(folder / "student_last.ckpt")
    objective = StudentStep.objective

    def broken(self, features, logits, batch, teacher_logits):
        out = objective(self, features, logits, batch, teacher_logits)
        if int(self.step) == 8:
            out = out._replace(total=out.total * float("nan"), ce=out.ce * float("nan"))
        return out

    monkeypatch.setattr(StudentStep, "objective", broken)
    with pytest.raises(
        UserError, match=r"the term ce is nan at step 9 \(epoch 2\); the last good checkpoint is .*ckpt"
    ):
        train_student(config, folder, resume=True)
    assert sha256(folder / "student_last.ckpt") == before


def test_real_divergence_is_caught(small_config, tmp_path):
    with pytest.raises(UserError, match=r"B0 \(seed 1\): .* at step \d+ .*no checkpoint had been written yet"):
        train_student(small_config("B0", "optimizer.lr=1e30", "train.clip_grad=null"), tmp_path / "run")


def test_too_little_device_memory_suggests_the_next_lower_batch(small_config, tmp_path, monkeypatch):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    interrupt_at(monkeypatch, 1, out_of_memory)
    with pytest.raises(UserError, match=r"batch of 16 faces does not fit .*train\.batch_size=8"):
        train_student(small_config("B0"), tmp_path / "run")
