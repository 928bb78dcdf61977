"""The bench of the objective measures what it says."""

import pytest
import torch
from ngd_fast.bench import _timing, objective


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
