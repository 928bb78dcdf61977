"""The training step on static input, by variant: plain PyTorch (:mod:`plain`) against ours, in the ways of ``WAYS``.

Variants as in the paper: B0 is CE alone, B3 all four terms with a ResNet-50 teacher on the student's own views;
B3-cached looks the teacher's logits up, B3-no-kd has none.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from ngd_fast.bench import _timing, plain
from torch import Tensor

VARIANTS = ("B0", "B3-no-kd", "B3-cached", "B3")
COLUMNS = ("variant", "batch", "implementation", "students", "ms", "images/s")


@dataclass(frozen=True)
class Way:
    """One way of running our step; ``settings`` are sections of a StudentConfig that differ from the variant's."""

    compiled: bool
    graph: bool
    students: int = 1
    settings: dict = field(default_factory=dict)


WAYS = {
    "eager": Way(False, False),
    "compiled": Way(True, False),
    "graph": Way(True, True),
    "graph, stem by layers": Way(True, True, settings={"model": {"stem": "layers"}}),
    "graph, kernels timed": Way(True, True, settings={"train": {"deterministic": False}}),
    "graph, 2 students": Way(True, True, 2),
    "graph, 4 students": Way(True, True, 4),
}


def names(device: torch.device) -> tuple[str, ...]:
    """Every implementation that ``device`` can run: graphs need a GPU, compilation pays off there."""
    ours = [name for name, way in WAYS.items() if device.type == "cuda" or not way.compiled]
    hows = plain.HOWS if device.type == "cuda" else ("eager",)
    return tuple([f"PyTorch {how}" for how in hows] + [f"ngd_fast {name}" for name in ours])


def measure(
    variant: str,
    batch: int,
    image_size: int,
    device: torch.device,
    *,
    implementations: Sequence[str] | None = None,
    arch: str = "resnet18",
    teacher_arch: str = "resnet50",
    seconds: float = 1.0,
) -> list[dict]:
    """Rows for one variant and batch, all measured in turns; ``implementations`` are some of :func:`names`."""
    torch.compiler.reset()
    inputs = Inputs(variant, batch, image_size, device, arch, teacher_arch)
    with kept_settings():
        torch.set_float32_matmul_precision("high")
        calls = {name: make_step(name, inputs) for name in implementations or names(device)}
        times = _timing.median_us(calls, device, seconds=seconds)
    rows = []
    for name, us in times.items():
        students = WAYS[name.removeprefix("ngd_fast ")].students if name.startswith("ngd_fast ") else 1
        rows.append(
            {
                "variant": variant,
                "batch": batch,
                "implementation": name,
                "students": students,
                "ms": us / 1e3,
                "images/s": batch * students / us * 1e6,
            }
        )
    return rows


def table(rows: Sequence[dict]) -> list[list[str]]:
    """Cells in the order of COLUMNS."""
    return [[*(str(row[name]) for name in COLUMNS[:4]), f"{row['ms']:,.2f}", f"{row['images/s']:,.0f}"] for row in rows]


def make_step(name: str, inputs: "Inputs") -> _timing.Call:
    """A call that makes one step of training the way ``name`` says, one of :func:`names`.

    It returns the loss (plain PyTorch) or the first student's history, both on the device.
    """
    package, _, how = name.partition(" ")
    if package == "PyTorch":
        return plain_step(how, inputs, lambda: (inputs.images, inputs.labels))
    way = WAYS[how]
    config = inputs.config(way)
    return _with_cudnn(_our_step(way, config, inputs), deterministic=config.train.deterministic)


@dataclass
class Inputs:
    """One batch of grey noise and what the variant needs besides, the same for every implementation."""

    variant: str
    batch: int
    image_size: int
    device: torch.device
    arch: str = "resnet18"
    teacher_arch: str = "resnet50"

    def __post_init__(self):
        from ngd_fast.prototypes.bank import PrototypeBank

        rng = torch.Generator().manual_seed(0)
        dtype = plain.amp_dtype(self.device) or torch.float32
        self.grey = torch.randn(self.batch, 1, self.image_size, self.image_size, generator=rng).to(self.device, dtype)
        self.images = self.grey.repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, 8, (self.batch,), generator=rng).to(self.device)
        self.cache = torch.randn(2, self.batch, 8, generator=rng).half().to(self.device)
        ratings = torch.rand(2, 500, generator=rng) * 2 - 1
        self.bank = PrototypeBank.build(torch.randn(500, 256, generator=rng), ratings[0], ratings[1])

    def config(self, way: Way):
        from ngd_fast.student.config import StudentConfig

        full = self.variant != "B0"
        train = {"precision": "bf16" if self.device.type == "cuda" else "fp32", "batch_size": self.batch}
        objective = {
            "kd": {"weight": 0.3 if self.variant in ("B3", "B3-cached") else 0.0},
            "proto": {"weight": 0.12 if full else 0.0},
            "geo": {"weight": 0.012 if full else 0.0, "schedule": {"kind": "constant"}},
        }
        sections = {"model": {"arch": self.arch}, "objective": objective, "train": train}
        for name, values in way.settings.items():
            sections[name] = {**sections.get(name, {}), **values}
        return StudentConfig.model_validate({"name": self.variant, **sections})

    def network(self, arch: str) -> torch.nn.Module:
        from ngd_fast.student.networks import build_student

        torch.manual_seed(0)
        return build_student(arch)


