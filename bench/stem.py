"""A ResNet's first layers on grey faces: layer by layer in plain PyTorch, compiled and captured, against ours, fused.

Convolution 7x7, batch norm, ReLU and max-pooling, in bfloat16 as autocast runs them. Plain PyTorch takes three equal
channels, channels-last, which cuDNN convolves faster than one.
"""

from collections.abc import Sequence

import torch
from ngd_fast.bench import _timing
from torch import nn

from ngd_fast.devices import torch_compile
from ngd_fast.student import stem

CHANNELS = 64
COLUMNS = ("batch", "px", "implementation", "graph", "what", "us", "GB/s", "extra MB")


def implementations(device: torch.device) -> tuple[str, ...]:
    """Plain PyTorch, then the fused stem where it runs."""
    return ("eager", "compile", *(() if stem.why_not_here(device) else ("fused",)))


def counted_bytes(batch: int, size: int, what: str) -> int:
    """What must move in bfloat16 with one channel of input: images, the pooled output and the byte that says where each
    of its values came from; backward the same again, with the output's gradient for the output."""
    forward = batch * (size * size * 2 + (size // 4) ** 2 * CHANNELS * 3)
    return forward if what == "forward" else 2 * forward


def make_call(implementation: str, batch: int, size: int, device: torch.device, what: str) -> _timing.Call:
    """``forward`` of a training step, or ``both`` with the backward pass to the parameters."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, CHANNELS, 7, 2, 3, bias=False).to(device, memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(CHANNELS).to(device)
    grey = torch.randn(batch, 1, size, size, device=device, dtype=torch.bfloat16)
    images = (
        grey if implementation == "fused" else grey.repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)
    )
    parameters = (*conv.parameters(), *norm.parameters())

    def layers(images):
        with torch.autocast(device.type, torch.bfloat16):
            return nn.functional.max_pool2d(norm(conv(images)).relu(), 3, 2, 1)

    def fused(images):
        return stem.grey_stem(images, conv, norm)

    run = fused if implementation == "fused" else layers
    if implementation != "eager":
        run = torch_compile(run, fullgraph=True, dynamic=False)
    if what == "forward":
        return lambda: run(images)
    gradient = torch.randn(batch, CHANNELS, size // 4, size // 4, device=device, dtype=torch.bfloat16)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    return lambda: torch.autograd.grad(run(images), parameters, gradient)


def measure(
    batch: int,
    size: int,
    device: torch.device,
    names: Sequence[str] | None = None,
    *,
    whats: Sequence[str] = ("forward", "both"),
    seconds: float = 0.3,
) -> list[dict]:
    """Rows for one batch of ``size`` x ``size`` pixels; ``names``: some of :func:`implementations`."""
    torch.compiler.reset()
    names = names or implementations(device)
    calls = {(name, False, what): make_call(name, batch, size, device, what) for name in names for what in whats}
    extra = {key: _timing.peak_extra_bytes(call, device) for key, call in calls.items()}
    if device.type == "cuda":
        calls.update({(name, True, what): _timing.in_graph(call) for (name, _, what), call in tuple(calls.items())})
    return [
        {
            "batch": batch,
            "px": size,
            "implementation": name,
            "graph": graph,
            "what": what,
            "us": us,
            "GB/s": counted_bytes(batch, size, what) / us / 1e3,
            "extra MB": None if graph or extra[name, graph, what] is None else extra[name, graph, what] / 1e6,
        }
        for (name, graph, what), us in _timing.median_us(calls, device, seconds=seconds).items()
    ]


def table(rows: Sequence[dict]) -> list[list[str]]:
    """Cells in the order of COLUMNS."""
    return [
        [
            str(row["batch"]),
            str(row["px"]),
            row["implementation"],
            "graph" if row["graph"] else "",
            row["what"],
            *("" if row[name] is None else f"{row[name]:,.1f}" for name in COLUMNS[5:]),
        ]
        for row in rows
    ]
