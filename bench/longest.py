"""Which kernels a training step spends its time in, by PyTorch's profiler: the longest first."""

import torch
from ngd_fast.bench import _timing, step


def measure(
    variant: str,
    batch: int,
    image_size: int,
    device: torch.device,
    *,
    implementation: str = "ngd_fast graph",
    arch: str = "resnet18",
    teacher_arch: str = "resnet50",
    count: int = 40,
    steps: int = 5,
) -> list[dict]:
    """``count`` rows: a kernel's name, microseconds and launches in one step, and its share of the step's kernels."""
    torch.compiler.reset()
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    synchronise = torch.cuda.synchronize if on_gpu else lambda: None
    with step.kept_settings():
        torch.set_float32_matmul_precision("high")
        call = step.make_step(implementation, step.Inputs(variant, batch, image_size, device, arch, teacher_arch))
        for _ in range(3):
            call()
        synchronise()
        _timing.await_gate()
        with torch.profiler.profile(activities=[activity]) as profile:
            for _ in range(steps):
                call()
            synchronise()
    events = profile.key_averages()
    time_of = (lambda e: e.self_device_time_total) if on_gpu else (lambda e: e.self_cpu_time_total)
    whole = sum(map(time_of, events)) or 1
    return [
        {
            "variant": variant,
            "implementation": implementation,
            "kernel": event.key[:200],
            "us": time_of(event) / steps,
            "launches": event.count / steps,
            "share %": 100 * time_of(event) / whole,
        }
        for event in sorted(events, key=time_of, reverse=True)[:count]
    ]
