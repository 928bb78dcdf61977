"""Ablations and sweeps: what is trained, what is skipped, and the table at the end."""

import json

import numpy as np
import pytest

from ngd_fast import cli
from ngd_fast.artifacts.verify import verify
from ngd_fast.errors import UserError
from ngd_fast.prototypes.clusters import build_clusters
from ngd_fast.student.step import StudentStep
from ngd_fast.student.suite import ablation_jobs, grid_jobs, report_jobs, run_jobs, run_suite, sweep_jobs


@pytest.fixture
def overrides(files, teacher, small_overrides):
    paths = [f"data.train={files['train']}", f"data.valid={files['valid']}", f"objective.proto.bank={files['bank']}"]
    return [*small_overrides, *paths, f"objective.kd.teacher={teacher}", "train.epochs=1"]


def test_jobs_are_every_variant_with_every_seed(overrides, tmp_path):
    jobs = ablation_jobs(["B0", "B3"], [1, 2], overrides, tmp_path)
    assert [job.folder.name for job in jobs] == ["B0_seed1", "B3_seed1", "B0_seed2", "B3_seed2"]
    assert [job.config.seed for job in jobs] == [1, 1, 2, 2]
    with pytest.raises(UserError, match="B0_seed1"):
        ablation_jobs(["B0", "B0"], [1], overrides, tmp_path)


def test_ablation_runs_once_and_gives_one_table(overrides, tmp_path, capsys):
    jobs = ablation_jobs(["B0", "B2"], [1, 2], overrides, tmp_path)
    assert run_jobs(jobs, side_by_side=1)
    table = report_jobs(jobs, tmp_path)
    assert [row["variant"] for row in table["rows"]] == ["B0", "B2"]
    assert all(row["macro_f1"]["n"] == 2 and "std" in row["macro_f1"] for row in table["rows"])
    assert set(table["rows"][1]["versus_baseline"]["macro_f1"]) == {"difference", "ci", "p"}
    assert {p.name for p in (tmp_path / "viz").iterdir()} >= {"ablation_lite.json", "ablation_lite.tex"}
    assert all(found.problems == [] for found in verify(tmp_path))
    assert "± " in capsys.readouterr().out

    stamps = [(job.folder / "metrics.json").stat().st_mtime_ns for job in jobs]
    (jobs[1].folder / "metrics.json").unlink()  # as if it had been interrupted
    assert run_jobs(jobs, side_by_side=2)
    again = [(job.folder / "metrics.json").stat().st_mtime_ns for job in jobs]
    assert [a == b for a, b in zip(stamps, again)] == [True, False, True, True]
    assert "3 of 4 runs are finished already" in capsys.readouterr().err
    assert report_jobs(jobs, tmp_path) == table

    with pytest.raises(UserError, match=r"B0_seed1: holds a finished run that differs in optimizer\.lr"):
        run_jobs(ablation_jobs(["B0"], [1], [*overrides, "optimizer.lr=0.5"], tmp_path))


def test_students_of_one_seed_share_a_feed(overrides, tmp_path, monkeypatch):
    groups = []

    def train(configs, folders, resume):
        groups.append([folder.name for folder in folders])
        return [{} for _ in configs]

    monkeypatch.setattr("ngd_fast.student.suite.train_students", train)
    jobs = ablation_jobs(["B0", "B1", "B2"], [1, 2], overrides, tmp_path)
    assert run_jobs(jobs, side_by_side=2)
    assert groups == [["B0_seed1", "B1_seed1"], ["B2_seed1"], ["B0_seed2", "B1_seed2"], ["B2_seed2"]]


