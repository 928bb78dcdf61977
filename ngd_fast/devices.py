"""The device that a user names."""

from collections.abc import Callable

import torch

from ngd_fast.errors import UserError


def pick_device(device: str, local_rank: int | None = None) -> torch.device:
    """The device meant by "auto" (the GPU where there is one), "cpu", "cuda" or "cuda:N".

    Raises UserError where there is no such device. ``local_rank`` chooses among several GPUs where no number was given.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device}: must be auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"device {device}: must be auto, cpu, cuda or cuda:N")
    if chosen.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = chosen.index if chosen.index is not None else (local_rank or 0)
    if index >= count:
        seen = f"{count} GPUs; use a lower number" if count else "no GPU; use --device cpu"
        raise UserError(f"device {device}: PyTorch sees {seen}")
    return torch.device("cuda", index)


def torch_compile(function: Callable, **options) -> Callable:
    """torch.compile of ``function``, its code on disk kept apart for each instruction set of the CPU.

    PyTorch's own key (2.13) leaves it out: code made for AVX2 and found by a process with AVX-512, be it in a folder
    that machines share, has loops of the one width over vectors of the other, and writes past its buffers.
    """
    config = torch.compiler.config
    config.cache_key_tag = config.cache_key_tag or torch.backends.cpu.get_cpu_capability()
    return torch.compile(function, **options)


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that new tensors can have: what nobody holds, and what PyTorch keeps of freed tensors."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
