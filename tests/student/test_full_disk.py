"""Weights and checkpoints that do not fit on the disk: one line, and the file that was there before."""

import contextlib
import resource

import pytest
import torch

from ngd_fast.errors import UserError
from ngd_fast.student.checkpoint import save_checkpoint
from ngd_fast.student.kd_teacher import LogitsOnly, cached_logits
from ngd_fast.student.networks import build_student
from ngd_fast.student.weights import save_student
from ngd_fast.synthetic.faces import make_faces
from ngd_fast.teacher.config import NetworkConfig
from ngd_fast.teacher.network import Teacher, save_teacher


@contextlib.contextmanager
def files_of_at_most(size):
    """The system refuses longer ones with an OSError, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def student(path):
    save_student(path, {"w": torch.zeros(100_000)}, {})


def checkpoint(path):
    save_checkpoint(path, {"w": torch.zeros(100_000)}, config={}, checksums={})


def teacher(path):
    names = ("band_names", "input", "maps_sha256", "train_subjects", "validation_subjects")
    save_teacher(path, Teacher(2, 32, NetworkConfig()), dict.fromkeys(names, ""))


@pytest.mark.parametrize("save", [student, checkpoint, teacher])
def test_a_full_disk_is_a_users_error(save, tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(UserError, match=r"file: cannot be written \(File too") as caught, files_of_at_most(4096):
        save(tmp_path / "file")
    assert "\n" not in str(caught.value)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


def test_logits_that_do_not_fit_leave_no_file(tmp_path):
    faces = make_faces(400, 1)
    options = {"device": torch.device("cpu"), "autocast": None, "image_size": 8, "mean": 0.5, "std": 0.25}
    with pytest.raises(UserError, match=r"npy: cannot be written \(File too large\)"), files_of_at_most(4096):
        cached_logits(tmp_path, LogitsOnly(build_student("resnet18-w4")), "sum", faces, **options)
    assert list(tmp_path.iterdir()) == []
