"""What the device itself can do: the rate of a copy, which is the ceiling of everything bound by memory, and its
clocks."""

import subprocess

import torch
from ngd_fast.bench import _timing

_CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.used,memory.total"


def measure(device: torch.device, *, megabytes: int = 2048, seconds: float = 0.3) -> list[dict]:
    """One row: GB/s of a copy within the device, read and written bytes together, and what nvidia-smi says."""
    source = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    us = _timing.median_us({"copy": lambda: target.copy_(source)}, device, seconds=seconds)["copy"]
    row = {"what": "copy", "us": us, "GB/s": 2 * source.nbytes / us / 1e3}
    if device.type == "cuda":
        command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
        except (OSError, subprocess.TimeoutExpired):
            said = []
        row["clocks"] = dict(zip(_CLOCKS.split(","), said[0].split(", "))) if said else "nvidia-smi said nothing"
    return [row]
