"""Several teachers as one: what is averaged, live and cached, and what a single one keeps."""

import json

import pytest
import torch
from runs import assert_same_run, kill_at

from ngd_fast.artifacts.verify import verify
from ngd_fast.cli.student import overrides_of
from ngd_fast.errors import UserError
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.faces.feeds import Batch
from ngd_fast.student.config import KDConfig, load_student_config
from ngd_fast.student.inputs import load_inputs
from ngd_fast.student.kd_teacher import combine_logits, load_kd_teacher
from ngd_fast.student.run import train_student, trains_alike
from ngd_fast.student.trainer import Trainer


@pytest.fixture(scope="module")
def other(small_config, tmp_path_factory) -> str:
    """The run folder of another, wider teacher."""
    folder = tmp_path_factory.mktemp("runs") / "other"
    train_student(small_config("teacher", "model.arch=resnet18-w8", "train.epochs=1", "seed=5"), folder)
    return str(folder)


def of(*teachers: str) -> str:
    return f"objective.kd.teacher=[{', '.join(teachers)}]"


def test_what_is_averaged():
    logits = list(10 * torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0)))
    for temperature in (1.0, 5.0):
        mixed = combine_logits(logits, "probabilities", temperature)
        wanted = sum((z.double() / temperature).softmax(1) for z in logits) / 3
        torch.testing.assert_close((mixed / temperature).exp().double(), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(combine_logits(logits, "logits", 5.0), sum(logits) / 3, rtol=0, atol=1e-5)


def test_configuration(small_config, teacher, other, files):
    one, text = small_config("B1", of(teacher)), small_config("B1", f"objective.kd.teacher={teacher}")
    assert one == text and one.objective.kd.teacher == teacher and load_inputs(one).checksums.keys() >= {"teacher"}
    given = overrides_of({"teacher": (teacher, other), "seed": None}, ())
    assert load_student_config("B1", given).objective.kd.teacher == (teacher, other)
    assert overrides_of({"teacher": ()}, ()) == []
    two = small_config("B1", of(teacher, other))
    assert {"teacher 1", "teacher 2"} <= load_inputs(two).checksums.keys()
    assert KDConfig(mode="mse").mixture() == ("logits", 1.0) and KDConfig(mode="kl").mixture() == ("probabilities", 5.0)
    weights = KDConfig(teacher=("a", "timm:x"), teacher_weights=(None, "x.pth"))
    assert weights.teachers() == {"teacher_1": ("a", None), "teacher_2": ("timm:x", "x.pth")}
    for more in ("x.pth", "[a, b, c]"):
        with pytest.raises(UserError, match=r"objective\.kd: teacher_weights: must be 2, one for each teacher"):
            small_config("B1", of("a", "b"), f"objective.kd.teacher_weights={more}")
    with pytest.raises(UserError, match=r"objective\.kd\.teacher: must name one or more"):
        small_config("B1", of())


def test_students_side_by_side_share_what_is_averaged(small_config):
    def alike(teachers, *more):
        kd = f"objective.kd.teacher={teachers}"
        return trains_alike(small_config("B1", kd), small_config("B1", kd, *more))

    hotter, kl = "objective.kd.temperature=9", "objective.kd.mode=kl"
    assert alike("[a, b]", hotter) and alike("[a, b]", kl, "objective.kd.combine=logits") and alike("a", kl, hotter)
    assert not alike("[a, b]", kl) and not alike("[a, b]", "objective.kd.combine=probabilities")


def test_a_second_teacher_that_is_not_there_is_named_before_anything_starts(small_config, teacher, tmp_path):
    with pytest.raises(UserError, match="nowhere") as error:
        train_student(small_config("B1", of(teacher, f"{tmp_path}/nowhere")), tmp_path / "run")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("cached", "mode"), [(False, "mse"), (False, "kl"), (True, "kl")])
def test_two_teachers_train_and_resume(small_config, teacher, other, tmp_path, monkeypatch, cached, mode):
    asked, init = [], Trainer.__init__

    def noting(self, *args, teacher, **options):
        asked.append(teacher)
        init(self, *args, teacher=teacher, **options)

    monkeypatch.setattr(Trainer, "__init__", noting)
    kd = (f"objective.kd.cached={cached}", f"objective.kd.mode={mode}", "train.checkpoint_every=2")
    config = small_config("B1", of(teacher, other), *kd)
    train_student(config, tmp_path / "whole")
    kill_at(monkeypatch, 9, config, tmp_path / "parts")
    train_student(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    fingerprint = json.loads((tmp_path / "whole" / "ablation_fingerprint.json").read_text())
    assert {"teacher_1", "teacher_2"} <= fingerprint["files"].keys() and not verify(tmp_path / "whole")[0].problems

    mixture = config.objective.kd.mixture()
    if not cached:
        options = {"weights": None, "class_names": CLASS_NAMES, "mean": 0.5, "std": 0.25, "image_size": 24}
        images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            alone = [load_kd_teacher(name, **options)[0](images) for name in (teacher, other)]
        torch.testing.assert_close(asked[0](Batch(images, None, None, None)), combine_logits(alone, *mixture))
        return
    caches = lambda: {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kd_cache").iterdir()}  # noqa: E731
    both = caches()
    for i, name in enumerate((teacher, other)):  # alone they find their own files
        train_student(small_config("B1", f"objective.kd.teacher={name}", *kd), tmp_path / f"alone{i}")
    alone = [one.table for one in asked[-2:]]
    assert len(both) == 2 and both == caches() and asked[0].table.shape == alone[0].shape == (2, 96, 8)
    assert torch.equal(asked[0].table, combine_logits(alone, *mixture).half())


def test_a_checkpoint_from_before_resumes_but_not_with_other_teachers(
    small_config, teacher, other, tmp_path, monkeypatch
):
    config = small_config("B1", f"objective.kd.teacher={teacher}", "train.checkpoint_every=2")
    train_student(config, tmp_path / "whole")
    kill_at(monkeypatch, 9, config, tmp_path / "parts")
    path = tmp_path / "parts" / "student_last.ckpt"
    content = torch.load(path, weights_only=True)
    del content["config"]["objective"]["kd"]["combine"]
    torch.save(content, path)
    with pytest.raises(UserError, match="was trained with another teacher"):
        train_student(small_config("B1", of(teacher, other), "train.checkpoint_every=2"), path.parent, resume=True)
    train_student(small_config("B1", of(teacher), "train.checkpoint_every=2"), path.parent, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
