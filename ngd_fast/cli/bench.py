"""ngd-fast bench: measure this machine and print a table."""

import click


@click.group("bench")
def command():
    """Measure this machine: objective, training step, its stem, feeds, training end to end."""


def _options(function):
    for option in (
        click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Also write the rows as JSON."),
        click.option("--device", help="cuda or cpu.  [default: cuda where there is one]"),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: PyTorch's own]"),
    ):
        function = option(function)
    return function


_seconds = click.option(
    "--seconds", type=click.FloatRange(min=0.01), default=0.3, show_default=True, help="For each number."
)


@command.command()
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="Rows; repeatable.")
@click.option("--dtype", "dtypes", type=click.Choice(["float32", "bfloat16"]), multiple=True, help="Repeatable.")
@_seconds
@_options
def objective(batches, dtypes, device, threads, seconds, json_path):
    """The whole objective: plain PyTorch eager and compiled against each backend, in and out of a CUDA graph."""
    device = _start(device, threads)
    from ngd_fast.bench import objective as bench
    from ngd_fast.console import progress

    batches = batches or ((128, 1024, 16_384, 262_144) if device.type == "cuda" else (32, 128, 1024, 4096))
    shapes = [(B, dtype) for B in batches for dtype in dtypes or tuple(bench.DTYPES)]
    rows = []
    for B, dtype in progress(shapes, desc="objective", unit="shape"):
        rows += bench.measure(B, dtype, device, seconds=seconds)
    _finish(bench.COLUMNS, bench.table(rows), rows, device, json_path)


def _network_options(function):
    for option in (
        click.option("--teacher-arch", default="resnet50", show_default=True, help="The KD teacher of variant B3."),
        click.option("--arch", default="resnet18", show_default=True),
        click.option(
            "--image-size", type=click.IntRange(min=8), help="Side in pixels.  [default: 224 on a GPU, else 48]"
        ),
    ):
        function = option(function)
    return function


@command.command()
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="Images; repeatable.")
@click.option(
    "--variant",
    "variants",
    type=click.Choice(["B0", "B3-no-kd", "B3-cached", "B3"]),
    multiple=True,
    help="Repeatable. B3's teacher sees the student's views, B3-cached's logits are looked up.  [default: all]",
)
@_network_options
@_seconds
@_options
def step(batches, variants, image_size, arch, teacher_arch, device, threads, seconds, json_path):
    """The training step on static input: plain PyTorch against ours, eager, compiled, in one graph."""
    device = _start(device, threads)
    from ngd_fast.bench import step as bench
    from ngd_fast.console import progress

    on_gpu = device.type == "cuda"
    batches = batches or ((128,) if on_gpu else (32,))
    cases = [(variant, batch) for variant in variants or bench.VARIANTS for batch in batches]
    options = {"arch": arch, "teacher_arch": teacher_arch, "seconds": seconds}
    rows = []
    for variant, batch in progress(cases, desc="step", unit="case"):
        rows += bench.measure(variant, batch, image_size or (224 if on_gpu else 48), device, **options)
    _finish(bench.COLUMNS, bench.table(rows), rows, device, json_path)


@command.command()
@click.option("--batch", type=click.IntRange(min=1), help="[default: 128 on a GPU, else 32]")
@click.option("--variant", "variants", type=click.Choice(["B0", "B3"]), multiple=True, help="Repeatable.")
@click.option(
    "--feed",
    "kinds",
    type=click.Choice(["torch", "dali", "resident"]),
    multiple=True,
    help="Repeatable.  [default: those that are there]",
)
@click.option("--images", type=click.IntRange(min=1), help="Faces in an epoch.  [default: 28160 on a GPU, else 640]")
@click.option("--epochs", type=click.IntRange(min=1), default=3, show_default=True, help="After one to warm up.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key of the configuration.")
@_network_options
@_options
def train(batch, variants, kinds, images, epochs, settings, image_size, arch, teacher_arch, device, threads, json_path):
    """Training end to end: our trainer with each feed against plain PyTorch; images/s, share of waiting."""
    device = _start(device, threads)
    from ngd_fast.bench import train as bench
    from ngd_fast.console import progress

    on_gpu = device.type == "cuda"
    rows = []
    for variant in progress(variants or bench.VARIANTS, desc="train", unit="variant"):
        rows += bench.measure(
            variant,
            batch or (128 if on_gpu else 32),
            image_size or (224 if on_gpu else 48),
            device,
            kinds=kinds or None,
            arch=arch,
            teacher_arch=teacher_arch,
            images=images or (28_160 if on_gpu else 640),
            epochs=epochs,
            settings=settings,
        )
    _finish(bench.COLUMNS, bench.table(rows), rows, device, json_path)


@command.command()
@click.option("--batch", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--image-size", type=click.IntRange(min=8), default=224, show_default=True, help="Side in pixels.")
@click.option(
    "--workers", type=click.IntRange(min=0), help="Threads that prepare faces; default: 0 on a CPU, up to 8 for a GPU."
)
@_seconds
@_options
def feeds(batch, image_size, workers, device, threads, seconds, json_path):
    """The feeds alone, on random faces: plain PyTorch, DALI, resident (those that are there)."""
    device = _start(device, threads)
    from ngd_fast.bench import feeds as bench
    from ngd_fast.console import progress

    rows = []
    for kind in progress(bench.kinds(device), desc="feeds", unit="feed"):
        rows += bench.measure(batch, image_size, device, feeds=[kind], workers=workers, seconds=seconds)
    _finish(bench.COLUMNS, bench.table(rows), rows, device, json_path)


@command.command()
@click.option("--batch", type=click.IntRange(min=1), help="Images.  [default: 128 on a GPU, else 16]")
@click.option("--image-size", type=click.IntRange(min=16), default=224, show_default=True, help="Side in pixels.")
@_seconds
@_options
def stem(batch, image_size, device, threads, seconds, json_path):
    """A ResNet's first layers on grey faces: layer by layer in plain PyTorch against the fused stem."""
    device = _start(device, threads)
    from ngd_fast.bench import stem as bench

    rows = bench.measure(batch or (128 if device.type == "cuda" else 16), image_size, device, seconds=seconds)
    _finish(bench.COLUMNS, bench.table(rows), rows, device, json_path)


def _start(device: str | None, threads: int | None):
    import torch

    from ngd_fast.errors import UserError

    if threads:
        torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device: must be cpu or cuda, is {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device; use --device cpu")
    return torch.device(device)


def _finish(columns, cells, rows, device, json_path) -> None:
    from ngd_fast.artifacts.files import write_json
    from ngd_fast.bench import _timing
    from ngd_fast.console import print_table

    about = _timing.machine(device)
    click.echo(_timing.describe(about))
    print_table(columns, cells)
    if json_path:
        write_json(json_path, {"machine": about, "rows": rows})
