"""pytest-benchmark of the objective: ``pytest bench/bench_objective.py`` (every shape that fits the machine).

``pytest bench/bench_objective.py -k "128 and both"`` for some; ``--benchmark-json`` to keep them. Bytes and
memory are in ``extra_info``. The same as a table: ``ngd-fast bench objective``.
"""

import pytest
import torch
from ngd_fast.bench import _timing, objective

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GRAPH = (False, True) if DEVICE.type == "cuda" else (False,)


@pytest.mark.parametrize("what", ["forward", "train", "both"])
@pytest.mark.parametrize("graph", GRAPH, ids=lambda graph: "graph" if graph else "plain")
@pytest.mark.parametrize("implementation", objective.implementations(DEVICE))
@pytest.mark.parametrize("dtype", objective.DTYPES)
@pytest.mark.parametrize("B", objective.BATCHES)
def test_objective(benchmark, B, dtype, implementation, graph, what):
    if DEVICE.type == "cpu" and B > 16_384:
        pytest.skip("a CPU needs seconds for this")
    inputs = objective.make_inputs(B, objective.DTYPES[dtype], DEVICE)
    torch.compiler.reset()
    call = objective.make_call(implementation, inputs, what)
    call()
    benchmark.extra_info["machine"] = _timing.machine(DEVICE)
    benchmark.extra_info["counted_bytes"] = objective.counted_bytes(B, objective.DTYPES[dtype], what)
    benchmark.extra_info["peak_extra_bytes"] = _timing.peak_extra_bytes(call, DEVICE)
    if graph:
        call = _timing.in_graph(call)

    def run():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