def _plain_objective(variant: str, bank, device: torch.device) -> plain.Objective:
    """CE by F.cross_entropy; more by the reference, which is plain PyTorch."""
    from ngd_fast.objective import functional

    weight = torch.ones(8, device=device)
    if variant == "B0":
        return lambda features, logits, labels, _: F.cross_entropy(logits, labels, weight, label_smoothing=0.055)
    prototypes, prior = bank.prototypes.to(device), bank.prior.to(device)

    def objective(features, logits, labels, teacher_logits):
        return functional.ngd_objective(
            features,
            logits,
            labels,
            prototypes,
            prior,
            teacher_logits=teacher_logits,
            class_weight=weight,
            backend="reference",
        ).total

    return objective


def plain_step(how: str, inputs: Inputs, batch: Callable[[], tuple[Tensor, Tensor]]) -> _timing.Call:
    """Plain PyTorch's step of the variant on the images and labels that ``batch`` gives."""
    teacher = None
    if inputs.variant == "B3":
        network = inputs.network(inputs.teacher_arch)
        teacher = plain.make_teacher(network, inputs.device, compiled=how != "eager")
    elif inputs.variant == "B3-cached":
        logits = inputs.cache[0].float()
        teacher = lambda images: logits  # noqa: E731
    call = plain.training_step(
        inputs.network(inputs.arch),
        _plain_objective(inputs.variant, inputs.bank, inputs.device),
        batch,
        device=inputs.device,
        how=how,
        teacher=teacher,
    )
    return _with_cudnn(call, deterministic=False)


def _our_step(way: Way, config, inputs: Inputs) -> _timing.Call:
    from ngd_fast.faces.feeds import Batch
    from ngd_fast.student.schedule import schedule_table
    from ngd_fast.student.step import StudentStep
    from ngd_fast.student.step_runner import StepRunner

    device = inputs.device
    students = [inputs.network(inputs.arch) for _ in range(way.students)]
    batch = Batch(
        images=_our_images(config, students[0], inputs),
        target_dist=F.one_hot(inputs.labels, 8).float(),
        labels=inputs.labels,
        index=torch.arange(inputs.batch, device=device),
    )
    steps = [
        StudentStep(
            student.to(device, memory_format=torch.channels_last).train(),
            config,
            schedule=schedule_table(config, 10),  # its last row serves every step beyond
            class_counts=[100] * 8,
            bank=inputs.bank,
            device=device,
            compiled=way.compiled,
        )
        for student in students
    ]
    runner = StepRunner(steps, _our_teacher(way, config, inputs), use_graph=way.graph)

    def call():
        runner([batch])
        return steps[0].history

    return call


def _our_images(config, student, inputs: Inputs) -> Tensor:
    """One channel where the student takes it through the fused stem, as in training; else three."""
    from ngd_fast.student import stem
    from ngd_fast.student.resnet import ResNet

    backbone = student.backbone
    if config.model.stem == "layers" or not isinstance(backbone, ResNet):
        return inputs.images
    return inputs.images if stem.why_not(inputs.grey, backbone.conv1, backbone.bn1) else inputs.grey


def _our_teacher(way: Way, config, inputs: Inputs):
    from ngd_fast.student.fused_teacher import prepare_live_teacher
    from ngd_fast.student.kd_teacher import CachedTeacher, LogitsOnly, fold_batch_norms

    if inputs.variant == "B3-cached":
        return CachedTeacher(inputs.cache, config.augment, config.seed)
    if inputs.variant != "B3":
        return None
    network = LogitsOnly(inputs.network(inputs.teacher_arch)).eval().requires_grad_(False)
    fold_batch_norms(network)
    network = network.to(inputs.device, memory_format=torch.channels_last)
    switches = {"compiled": way.compiled, "deterministic": config.train.deterministic}
    return prepare_live_teacher(network, inputs.device, plain.amp_dtype(inputs.device), **switches)


def _with_cudnn(call: _timing.Call, *, deterministic: bool) -> _timing.Call:
    """``call`` under the choice of cuDNN's algorithms that a trainer makes at its start."""

    def under_choice():
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, not deterministic
        return call()

    return under_choice


@contextlib.contextmanager
def kept_settings():
    """Within: what is set for the whole process may be changed."""
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
        torch.set_float32_matmul_precision(precision)
