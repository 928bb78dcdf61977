"""Every fault in a training that a user can cause, or meet."""

import pytest
import torch
from runs import assert_same_run, final_state, interrupt_at, kill_at

from ngd_fast.artifacts.files import alone_in, check_sums, sha256
from ngd_fast.errors import UserError
from ngd_fast.faces.dataset import Faces
from ngd_fast.student import run, session
from ngd_fast.student.run import train_student
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
    with alone_in(folder, resume=True), pytest.raises(UserError, match="run: another process is writing into it"):
        train_student(config, folder, resume=True)
    assert train_student(config, folder, resume=True)


def test_what_killed_processes_were_writing_is_taken_away(started):
    config, folder = started
    for name in ("config.yaml", "student_last.ckpt", "metrics.json", "SHA256SUMS.txt"):
        (folder / f".{name}.x1y2z3_a{name[name.index('.'):]}").write_text("half of")
    train_student(config, folder, resume=True)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert check_sums(folder) == []


def test_folder_that_was_filled_meanwhile_is_not_overwritten(small_config, tmp_path, monkeypatch):
    """Another training came and went between the first look at the folder and its being locked."""
    config, folder = small_config("B0"), tmp_path / "run"

    def meanwhile(*arguments, make=run._make_feeds):
        if not folder.exists():
            folder.mkdir()
            (folder / "metrics.json").write_text("{}")
        return make(*arguments)

    monkeypatch.setattr(run, "_make_feeds", meanwhile)
    with pytest.raises(UserError, match="is not empty"):
        train_student(config, folder)
    assert [path.name for path in folder.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("name", ["config.yaml", "student_best.safetensors", "metrics.json", "log.jsonl"])
def test_finished_run_with_a_cut_file_is_not_taken_for_whole(started, name):
    config, folder = started
    train_student(config, folder, resume=True)
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"finished run, but not as it was written|{name}: not"):
        train_student(config, folder, resume=True)


def test_finished_run_whose_checkpoint_was_deleted_is_finished(started):
    config, folder = started
    train_student(config, folder, resume=True)
    (folder / "student_last.ckpt").unlink()
    assert train_student(config, folder, resume=True)["best_epoch"]


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


CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError(CPU)])
@pytest.mark.parametrize("kind", ["torch", "resident", "dali"])
def test_too_little_memory_for_validation_keeps_the_epoch(small_config, tmp_path, monkeypatch, fault, kind):
    """What to try is said; it goes on from the end of the epoch, to the same bits."""
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    options = (f"feed.kind={kind}", "objective.geo.weight=0.1", "objective.geo.schedule.start=0")
    config, steps, run_step = small_config("B0", *options), [], StudentStep.run
    train_student(config, tmp_path / "whole")
    monkeypatch.setattr(StudentStep, "run", lambda *arguments: (steps.append(1), run_step(*arguments)))

    def raising(*_, **__):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(session, "predict_feed", raising)
        with pytest.raises(UserError, match=r"batch of 32 faces .*train\.valid_batch_size=16 with --resume, which"):
            train_student(config, tmp_path / "run")
    progress = final_state(tmp_path / "run")["progress"]
    assert (progress["epoch"], progress["step"]) == (0, 6)
    train_student(config, tmp_path / "run", resume=True)
    assert len(steps) == 12, "no step was made twice"
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_too_little_memory_on_a_cpu_suggests_the_next_lower_batch(small_config, tmp_path, monkeypatch):
    def out_of_memory():
        raise RuntimeError(CPU)

    interrupt_at(monkeypatch, 1, out_of_memory)
    with pytest.raises(UserError, match=r"batch of 16 faces does not fit .*train\.batch_size=8"):
        train_student(small_config("B0"), tmp_path / "run")
