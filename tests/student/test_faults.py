"""Every fault in a training that a user can cause, or meet."""

import pytest
import torch
from runs import interrupt_at, kill_at

from ngd_fast.artifacts.files import sha256
from ngd_fast.errors import UserError
from ngd_fast.faces.dataset import Faces
from ngd_fast.student import session
from ngd_fast.student.run import train_student
from ngd_fast.student.session import alone_in
from ngd_fast.student.step import StudentStep
from ngd_fast.synthetic.faces import make_faces


@pytest.fixture
def started(small_config, tmp_path, monkeypatch):
    """(configuration, folder) of a run that ended after its first epoch."""
    config = small_config("B0")

    kill_at(monkeypatch, 8, config, tmp_path / "run")
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


def test_finished_run_from_other_first_weights_is_another_run(small_config, teacher, tmp_path):
    """It must not pass for one from the weights that are named now."""
    train_student(small_config("B0"), tmp_path / "other")
    weights = [f"model.weights={folder}/student_best.safetensors" for folder in (teacher, tmp_path / "other")]
    train_student(small_config("B0", weights[0]), tmp_path / "run")
    with pytest.raises(UserError, match="finished run that differs in initial weights"):
        train_student(small_config("B0", weights[1]), tmp_path / "run", resume=True)


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


def test_folder_that_another_process_trains_into_is_refused(started):
    """Two trainings in one folder would both write its log."""
    config, folder = started
    unfinished = folder / ".student_last.ckpt.x1y2z3.ckpt"
    unfinished.write_text("what a process that was killed was writing")
    with alone_in(folder), pytest.raises(UserError, match="run: another process is training into it"):
        train_student(config, folder, resume=True)
    assert train_student(config, folder, resume=True) and not unfinished.exists()


def test_folder_that_cannot_be_made_is_refused(small_config):
    with pytest.raises(UserError, match="--out /proc/run: cannot be made"):
        train_student(small_config("B0"), "/proc/run")


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


def test_too_little_device_memory_for_validation_suggests_its_own_batch(small_config, tmp_path, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(session, "predict_feed", out_of_memory)
    with pytest.raises(UserError, match=r"validation batch of 32 faces .*train\.valid_batch_size=16"):
        train_student(small_config("B0"), tmp_path / "run")
