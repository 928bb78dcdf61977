"""D-Geo over two real processes (gloo): the class sums are those of the global batch."""

import gc
import tempfile
from pathlib import Path

import cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ngd_fast.objective import functional

ROWS = 24  # in all; rank 0 takes 10 of them, rank 1 takes 14


def case():
    return cases.make(ROWS, 16, 6, 5, prototypes=None, prior=None)


def worker(rank, folder, backend):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    part = slice(0, 10) if rank == 0 else slice(10, ROWS)
    local = {
        name: value[part] if isinstance(value, torch.Tensor) and len(value) == ROWS else value
        for name, value in case().items()
    }
    # The layer stands for a network: DDP averages its gradient over ranks.
    layer = torch.nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(16))
    ddp = torch.nn.parallel.DistributedDataParallel(layer)
    out = functional.d_geo(
        ddp(local["features"]), local["target"], num_classes=6, var_cap=0.1, margin=1.3, group=True, backend=backend
    )
    out.backward()
    with pytest.raises(TypeError, match="group: wanted a process group"):
        functional.d_geo(local["features"], local["target"], num_classes=6, group="world")
    torch.save((out.detach(), layer.weight.grad), Path(folder) / f"{rank}.pt")
    # DDP must not be the last to hold the group: freeing it would then wait, with Python's lock, for gloo's threads,
    # and these may need that lock to end.
    del ddp, out
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_two_processes_equal_one(backend):
    whole = case()
    layer = torch.nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(16))
    expected = functional.d_geo(
        layer(whole["features"]), whole["target"], num_classes=6, var_cap=0.1, margin=1.3, backend="reference"
    )
    expected.backward()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(folder, backend), nprocs=2)
        for rank in (0, 1):
            value, gradient = torch.load(Path(folder) / f"{rank}.pt", weights_only=True)
            assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5)
            assert cases.relative(gradient, layer.weight.grad) <= 1e-5


def test_a_group_needs_torch_distributed():
    with pytest.raises(ValueError, match="group: wanted an initialised process group"):
        functional.ngd_objective(**case(), group=True)
