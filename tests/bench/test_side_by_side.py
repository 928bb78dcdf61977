"""Benches that prepare side by side measure one at a time; without a GPU."""

import sys
import threading
import time

import pytest
import torch
from ngd_fast.bench import _timing


@pytest.fixture
def gpu_check(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "bench"))
    for name in ("gpu_check", "_parts", "_processes", "_summary"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gpu_check

    return gpu_check


def test_a_measurement_waits_prepared_until_its_gate_opens(tmp_path, monkeypatch):
    gate, calls = tmp_path / "gate", []
    monkeypatch.setattr(_timing, "gate", gate)
    measure = lambda: _timing.median_us({"one": lambda: calls.append(1)}, torch.device("cpu"), seconds=0.001)  # noqa: E731
    thread = threading.Thread(target=measure, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not gate.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert gate.exists()
    warm_up = len(calls)
    time.sleep(0.1)
    assert thread.is_alive() and len(calls) == warm_up == 3
    gate.unlink()
    thread.join(20)
    assert not thread.is_alive() and len(calls) > warm_up
    measure()  # the first gate is the only one
    assert not gate.exists()


def test_batches(gpu_check):
    parts = sys.modules["_parts"]
    job = lambda name, module="step", under=(): parts.Job(name, [(module, {})], under=under)  # noqa: E731
    those = [job("a"), job("b"), job("c"), job("feed", "feeds"), job("d"), job("e", under=("ncu",)), job("f")]
    names = [[one.title for one in together] for together in gpu_check.batches(those, 2)]
    assert names == [["a", "b"], ["c"], ["feed"], ["d"], ["e"], ["f"]]


def test_one_that_fails_holds_nobody_up(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)  # its logs
    arguments = ["--rehearse", "--parts", "objective", "--minutes", "3", "--out", str(tmp_path / "results")]
    check = gpu_check.Check(gpu_check.parse(arguments))
    tiny = {"B": 4, "dtype_name": "float32", "whats": ["both"], "seconds": 0.01}
    job = lambda name: sys.modules["_parts"].Job(name, [("objective", {**tiny, "names": [name]})])  # noqa: E731
    check.run("objective", job("no such backend"), job("eager"))
    failed, measured = check.all_rows()
    assert "error" in failed and failed["title"] == "no such backend"
    assert measured["implementation"] == "eager" and measured["us"] > 0
    assert any("no such backend: failed" in problem for problem in check.report["problems"])
