"""pytest-benchmark of the training step: ``pytest bench/bench_step.py``. As a table: ``ngd-fast bench step``."""

import pytest
import torch
from ngd_fast.bench import _timing, step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


@pytest.mark.parametrize("implementation", step.names(DEVICE))
@pytest.mark.parametrize("batch", [128, 256, 512] if ON_GPU else [32])
@pytest.mark.parametrize("variant", step.VARIANTS)
def test_step(benchmark, variant, batch, implementation):
    torch.compiler.reset()
    size = 224 if ON_GPU else 48
    with step.kept_settings():
        call = step.make_step(implementation, step.Inputs(variant, batch, size, DEVICE))
        benchmark.extra_info.update(machine=_timing.machine(DEVICE), images=batch, image_size=size)

        def run():
            call()
            if ON_GPU:
                torch.cuda.synchronize()

        benchmark.pedantic(run, rounds=20, warmup_rounds=3)
