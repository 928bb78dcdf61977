"""Files are written whole or not at all, and read without unpickling."""

import errno
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ngd_fast.artifacts import files
from ngd_fast.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def interrupted_write():
        with files.atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        interrupted_write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_process_was_writing_goes_with_the_next_write_and_nothing_else(tmp_path):
    path = tmp_path / "a[1].txt"
    killed = f"from ngd_fast.artifacts import files; import os\nwith files.atomic_path({str(path)!r}): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", killed]).returncode == 9
    assert len(os.listdir(tmp_path)) == 1
    others = [".a[1].txt", ".a[1].txt.txt", ".a[1].txt.12345678.npz", ".b.txt.12345678.txt"]
    for name in others:
        (tmp_path / name).touch()
    with files.atomic_path(path) as first, files.atomic_path(path) as second:  # as two processes at once
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == sorted(["a[1].txt", *others])


def test_a_file_taken_for_unfinished_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, taken = files._lock, []

    def losing(handle, *, wait=False):
        if wait and not taken:
            taken.append(next(tmp_path.iterdir()))
            taken[0].unlink()
        return lock(handle, wait=wait)

    monkeypatch.setattr(files, "_lock", losing)
    files.write_text(tmp_path / "a.txt", "whole")
    assert taken and [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "whole")]


def test_a_folder_is_written_by_one_process_and_left_as_it_was_found(tmp_path):
    with files.alone_in(tmp_path / "run"):
        with pytest.raises(UserError, match="another process is writing into it"), files.alone_in(tmp_path / "run"):
            pass
        assert (tmp_path / "run").is_dir(), "the one that is refused leaves the folder of the other"
    assert not (tmp_path / "run").exists()
    with files.alone_in(tmp_path / "run"):
        (tmp_path / "run" / "a").touch()
    with pytest.raises(UserError, match="is not empty"), files.alone_in(tmp_path / "run"):
        pass
    with files.alone_in(tmp_path / "run", resume=True):
        pass
    assert (tmp_path / "run" / "a").exists()


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    files.save_npz(path, {"x": np.arange(3)})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"):
        files.save_npz(path, {"x": np.arange(4)})
    assert files.load_npz(path)["x"].tolist() == [0, 1, 2]
    assert os.listdir(tmp_path) == ["a.npz"]


def test_npz_bytes_depend_on_the_arrays_alone(tmp_path):
    for name in ("a", "b"):
        files.save_npz(tmp_path / f"{name}.npz", {"x": np.arange(5), "s": np.array("text")})
    assert files.sha256(tmp_path / "a.npz") == files.sha256(tmp_path / "b.npz")


def test_object_arrays_are_neither_written_nor_read(tmp_path):
    with pytest.raises(TypeError):
        files.save_npz(tmp_path / "a.npz", {"x": np.array([{}], dtype=object)})
    np.savez(tmp_path / "b.npz", x=np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"b\.npz"):
        files.load_npz(tmp_path / "b.npz")


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_truncated_npz(tmp_path, keep):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.arange(1000))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a\.npz"):
        files.load_npz(path)


def test_a_damaged_npz(tmp_path):
    """Compressed bytes that are none, and a method of compression that there is not."""
    whole, path = tmp_path / "a.npz", tmp_path / "b.npz"
    np.savez_compressed(whole, x=np.arange(1000))
    data = whole.read_bytes()
    for place in (data.index(b"x.npy") + 40, data.index(b"PK\x01\x02") + 10):
        path.write_bytes(data[:place] + b"\xff" * 2 + data[place + 2 :])
        with pytest.raises(UserError, match=r"b\.npz: not a readable NPZ file"):
            files.load_npz(path)


def test_missing_arrays_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    with pytest.raises(UserError, match=r"lacks labels \(has x\)"):
        files.load_npz(tmp_path / "a.npz", required=("x", "labels"))


def test_sums_are_what_sha256sum_checks(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub" / "b c.txt").write_text("b")
    files.write_sums(tmp_path)
    assert files.check_sums(tmp_path) == []
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", files.SUMS_NAME], cwd=tmp_path, check=True)
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "sub" / "b c.txt").unlink()
    assert files.check_sums(tmp_path) == ["a.txt: changed", "sub/b c.txt: missing"]


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert os.listdir(tmp_path) == []


def test_tensors_come_in_the_order_of_their_names(tmp_path):
    """safetensors gives them in an order that changes from process to process."""
    names = [f"layer{i}.{kind}" for i in range(20) for kind in ("weight", "bias")]
    save_file({name: torch.full((1,), i) for i, name in enumerate(names)}, tmp_path / "w.safetensors")
    tensors, _ = files.load_safetensors(tmp_path / "w.safetensors")
    assert list(tensors) == sorted(names)
    assert all(int(tensors[name]) == i for i, name in enumerate(names))
