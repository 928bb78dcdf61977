"""The whole objective, all four terms: plain PyTorch, eager and compiled, against each backend, in and out of graphs.

The yardstick is ``compile`` in a CUDA graph: torch.compile of the reference, captured with static inputs.
"""

from collections.abc import Sequence

import torch
from ngd_fast.bench import _timing

from ngd_fast.devices import torch_compile
from ngd_fast.objective import backends, functional

BATCHES = (32, 128, 1024, 4096, 16_384, 65_536, 262_144)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
D, C, K = 256, 8, 25
_SMALL, _GRAPH_CALLS = 4096, 20
COLUMNS = ("B", "dtype", "implementation", "graph", "what", "us", "us cold", "GB/s", "extra MB")


def implementations(device: torch.device) -> tuple[str, ...]:
    """Plain PyTorch, then the fused backends that are there and take tensors of ``device``."""
    wanted = ("cpu",) if device.type == "cpu" else ("triton", "cuda")
    return ("eager", "compile", *(name for name in wanted if not backends.why_not(name)))


def make_inputs(B: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict:
    """Arguments of ngd_objective, random; features and logits want gradients, D-Geo's weight lies on the device."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (B,), generator=rng)
    centre = torch.randn(C, D, generator=rng)
    tensors = dict(
        features=(torch.randn(B, D, generator=rng) + 0.7 * centre[labels]).to(dtype),
        logits=(3 * torch.randn(B, C, generator=rng)).to(dtype),
        target=labels,
        prototypes=torch.randn(K, D, generator=rng),
        prior=torch.randn(K, generator=rng).softmax(0),
        labels=labels,
        teacher_logits=(3 * torch.randn(B, C, generator=rng)).to(dtype),
        class_weight=torch.rand(C, generator=rng) + 0.5,
        geo_weight=torch.tensor(0.012),
    )
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    for name in ("features", "logits"):
        tensors[name].requires_grad_()
    return tensors


def counted_bytes(B: int, dtype: torch.dtype, what: str) -> int:
    """What must move: features twice (D-Geo's gradient needs the whole batch first), logits, teacher, target and labels
    once; with gradients, each written once."""
    element = dtype.itemsize
    reads = 2 * B * D * element + 2 * B * C * element + 2 * B * 8
    return reads if what == "forward" else reads + B * (D + C) * element


def make_call(implementation: str, inputs: dict, what: str) -> _timing.Call:
    """``forward`` (no gradients wanted), ``train`` (forward of a training step) or ``both`` (with the backward
    pass)."""
    backend = "reference" if implementation in ("eager", "compile") else implementation

    def total():
        return functional.ngd_objective(**inputs, backend=backend).total

    if implementation == "compile":
        total = torch_compile(total, fullgraph=True, dynamic=False)
    if what == "forward":

        def call():
            with torch.no_grad():
                return total()

        return call
    if what == "train":
        return total
    return lambda: torch.autograd.grad(total(), (inputs["features"], inputs["logits"]))


def measure(
    B: int,
    dtype_name: str,
    device: torch.device,
    names: Sequence[str] | None = None,
    *,
    whats: Sequence[str] = ("forward", "train", "both"),
    seconds: float = 0.3,
) -> list[dict]:
    """Rows for one shape; ``names`` are some of :func:`implementations`, by default all.

    The row ``backward`` is ``both`` minus ``train``, the forward pass of a training step.
    """
    names = names or implementations(device)
    dtype = DTYPES[dtype_name]
    inputs = make_inputs(B, dtype, device)
    torch.compiler.reset()
    calls = {(name, False, what): make_call(name, inputs, what) for name in names for what in whats}
    extra = {}
    for (name, _, what), call in calls.items():
        call()
        if what != "train":
            extra[name, what] = _timing.peak_extra_bytes(call, device)
    graphs = {}
    if device.type == "cuda":
        # A small batch takes the device less time than a replay takes the host: many calls in one graph.
        times = _GRAPH_CALLS if B <= _SMALL else 1
        for (name, _, what), call in tuple(calls.items()):
            if what != "train":
                calls[name, True, what] = _timing.in_graph(call, times)
                graphs[name, True, what] = _timing.in_graph(call)
    warm = _timing.median_us(calls, device, seconds=seconds)
    warm.update({key: warm[key] / times for key in graphs})
    cold = _timing.cold_us(graphs, device) if graphs else {}
    rows = []
    for (name, graph, what), us in warm.items():
        row = {"B": B, "dtype": dtype_name, "implementation": name, "graph": graph, "what": what, "us": us}
        if what == "train":
            row.update(what="backward", us=warm[name, graph, "both"] - us)
        else:
            slowest = cold.get((name, graph, what))
            row["us cold"] = slowest
            row["GB/s"] = counted_bytes(B, dtype, what) / (slowest or us) / 1e3
            row["extra MB"] = None if graph or extra[name, what] is None else extra[name, what] / 1e6
        rows.append(row)
    return rows


def table(rows: Sequence[dict]) -> list[list[str]]:
    """Cells in the order of COLUMNS."""
    return [
        [
            f"{row['B']:,}",
            row["dtype"],
            row["implementation"],
            "graph" if row["graph"] else "",
            row["what"],
            f"{row['us']:,.1f}",
            *("" if row.get(name) is None else f"{row[name]:,.1f}" for name in COLUMNS[6:]),
        ]
        for row in rows
    ]
