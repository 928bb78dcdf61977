"""What tests of whole runs share: comparing two of them, and ending one early."""

import json

import pytest
import torch

from ngd_fast.artifacts.files import sha256
from ngd_fast.student.run import train_student
from ngd_fast.student.step import StudentStep

RAMP = ("objective.geo.schedule.start=0", "objective.geo.schedule.end=1")

TIMES = ("seconds", "total_seconds", "preparing", "images_per_second", "data_wait", "memory_gib")
"""What a log says about how much time and memory an epoch took."""


def final_state(folder) -> dict:
    return torch.load(folder / "student_last.ckpt", weights_only=True)["state"]


def assert_same_run(a, b):
    """Weights, optimizer, best epoch, best student, logs: bit for bit; and every epoch's log is of the whole epoch."""
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
    for log in logs:
        assert sum(line["seconds"] for line in log) == pytest.approx(log[-1]["total_seconds"])
    for ours, theirs in zip(*logs):
        assert {k: v for k, v in ours.items() if k not in TIMES} == {k: v for k, v in theirs.items() if k not in TIMES}


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


def kill_at(monkeypatch, step: int, config, folder):
    """Train until just before the optimizer's step number ``step``, then end without a word."""

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        interrupt_at(patch, step, kill)
        with pytest.raises(Killed):
            train_student(config, folder)
