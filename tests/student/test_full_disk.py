"""Weights and checkpoints that do not fit on the disk: one line, and the file that was there before."""

import contextlib
import resource

import pytest
import torch

from ngd_fast.errors import UserError
from ngd_fast.student.checkpoint import save_checkpoint
from ngd_fast.student.weights import save_student
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
    with pytest.raises(UserError, match="file: cannot be written") as caught, files_of_at_most(4096):
        save(tmp_path / "file")
    assert "\n" not in str(caught.value)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]
