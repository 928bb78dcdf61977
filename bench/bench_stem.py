"""pytest-benchmark of the stem: ``pytest bench/bench_stem.py``. As a table: ``ngd-fast bench stem``."""

import pytest
import torch
from ngd_fast.bench import _timing, stem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


@pytest.mark.parametrize("what", ["forward", "both"])
@pytest.mark.parametrize(
    "graph", (False, True) if ON_GPU else (False,), ids=lambda graph: "graph" if graph else "plain"
)
@pytest.mark.parametrize("implementation", stem.implementations(DEVICE))
@pytest.mark.parametrize("size", [112, 224] if ON_GPU else [48])
def test_stem(benchmark, size, implementation, graph, what):
    torch.compiler.reset()
    batch = 128 if ON_GPU else 8
    call = stem.make_call(implementation, batch, size, DEVICE, what)
    call()
    benchmark.extra_info.update(machine=_timing.machine(DEVICE), counted_bytes=stem.counted_bytes(batch, size, what))
    if graph:
        call = _timing.in_graph(call)

    def run():
        call()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark(run)
