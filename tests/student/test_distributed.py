"""Two real processes under torchrun: the gradients of one batch, one run folder, a restart after one of them died."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from runs import final_state, kill_at

from ngd_fast.artifacts.verify import verify
from ngd_fast.config import dump_config
from ngd_fast.prototypes.bank import PrototypeBank
from ngd_fast.student.distributed import Ranks
from ngd_fast.student.run import train_student
from ngd_fast.student.session import Session

WORKER = Path(__file__).with_name("ddp_worker.py")
# As `python -m torch.distributed.run`: the torchrun script may belong to another environment.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*TORCHRUN, *arguments], capture_output=True, text=True, env=environment, timeout=200)


def test_two_ranks_of_64_give_the_gradients_of_one_of_128(files, tmp_path):
    spec = importlib.util.spec_from_file_location("ddp_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    result = torchrun(str(WORKER), "gradients", files["bank"], str(tmp_path))
    assert result.returncode == 0, result.stderr
    for backend in ("reference", None):
        alone = worker.gradients(Ranks(), PrototypeBank.load(files["bank"]), backend)
        ranks = [np.load(tmp_path / f"{backend or 'fastest'}_rank{rank}.npz") for rank in (0, 1)]
        assert float(alone["geo"].sum()) > 0.1, "D-Geo should act"
        for name, value in alone.items():
            assert np.array_equal(ranks[0][name], ranks[1][name]), name
            error = np.linalg.norm(ranks[0][name] - value.numpy()) / max(1e-12, float(value.norm()))
            assert error < 1e-5, (backend, name, error)


def test_a_rank_that_dies_is_started_again_from_the_last_checkpoint(small_config, tmp_path):
    """12 steps in 2 epochs; rank 1 dies at its 9th, and both continue after epoch 1.

    What the ranks validate together is what rank 0 saves, and one bar is drawn.
    """
    config = small_config("B0", "train.batch_size=16", "train.ema=0.5")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    out = tmp_path / "run"
    arguments = ["student", "train", "--config", str(tmp_path / "config.yaml"), "--out", str(out)]
    result = torchrun("--max-restarts=1", str(WORKER), "train", *arguments)
    assert result.returncode == 0, result.stderr
    assert "continues after epoch 1" in result.stderr
    assert verify(out)[0].problems == []
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["valid"]["eight_way"]["n"] == 40
    logged = lines[metrics["best_epoch"] - 1]["valid"]["ece"]
    assert logged == pytest.approx(metrics["valid"]["eight_way"]["ece"], abs=1e-7)
    assert result.stderr.count(" 0/192 [") == 1


def test_a_process_that_torchrun_restarts_alone_continues_too(small_config, tmp_path, monkeypatch):
    config = small_config("B0")
    kill_at(monkeypatch, 8, config, tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train_student(config, tmp_path / "run")["best_epoch"] > 0


def test_checkpoint_within_an_epoch_holds_the_sums_of_all_ranks(make_step, tmp_path):
    step, _ = make_step("B0")
    ranks = SimpleNamespace(is_main=True, gather=lambda sums: [sums, [value + 2 for value in sums]])
    session = Session(step.config, tmp_path, step, checksums={}, ranks=ranks)
    session.progress.step, session.progress.sums = 3, [1.0] * 7
    session.save()
    assert final_state(tmp_path)["progress"]["sums"] == [2.0] * 7 == session.progress.sums


def test_batch_that_ranks_cannot_share_is_refused(small_config, monkeypatch):
    import torch

    from ngd_fast.errors import UserError
    from ngd_fast.student.inputs import load_inputs
    from ngd_fast.student.run import _make_feeds

    config = small_config("B0", "train.batch_size=15")
    with pytest.raises(UserError, match="cannot be shared by 2 ranks"):
        _make_feeds(config, load_inputs(config), 3, Ranks(0, 2, 0), torch.device("cpu"))
