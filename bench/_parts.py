"""What gpu-check measures, part by part: each job is a process of its own, ours and what matters most first."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

MEASURED = ("objective", "stem", "step:B0", "step:B3", "feeds", "train")
PARTS = ("build", "tests", *MEASURED)

_NCU_METRICS = (
    *("gpu__time_duration.sum", "dram__bytes.sum.per_second", "dram__throughput.avg.pct_of_peak_sustained_elapsed"),
    *("sm__throughput.avg.pct_of_peak_sustained_elapsed", "sm__warps_active.avg.pct_of_peak_sustained_active"),
    *("sm__inst_executed.avg.per_cycle_elapsed", "launch__registers_per_thread"),
)
_SHAPES = [(128, "float32"), (16_384, "bfloat16"), (262_144, "bfloat16"), (128, "bfloat16"), (1024, "bfloat16")]
_SHAPES += [(16_384, "float32")]


STUDENT = ("yaml", "tqdm", "PIL", "safetensors", "sklearn", "tensorboard")
_NEED = {"dali": "nvidia.dali", "triton": "triton"}


@dataclass
class Job:
    title: str
    calls: list[tuple[str, dict]]
    """(module of ngd_fast.bench, arguments of its ``measure``), one after the other."""
    switches: dict[str, str] = field(default_factory=dict)
    """Alternatives, which stand in its rows: of its environment, or "inductor.NAME" of torch._inductor.config."""
    limit: float = 100.0
    """Seconds."""
    under: tuple[str, ...] = ()
    """ncu's command line before the process's own; its table becomes rows."""

    @property
    def alone(self) -> bool:
        """Whether it does not wait, prepared, at :func:`_timing.await_gate`: nothing may run beside it."""
        return bool(self.under) or any(module in ("feeds", "train", "device") for module, _ in self.calls)

    @property
    def needs(self) -> tuple[str, ...]:
        """Packages without which it cannot run."""
        own = [] if self.title.startswith(("objective", "ncu small", "ncu class", "ncu rows")) else STUDENT
        return (*own, *(package for word, package in _NEED.items() if word in self.title.split()))


def jobs(part: str, tiny: bool = False) -> Iterator[Job]:
    """The jobs of one of MEASURED, in their order. ``tiny``: sizes for a CPU, implementations that it can run."""
    make = {"objective": _objective, "stem": _stem, "feeds": _feeds, "train": _train}
    name, _, variant = part.partition(":")
    yield from _step(variant, tiny) if name == "step" else make[name](tiny)


def batches(those: Iterable[Job], most: int) -> Iterator[list[Job]]:
    """``those`` in their order, up to ``most`` together where they can prepare side by side."""
    together: list[Job] = []
    for job in those:
        if together and (job.alone or len(together) == most):
            yield together
            together = []
        if job.alone:
            yield [job]
        else:
            together.append(job)
    if together:
        yield together


def _title(*words: str | dict[str, str]) -> str:
    *words, switches = words
    return " ".join([*words, *(f"{key}={value}" for key, value in switches.items())])


def _objective(tiny: bool) -> Iterator[Job]:
    shapes = [(8, "float32")] if tiny else _SHAPES

    def job(name: str, shapes=shapes, **switches: str) -> Job:
        how = {"names": [name], "whats": ["both"], "seconds": 0.01 if tiny else 0.15}
        calls = [("objective", {"B": B, "dtype_name": dtype, **how}) for B, dtype in shapes]
        size = f"B={shapes[0][0]} {shapes[0][1]}" if len(shapes) == 1 else ""
        return Job(_title(*filter(None, ("objective", name, size)), switches), calls, switches, limit=150)

    if tiny:
        yield from map(job, ("cpu", "eager"))
        return
    yield job("cuda")
    for shape in shapes:  # what takes long to compile, side by side
        yield job("compile", [shape])
    yield job("triton")
    small = [shape for shape in shapes if shape[0] <= 1024]
    yield job("cuda", small, NGD_FAST_CUDA_CLUSTER="8")
    yield job("cuda", small, NGD_FAST_CUDA_CLUSTER="0")
    yield job("cuda", NGD_FAST_CUDA_OVERLAP="0")
    yield job("eager", [(B, dtype) for B, dtype in shapes if B <= 16_384])
    yield from map(_ncu, ("small_objective", "class_sums_256", "rows_mma"))


def _stem(tiny: bool) -> Iterator[Job]:
    sizes = {"batch": 2, "size": 32, "seconds": 0.01} if tiny else {"batch": 128, "size": 224, "seconds": 0.15}
    for name in ("eager",) if tiny else ("fused", "compile", "eager"):
        yield Job(f"stem {name}", [("stem", {**sizes, "names": [name], "whats": ["both"]})])
    if not tiny:
        yield from map(_ncu, ("stem_pool", "stem_products"))


def _ncu(kernel: str) -> Job:
    command = ("ncu", "--csv", "--clock-control", "none", "--kernel-name", f"regex:{kernel}", "--launch-skip", "3")
    command += ("--launch-count", "1", "--metrics", ",".join(_NCU_METRICS))
    return Job(f"ncu {kernel}", [("hot", {"kernel": kernel})], limit=60, under=command)


def _sizes(tiny: bool) -> dict:
    if tiny:
        return {"batch": 2, "image_size": 32, "teacher_arch": "resnet18"}
    return {"batch": 128, "image_size": 224}


def _step(variant: str, tiny: bool) -> Iterator[Job]:
    def job(name: str, variant: str = variant, **switches: str) -> Job:
        more = {"variant": variant, "implementations": [name], **({"seconds": 0.01} if tiny else {})}
        return Job(_title("step", variant, name, switches), [("step", {**_sizes(tiny), **more})], switches)

    def longest(name: str) -> Job:
        return Job(f"longest {variant}", [("longest", {**_sizes(tiny), "variant": variant, "implementation": name})])

    if tiny:
        yield from (job("ngd_fast eager"), job("PyTorch eager"), longest("ngd_fast eager"))
        return
    yield job("ngd_fast graph")
    yield job("PyTorch graph")
    yield longest("ngd_fast graph")
    yield job("ngd_fast graph, kernels timed")
    if variant == "B3":
        yield job("ngd_fast graph", NGD_FAST_TEACHER="compiled")
        yield from (job("ngd_fast graph", "B3-no-kd"), job("ngd_fast graph", "B3-cached"))
        yield job("PyTorch graph", "B3-cached")
    yield job("ngd_fast graph, stem by layers")
    yield job("ngd_fast graph", TORCHINDUCTOR_ENABLE_PDL="1")
    yield job("ngd_fast graph", **{"inductor.combo_kernels": "1"})
    yield from map(job, ("ngd_fast compiled", "PyTorch compiled", "ngd_fast eager", "PyTorch eager"))
    if variant == "B0":
        yield from map(job, ("ngd_fast graph, 2 students", "ngd_fast graph, 4 students"))


def _feeds(tiny: bool) -> Iterator[Job]:
    sizes = {"batch": 8, "size": 32, "seconds": 0.1} if tiny else {"batch": 128, "size": 224, "workers": 4}
    for kind in ("torch",) if tiny else ("resident", "dali", "torch"):
        yield Job(f"feed {kind}", [("feeds", {**sizes, "feeds": [kind]})])


def _train(tiny: bool) -> Iterator[Job]:
    sizes = {**_sizes(tiny), **({"images": 8, "epochs": 1} if tiny else {"epochs": 2})}

    def job(variant: str, kinds: list[str], hows: list[str]) -> Job:
        call = ("train", {**sizes, "variant": variant, "kinds": kinds, "hows": hows})
        return Job(" ".join(["train", variant, *kinds, *hows]), [call], limit=150)

    if tiny:
        yield from (job("B0", ["torch"], []), job("B0", [], ["eager"]))
        return
    yield job("B0", ["resident"], [])
    yield job("B0", [], ["graph"])
    yield job("B3", ["resident"], [])
    yield job("B0", ["dali"], [])
    yield job("B3", [], ["graph"])
    yield job("B0", ["torch"], [])
