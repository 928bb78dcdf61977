"""The bench of the objective measures what it says."""

import importlib.util
import json
import sys

import pytest
import torch
from ngd_fast.bench import _timing, objective


@pytest.fixture
def gpu_check(repository):
    spec = importlib.util.spec_from_file_location("gpu_check", repository / "bench" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(gpu_check, tmp_path, monkeypatch):
    class Options:
        out = tmp_path / "report.json"
        minutes = 1.0

    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    return gpu_check.Check(Options)


def test_median_of_known_times(monkeypatch):
    """A clock that only the calls advance: 10 and 500 microseconds, and one call in 40,000 takes 100 times as long."""
    clock = count = 0

    def take(us):
        def call():
            nonlocal clock, count
            count += 1
            clock += us * (100 if count % 40_000 == 0 else 1)

        return call

    monkeypatch.setattr(_timing.time, "perf_counter", lambda: clock * 1e-6)
    times = _timing.median_us({"short": take(10), "long": take(500)}, torch.device("cpu"), seconds=0.3)
    assert times == pytest.approx({"short": 10, "long": 500})


def test_counted_bytes():
    """B=1, float32: features 2 x 1024 read, logits and teacher 32 each, target and labels 8 each; gradients 1024 +
    32."""
    assert objective.counted_bytes(1, torch.float32, "forward") == 2048 + 64 + 16
    assert objective.counted_bytes(1, torch.float32, "both") == 2048 + 64 + 16 + 1056


@pytest.mark.parametrize("what", ["forward", "train", "both"])
def test_every_implementation_computes_the_same(what):
    inputs = objective.make_inputs(16, torch.float32, torch.device("cpu"))
    # torch.compile is left out here for its compile time; it compiles the reference.
    names = [name for name in objective.implementations(torch.device("cpu")) if name != "compile"]
    results = [objective.make_call(name, inputs, what)() for name in names]
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def test_rows_have_every_column():
    rows = objective.measure(8, "float32", torch.device("cpu"), ["eager"], seconds=0.02)
    assert [row["what"] for row in rows] == ["forward", "backward", "both"]
    assert all(len(cells) == len(objective.COLUMNS) for cells in objective.table(rows))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_gpu_check_without_gpu(gpu_check, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "report.json")])
    assert gpu_check.main() == 2
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("body", "ok"),
    [("assert True", True), ("assert False", False), ("pytest.skip('none ran')", False), ("raise RuntimeError", False)],
)
def test_gpu_check_counts_tests(check, tmp_path, body, ok):
    (tmp_path / "test_one.py").write_text(f"import pytest\n\ndef test_one():\n    {body}\n")
    assert check._pytest("one", ["test_one.py"], limit=60) is ok


def test_gpu_check_without_any_test(check, tmp_path):
    (tmp_path / "test_none.py").write_text("")
    assert not check._pytest("none", ["test_none.py"], limit=60)


def test_gpu_check_survives_a_failing_bench(check):
    assert check._json("bad bench", "raise SystemExit(3)", limit=30) is None
    assert check.report["problems"] == ["bad bench: failed"]
    rows = objective.measure(8, "float32", torch.device("cpu"), ["eager"], seconds=0.02)
    check.report["benches"]["objective"] = json.loads(json.dumps(rows))
    assert any("eager float32" in line for line in check.table())
