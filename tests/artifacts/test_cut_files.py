"""A file cut at any byte is refused in a line, or still says the same: never is half of one taken for the whole."""

import numpy as np
import pytest
import torch

from ngd_fast.artifacts.files import check_sums, read_json, read_sums, write_json, write_sums
from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.errors import UserError
from ngd_fast.evaluation.predictions import Predictions
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.faces.dataset import Faces
from ngd_fast.prototypes.bank import PrototypeBank
from ngd_fast.student.checkpoint import load_checkpoint, progress_of, save_checkpoint
from ngd_fast.student.runlog import LOG_NAME, RunLog
from ngd_fast.student.weights import load_student, save_student
from ngd_fast.teacher.config import NetworkConfig
from ngd_fast.teacher.network import Teacher, load_teacher, save_teacher

RNG = np.random.default_rng(0)


def checkpoint(path):
    state = {"step": {"w": torch.arange(5.0)}, "progress": {"epoch": 1, "step": 2}}
    save_checkpoint(path, state, config={"seed": 1}, checksums={"train": "a"})
    return lambda: (load_checkpoint(path, config={"seed": 1}, checksums={"train": "a"}), progress_of(path))


def student(path):
    save_student(path, {"w": torch.arange(5.0)}, {"arch": "resnet18-w4"})
    return lambda: load_student(path)


def teacher(path):
    subjects = {"train_subjects": [1], "validation_subjects": [2]}
    meta = {"band_names": ["alpha"], "input": {}, "maps_sha256": "", **subjects}
    save_teacher(path, Teacher(1, 32, NetworkConfig(width=8)), meta)
    return lambda: load_teacher(path)


def bank(path):
    va = RNG.uniform(-1, 1, (2, 20))
    PrototypeBank.build(RNG.standard_normal((20, 4)).astype(np.float32), *va, grid=2).save(path)
    return lambda: PrototypeBank.load(path).checksum


def faces(path):
    images = RNG.integers(0, 255, (2, 8, 8), dtype=np.uint8)
    Faces(images=images, label_dist=np.eye(8, dtype=np.float32)[:2], class_names=CLASS_NAMES).save(path)
    return lambda: Faces.load(path).checksum


def predictions(path):
    Predictions(np.eye(8), np.arange(8), [str(i) for i in range(8)], CLASS_NAMES, "made").save(path)
    return lambda: Predictions.load(path)


def topomaps(path):
    rows = {name: np.zeros(2) for name in ("valence", "arousal", "subject", "trial", "window")}
    maps = np.full((2, 1, 4, 4), 0.5)
    made = Topomaps(maps, np.ones((2, 3, 1)), **rows, bands=["a"], channels=["x", "y", "z"], mask=np.ones((4, 4)))
    made.save(path.parent, "t").rename(path)
    return lambda: Topomaps.load(path)


def metrics(path):
    write_json(path, {"accuracy": 0.5, "run": "é"})
    return lambda: read_json(path)


MADE = [checkpoint, student, teacher, bank, faces, predictions, topomaps, metrics]


@pytest.mark.parametrize("make", MADE)
def test_every_cut_is_refused_in_one_line(make, tmp_path):
    path = tmp_path / f"file{'.ckpt' if make is checkpoint else '.npz'}"
    read = make(path)
    if make is not student:  # not even whole it holds the network that it names
        read()
    whole = path.read_bytes()
    # All lengths; of the teacher's weights, which are a megabyte, three hundred.
    lengths = range(len(whole)) if len(whole) < 20_000 else [*range(0, len(whole), len(whole) // 300), len(whole) - 1]
    for length in lengths:
        path.write_bytes(whole[:length])
        if make is metrics and length == len(whole) - 1:  # the line's end alone is missing
            assert read()
            continue
        with pytest.raises(UserError) as caught:
            read()
        assert str(path) in str(caught.value) and str(caught.value).count("\n") <= 1, length


def test_every_cut_of_a_log_loses_whole_lines_and_says_which(tmp_path, capsys):
    log = RunLog(tmp_path)
    for epoch in (1, 2, 3):
        log.epoch(epoch, {"loss": 0.5, "valid": {"accuracy": 0.25}})
    log.close()
    path = tmp_path / LOG_NAME
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        capsys.readouterr()
        RunLog(tmp_path, 3).close()
        kept = path.read_bytes().splitlines(keepends=True)
        assert kept == lines[: len(kept)] and len(kept) >= whole[:length].count(b"\n")
        said = f"{path}: lacks epochs that were trained, from epoch {len(kept) + 1}\n"
        assert capsys.readouterr().err == ("" if len(kept) == 3 else said)


def test_every_cut_of_a_list_of_checksums_is_refused_or_a_shorter_list(tmp_path):
    for name in ("a.txt", "b c.txt"):
        (tmp_path / name).write_text(name)
    whole = write_sums(tmp_path).read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole)):
        (tmp_path / "SHA256SUMS.txt").write_bytes(whole[:length])
        if length in ends:
            assert len(read_sums(tmp_path)) == 1 and check_sums(tmp_path) == []
        else:
            with pytest.raises(UserError, match=r"SHA256SUMS\.txt"):
                read_sums(tmp_path)
