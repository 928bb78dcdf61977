"""The training step on static input: plain PyTorch (the reference objective) against the fused objective, by variant.

Each in three ways: eager, the network compiled, and compiled with the whole step in one CUDA graph (GPU only). Variants
as in the paper: B0 is CE alone, B3 all four terms; its KD logits are given, as when they are cached.
"""

from collections.abc import Sequence

import torch
from ngd_fast.bench import _timing

VARIANTS = ("B0", "B3")
COLUMNS = ("variant", "batch", "objective", "how", "ms", "images/s")


def make_step(
    variant: str, batch: int, image_size: int, device: torch.device, *, backend: str | None, how: str, arch: str
):
    """A call that makes one step of training. ``how``: eager, compiled or graph."""
    from ngd_fast.faces.feeds import Batch
    from ngd_fast.prototypes.bank import PrototypeBank
    from ngd_fast.student.config import StudentConfig
    from ngd_fast.student.graph import StepRunner
    from ngd_fast.student.networks import build_student
    from ngd_fast.student.schedule import schedule_table
    from ngd_fast.student.step import StudentStep

    full = variant == "B3"
    config = StudentConfig.model_validate(
        {
            "name": variant,
            "model": {"arch": arch},
            "objective": {
                "backend": backend,
                "kd": {"weight": 0.3 if full else 0.0},
                "proto": {"weight": 0.12 if full else 0.0},
                "geo": {"weight": 0.012 if full else 0.0, "schedule": {"kind": "constant"}},
            },
            "train": {"precision": "bf16" if device.type == "cuda" else "fp32", "batch_size": batch},
        }
    )
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 8, (batch,), generator=rng)
    images = torch.randn(batch, 3, image_size, image_size, generator=rng)
    inputs = Batch(
        images=images.to(device, _image_dtype(device)).contiguous(memory_format=torch.channels_last),
        target_dist=torch.nn.functional.one_hot(labels, 8).float().to(device),
        labels=labels.to(device),
        index=torch.arange(batch, device=device),
    )
    logits = torch.randn(batch, 8, generator=rng).to(device)
    bank = None
    if full:
        ratings = torch.rand(2, 500, generator=rng) * 2 - 1
        bank = PrototypeBank.build(torch.randn(500, 256, generator=rng), ratings[0], ratings[1])
    torch.manual_seed(0)
    student = build_student(arch).to(device, memory_format=torch.channels_last).train()
    step = StudentStep(
        student,
        config,
        # Steps beyond the schedule's end are not needed: the table holds more than any measurement makes.
        schedule=schedule_table(config, 1000),
        class_counts=[100] * 8,
        bank=bank,
        device=device,
        compiled=how != "eager",
    )
    runner = StepRunner([step], (lambda _: logits) if full else None, use_graph=how == "graph")
    return lambda: runner([inputs])


def _image_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def measure(
    variant: str,
    batch: int,
    image_size: int,
    device: torch.device,
    hows: Sequence[str],
    *,
    arch: str = "resnet18",
    seconds: float = 1.0,
) -> list[dict]:
    """Rows for one variant and batch: the reference objective (plain PyTorch) and the fastest backend, each way."""
    torch.compiler.reset()
    calls = {
        (objective, how): make_step(variant, batch, image_size, device, backend=backend, how=how, arch=arch)
        for objective, backend in (("plain PyTorch", "reference"), ("fused", None))
        for how in hows
    }
    times = _timing.median_us(calls, device, seconds=seconds)
    return [
        {
            "variant": variant,
            "batch": batch,
            "objective": name,
            "how": how,
            "ms": us / 1e3,
            "images/s": batch / us * 1e6,
        }
        for (name, how), us in times.items()
    ]


def table(rows: Sequence[dict]) -> list[list[str]]:
    """Cells in the order of COLUMNS."""
    return [[*(str(row[name]) for name in COLUMNS[:4]), f"{row['ms']:,.2f}", f"{row['images/s']:,.0f}"] for row in rows]
