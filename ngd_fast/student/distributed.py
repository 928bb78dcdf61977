"""The ranks that torchrun starts; without it, one rank that needs no process group."""

import datetime
import gc
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ngd_fast.devices import pick_device


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_restart(self) -> bool:
        """True in processes that torchrun started again after a failure."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0

    def any(self, flag: bool) -> bool:
        """True if any rank says so. With several ranks a collective call: all must make it."""
        return any(self.gather(flag))

    def gather(self, value: Any) -> list:
        """The values of all ranks, in order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite ``tensors`` with those of rank 0."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group; networks wrapped in DDP must be out of use."""
        if self.world_size > 1 and dist.is_initialized():
            # DDP must not be the last to hold the group: freeing it would then wait, with Python's lock, for gloo's
            # threads, and these may need that lock to end.
            gc.collect()
            dist.destroy_process_group()


def join_ranks(device: str) -> tuple[Ranks, torch.device]:
    """The ranks as torchrun's environment says, joined (NCCL on GPUs, gloo else), and this rank's device.

    ``device`` is "auto" (the GPU where there is one), "cpu", "cuda" or "cuda:N". Raises UserError where there is none.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    ranks = Ranks(int(os.environ.get("RANK", 0)), world_size, int(os.environ.get("LOCAL_RANK", 0)))
    chosen = pick_device(device, ranks.local_rank if world_size > 1 else None)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        # The others wait for rank 0 while it computes a teacher's logits; of a rank that dies torchrun tells them.
        timeout = datetime.timedelta(hours=2)
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        # torchrun's store outlives a restart: without a prefix the ranks of now would read the addresses of the dead.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return ranks, chosen