def test_what_a_later_variant_lacks_is_said_before_the_first_trains(overrides, tmp_path):
    for lack, message in (("objective.kd.teacher=null", "give --teacher"), ("objective.proto.bank=x.npz", "x.npz")):
        with pytest.raises(UserError, match=message):
            run_jobs(ablation_jobs(["B0", "B2"], [1], [*overrides, lack], tmp_path), side_by_side=1)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_stops_the_suite(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr("ngd_fast.student.suite.train_students", lambda configs, folders, resume: [None])
    assert run_suite(ablation_jobs(["B0"], [1, 2], overrides, tmp_path), tmp_path, side_by_side=1) is None


@pytest.mark.parametrize("side_by_side", [1, 3])
def test_a_run_that_diverges_stops_no_other(overrides, tmp_path, capsys, monkeypatch, side_by_side):
    def broken(self, features, logits, batch, teacher_logits):
        out = objective(self, features, logits, batch, teacher_logits)
        return out._replace(total=out.total * float("nan")) if self.config.name == "B1" else out

    objective = StudentStep.objective
    monkeypatch.setattr(StudentStep, "objective", broken)
    jobs = ablation_jobs(["B0", "B1", "B2"], [1], overrides, tmp_path)
    with pytest.raises(UserError, match="1 of 3 runs diverged and stand in no table: B1_seed1"):
        run_suite(jobs, tmp_path, baseline="B1", side_by_side=side_by_side)
    assert "B1 (seed 1): the gradient's norm is nan at step 1" in capsys.readouterr().err
    table = json.loads((tmp_path / "viz" / "ablation_lite.json").read_text())
    assert [row["variant"] for row in table["rows"]] == ["B0", "B2"]


def test_suites_do_not_run_under_torchrun(overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="student train"):
        run_jobs(ablation_jobs(["B0"], [1], overrides, tmp_path))


def test_sweeps_change_one_key_and_know_their_baseline(overrides, tmp_path):
    jobs, baseline = sweep_jobs("proto-weight", "B3", (), [1], overrides, tmp_path)
    assert [job.config.objective.proto.weight for job in jobs] == [0.0, 0.10, 0.12, 0.15]
    assert baseline == "proto-weight-0.120" == jobs[2].config.name

    jobs, baseline = sweep_jobs("geo-weight", "B3", (0.5,), [1, 2], overrides, tmp_path)
    assert [(job.config.objective.geo.weight, job.config.seed) for job in jobs] == [
        (0.012, 1),
        (0.5, 1),
        (0.012, 2),
        (0.5, 2),
    ]

    jobs, _ = sweep_jobs("geo-weight", "B3", (0.0121,), [1], overrides, tmp_path)
    assert [job.folder.name for job in jobs] == ["geo-weight-0.012_seed1", "geo-weight-0.0121_seed1"]

    jobs, baseline = sweep_jobs("ramp-start", "B3", (), [1], overrides, tmp_path)
    ramps = [(job.config.objective.geo.schedule.start, job.config.objective.geo.schedule.end) for job in jobs]
    assert ramps == [(0, 40), (10, 50), (20, 60), (30, 70), (40, 80)] and baseline == "ramp-start-20.0"


def test_grid_sweep_takes_one_bank_for_each_grid(overrides, files, make_bank, tmp_path):
    make_bank(256, grid=3).save(tmp_path / "bank: 3 #1.npz")
    banks = [files["bank"], str(tmp_path / "bank: 3 #1.npz")]
    jobs, baseline = grid_jobs("B3", banks, [1], overrides, tmp_path)
    assert [job.config.name for job in jobs] == ["grid-3x3", "grid-5x5"] and baseline == "grid-5x5"
    assert jobs[0].config.objective.proto.bank == banks[1]
    with pytest.raises(UserError, match="--banks must name two or more"):
        grid_jobs("B3", banks[:1], [1], overrides, tmp_path)
    with pytest.raises(UserError, match="same grid"):
        grid_jobs("B3", [banks[0], banks[0]], [1], overrides, tmp_path)
    rng = np.random.default_rng(0)
    build_clusters(rng.normal(size=(40, 256)), *rng.uniform(-1, 1, (2, 40)), k=4).save(tmp_path / "k.npz")
    with pytest.raises(UserError, match=r"sweep grid: .*k\.npz has no grid, but 4 clusters"):
        grid_jobs("B3", [banks[0], str(tmp_path / "k.npz")], [1], overrides, tmp_path)


# -- the command line ----------------------------------------------------------------------------------------------


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


def as_options(overrides):
    return [part for override in overrides for part in ("--set", override)]


def test_student_train_takes_options_and_the_authors_flags(overrides, files, tmp_path, capsys):
    options = ["--train", files["train"], "--valid", files["valid"], "--seed", 3, "--acc-steps", 2, "--clip-grad", 0.5]
    options += ["--workers", 0, "--channels-last", "--best-metric", "accuracy", "--compile", "off", "--feed", "torch"]
    assert run("student", "train", "--cfg", "B0", *as_options(overrides), *options, "--out", tmp_path / "B0") == 0
    assert "B0 seed 3" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "B0" / "metrics.json").read_text())
    assert metrics["seed"] == 3 and metrics["config"]["batch_size"] == 32


def test_sweep_from_the_command_line(overrides, tmp_path, capsys):
    arguments = ["--values", "0.5", "--seeds", "1", "--config", "B2", "--out", tmp_path]
    assert run("sweep", "proto-weight", *as_options(overrides), *arguments) == 0
    out = capsys.readouterr().out
    assert "proto-weight-0.120" in out and "proto-weight-0.500" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["student", "train", "--config", "B9", "--out", "x"], "--config B9"),
        (["student", "train", "--config", "B0", "--out", "x"], "give --train"),
        (["student", "train", "--config", "B0", "--out", "x", "--set", "train.epoch=3"], "train.epochs"),
        (["ablation", "--configs", "B0", "--baseline", "B5", "--out", "x"], "--baseline B5"),
        (["ablation", "--configs", ",", "--out", "x"], "names no configuration"),
        (["ablation", "--seeds", "1,a", "--out", "x"], "whole numbers"),
        (["ablation", "--seeds", "1,1", "--out", "x"], "twice"),
        (["sweep", "geo-weight", "--values", "a", "--out", "x"], "numbers with commas"),
        (["sweep", "grid", "--banks", "missing.npz,b.npz", "--out", "x"], "missing.npz"),
    ],
)
def test_faults_are_a_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
