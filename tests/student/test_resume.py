"""Ends before the end: a run that was interrupted in any way goes on to the same bits."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from runs import RAMP, Killed, assert_same_run, final_state, interrupt_at, kill_at

from ngd_fast.artifacts.verify import verify
from ngd_fast.config import dump_config
from ngd_fast.errors import UserError
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.feeds import make_feed
from ngd_fast.student import run, session, step_runner
from ngd_fast.student.config import FeedConfig
from ngd_fast.student.distributed import Ranks
from ngd_fast.student.inference import predict
from ngd_fast.student.networks import Student
from ngd_fast.student.run import train_student
from ngd_fast.student.session import Session
from ngd_fast.student.trainer import Trainer
from ngd_fast.student.weights import load_student


@pytest.mark.parametrize("step", [1, 5, 6, 7, 12])
def test_resume_after_an_end_at_any_step(finished, tmp_path, monkeypatch, step):
    """Steps 1-6 are the first epoch: before any checkpoint, between two of an epoch, at its edge, at the end."""
    config, folder, _ = finished
    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every": 2})})

    kill_at(monkeypatch, step, config, tmp_path / "run")
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

    kill_at(monkeypatch, 10, config, tmp_path / "run")
    assert final_state(tmp_path / "run")["progress"]["step"] == 2
    train_student(config, tmp_path / "run", resume=True)
    assert_same_run(folder, tmp_path / "run")


def test_network_that_draws_random_numbers_resumes_beside_a_teacher(small_config, teacher, tmp_path, monkeypatch):
    """Making the teacher draws some too, which must not come between the checkpoint's and the next step's."""
    classify = Student.classify

    def with_dropout(self, projected):
        return classify(self, torch.nn.functional.dropout(projected, training=self.training))

    monkeypatch.setattr(Student, "classify", with_dropout)
    config = small_config("B1", f"objective.kd.teacher={teacher}")
    train_student(config, tmp_path / "whole")
    kill_at(monkeypatch, 9, config, tmp_path / "parts")
    train_student(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_muon_resumes_within_an_epoch(small_config, tmp_path, monkeypatch):
    config = small_config("B0", "optimizer.kind=muon", "model.arch=resnet18-w8", "train.checkpoint_every=2")
    train_student(config, tmp_path / "whole")
    kill_at(monkeypatch, 10, config, tmp_path / "parts")
    progress = final_state(tmp_path / "parts")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2)
    train_student(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


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

    kill_at(monkeypatch, step, config, tmp_path / "run")
    train_student(config, tmp_path / "run", resume=True)
    assert_same_run(folder, tmp_path / "run")


@pytest.mark.parametrize("kind", ["torch", "resident"])
def test_graphs_train_the_same_and_their_making_is_no_training(grown, kind, tmp_path, monkeypatch):
    """With a "graph" that runs its step line by line when replayed, and takes half a second to make."""
    config, folder, _ = grown
    monkeypatch.setattr(run, "_on", lambda name, *args, **options: name == "cuda_graph")
    monkeypatch.setattr(step_runner, "_aside", contextlib.nullcontext)
    made = []

    def record(step):
        time.sleep(0.5)
        made.append(step)
        return SimpleNamespace(replay=step)

    monkeypatch.setattr(step_runner, "_record", record)
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


@pytest.mark.parametrize(("step", "progress"), [(9, (1, 3)), (12, (2, 0))])
def test_sigterm_resumes_bit_for_bit(finished, tmp_path, monkeypatch, step, progress):
    """In the middle of an epoch; and at the last step of all, where a suite must not go on to its next run."""
    config, folder, _ = finished
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train_student(config, tmp_path / "run") is None
    reached = final_state(tmp_path / "run")["progress"]
    assert (reached["epoch"], reached["step"]) == progress
    train_student(config, tmp_path / "run", resume=True)
    assert_same_run(folder, tmp_path / "run")


def test_ctrl_c_writes_a_checkpoint_too(finished, tmp_path, monkeypatch, capsys):
    config, folder, _ = finished
    before = signal.getsignal(signal.SIGINT)  # in the background of a shell it is ignored
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_student(config, tmp_path / "run")
    assert "--resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
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
