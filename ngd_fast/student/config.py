"""The configuration of a student's training, and the packaged ones (``B0`` ... ``B3``, ``teacher``, ``fast``).

The paper's authors name their knobs differently; theirs on the left:

==============================  ============================================
kd_mse.weight                   objective.kd.weight (objective.kd.mode: mse)
proto_kd.weight, .tau           objective.proto.weight, .temperature
proto_kd.temperature (5.0)      objective.kd.temperature
d_geo.weight                    objective.geo.weight
d_geo.positive_classes          objective.geo.positive_classes
d_geo.schedule, .start, .end    objective.geo.schedule.kind, .start, .end
d_geo.hard_gate                 objective.geo.schedule.hard_gate
d_geo.intra_class: false        objective.geo.var_weight: 0
ce.label_smoothing              objective.ce.label_smoothing
ce.class_weights                objective.ce.class_weights
==============================  ============================================
"""

from collections.abc import Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ngd_fast.config import Config, load_config
from ngd_fast.errors import UserError
from ngd_fast.evaluation.schema import MAX_RESAMPLES, Name
from ngd_fast.faces.augment import AugmentConfig
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.objective.settings import KD_MODES, MARGIN, VAR_CAP, Settings

MAX_EMBEDDING = 65_536


class DataConfig(Config):
    """Which faces. Paths may be NPZ files, CSV lists or folders of class folders."""

    train: str | None = None
    valid: str | None = None
    class_map: str | None = None
    image_root: str | None = None
    image_size: int = Field(224, ge=8, le=2048)
    """Side in pixels to which every face is resized."""
    mean: float | tuple[float, float, float] = 0.5
    std: float | tuple[float, float, float] = 0.25
    """Grey values from 0 to 1 are normalised by these: one number for all channels, or three."""
    grey: bool = False
    """Turn colour faces into grey ones."""
    draw_labels: bool = False
    """Draw each epoch's labels from the raters' distributions (FER+'s "probability" mode)."""
    label_noise: float = Field(0.0, ge=0, lt=1)
    """Fraction of the training faces that get a wrong label, for studies of robustness: by ``seed``, so each seed has
    other ones; one-hot, also where targets are distributions. Class weights count the labels as they then are, as one
    would who does not know. Validation faces keep theirs."""
    skip_bad: bool = False
    """Leave undecodable images out, named and counted, instead of stopping."""

    @field_validator("std")
    @classmethod
    def _positive(cls, std):
        if min(std if isinstance(std, tuple) else (std,)) <= 0:
            raise ValueError("must be above 0")
        return std


class ModelConfig(Config):
    arch: str = Field("resnet18", max_length=200)
    embedding_dim: int = Field(256, ge=1, le=MAX_EMBEDDING)
    logit_scale: float = Field(1.0, gt=0)
    """Fixed factor on the logits; 1 is the paper's plain linear head on unit features."""
    stem: Literal["auto", "fused", "layers"] = "auto"
    """A ResNet's first layers on grey faces: one fused operator on the GPU, or layer by layer; auto: fused where it
    runs. The same function, rounded once instead of after each layer."""
    weights: str | None = None
    """File of backbone weights (torchvision's names; .safetensors, .pth or a student of ours) to start from."""
    pretrained: bool = False
    """ImageNet weights from torchvision or timm, for backbones of theirs."""


class CEConfig(Config):
    label_smoothing: float = Field(0.055, ge=0, lt=1)
    targets: Literal["labels", "distributions"] = "labels"
    """Plurality labels, or the raters' distributions."""
    class_weights: Literal["none", "power"] = "power"
    class_weight_power: float = Field(0.25, ge=0, le=2)
    """Weights are count^-power, scaled to a mean of 1 over the classes that occur."""


class KDConfig(Config):
    weight: float = Field(0.0, ge=0)
    mode: Literal[KD_MODES] = "mse"
    """What each is: ``functional.ngd_objective``. dkd and dist are computed by the objective's reference backend."""
    alpha: float | None = Field(None, ge=0)
    beta: float | None = Field(None, ge=0)
    """Weights of dkd's two terms: of the target's probability (None: 1) and of the other classes' (None: 8)."""
    temperature: float = Field(5.0, gt=0)
    scale_by_t2: bool = False
    teacher: str | tuple[str, ...] | None = None
    """A run of ours (folder or .safetensors), or torchvision:NAME / timm:NAME with ``teacher_weights``; or a list of
    such, which ``combine`` makes one."""
    teacher_weights: str | tuple[str | None, ...] | None = None
    """File of weights of that torchvision or timm classifier, with eight outputs; for a list of teachers a list as
    long, null where the teacher is a run of ours."""
    combine: Literal["probabilities", "logits"] | None = None
    """Several teachers: the mean of their probabilities at ``temperature`` (as log-probabilities times it), or of their
    logits. None: logits for mse, which compares these and would see that log-probabilities lie lower; probabilities for
    every other mode."""
    cached: bool = False
    """Use the teacher's logits on the plain face and its mirror image, computed once, instead of on each view."""

    @field_validator("teacher", "teacher_weights")
    @classmethod
    def _one_is_no_list(cls, value):
        if value == ():
            raise ValueError("must name one or more, or be null")
        return value[0] if isinstance(value, tuple) and len(value) == 1 else value

    @model_validator(mode="after")
    def _weights_for_each(self):
        count, given = (len(v) if isinstance(v, tuple) else 1 for v in (self.teacher, self.teacher_weights))
        if self.teacher_weights is not None and count != given:
            raise ValueError(f"teacher_weights: must be {count}, one for each teacher (null for a run), not {given}")
        return self

    def teachers(self) -> dict[str, tuple[str | None, str | None]]:
        """The teacher and its weights under "teacher", or those of several under "teacher_1", "teacher_2", ..."""
        if not isinstance(self.teacher, tuple):
            return {"teacher": (self.teacher, self.teacher_weights)}
        weights = self.teacher_weights or [None] * len(self.teacher)
        return {f"teacher_{i}": pair for i, pair in enumerate(zip(self.teacher, weights, strict=True), start=1)}

    def mixture(self) -> tuple[str, float]:
        """What of several teachers is averaged, and at which temperature (of logits: at any, 1)."""
        combine = self.combine or ("logits" if self.mode == "mse" else "probabilities")
        return combine, self.temperature if combine == "probabilities" else 1.0


class ProtoConfig(Config):
    weight: float = Field(0.0, ge=0)
    temperature: float = Field(0.90, gt=0)
    bank: str | None = None
    prior: Literal["global", "class"] = "global"
    """The bank's one prior (the paper), or its prior for the row's class."""


class RampConfig(Config):
    """Weight over epochs: 0 up to ``start``, half a cosine to 1 at ``end`` (late_cosine), or 1 throughout."""

    kind: Literal["late_cosine", "linear", "constant"] = "late_cosine"
    start: float = Field(20.0, ge=0)
    end: float = Field(60.0, ge=0)
    hard_gate: float = Field(0.0, ge=0, le=1)
    """A ramp below this value counts as 0 (the authors' hard_gate)."""

    @model_validator(mode="after")
    def _ordered(self):
        if self.end < self.start:
            raise ValueError(f"end must not be before start, is {self.end:g} < {self.start:g}")
        return self


class GeoConfig(Config):
    weight: float = Field(0.0, ge=0)
    var_cap: float = Field(VAR_CAP, ge=0)
    margin: float = Field(MARGIN, ge=0)
    var_weight: float = Field(1.0, ge=0)
    margin_weight: float = Field(1.0, ge=0)
    positive_classes: tuple[str, ...] = ("happiness", "surprise")
    schedule: RampConfig = RampConfig()

    @model_validator(mode="after")
    def _known(self):
        unknown = [name for name in self.positive_classes if name not in CLASS_NAMES]
        if unknown:
            raise ValueError(f"positive_classes: {unknown[0]!r} is none of {', '.join(CLASS_NAMES)}")
        if len(set(self.positive_classes)) < len(self.positive_classes):
            raise ValueError(f"positive_classes: a class stands twice in {', '.join(self.positive_classes)}")
        return self


class ObjectiveConfig(Config):
    ce: CEConfig = CEConfig()
    kd: KDConfig = KDConfig()
    proto: ProtoConfig = ProtoConfig()
    geo: GeoConfig = GeoConfig()
    backend: Literal["reference", "cpu", "triton", "cuda"] | None = None
    """Which implementation; None takes the fastest that fits."""

    def settings(self) -> Settings:
        """As the objective takes them: each under its own name, or behind that of its section (``kd.weight``)."""
        known = {field.name for field in fields(Settings)}
        given = {"high_valence": tuple(CLASS_NAMES.index(name) for name in self.geo.positive_classes)}
        for section, options in self:
            for name, value in options if isinstance(options, Config) else ():
                given |= {key: value for key in (name, f"{section}_{name}") if key in known and value is not None}
        return Settings(**given)


class SAMConfig(Config):
    """Sharpness-aware minimisation (Foret et al., 2021): the step takes the gradient at weights that are moved first,
    by ``rho`` along the gradient, and put back. Twice the work of a step; with ``train.accumulation`` over all batches
    of it. What is logged is of the weights themselves, but for grad_norm. Batch norm's running statistics are of the
    first pass. A network that draws random numbers (none by default; torchvision's stochastic depth) draws other ones
    in the second. Gradients that are not finite move nothing."""

    rho: float = Field(0.0, ge=0)
    """How far, as an L2 norm over all weights; 0: off. Papers: 0.05 to 0.1, adaptive 0.5 to 2."""
    every: int = Field(1, ge=1)
    """Every n-th step only, the others plain. Above 1 a GPU's steps run without a CUDA graph (train.cuda_graph=auto;
    true is refused): one graph holds one kind of step."""
    adaptive: bool = False
    """ASAM (Kwon et al., 2021): weights move in proportion to their own size."""

    @property
    def alternates(self) -> bool:
        """Are some steps plain and others not?"""
        return self.rho > 0 and self.every > 1


class OptimizerConfig(Config):
    """AdamW or Muon with a cosine to ``min_lr``, after a linear warm-up."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the backbone's convolutions behind the first, AdamW for everything else."""
    lr: float = Field(2e-4, gt=0)
    min_lr: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's; ``betas`` and ``eps`` are AdamW's."""
    muon_lr_scale: float = Field(1.0, gt=0)
    """Factor on ``lr`` for Muon, whose steps already have the size (RMS) of AdamW's."""
    decay_all: bool = True
    """Weight decay on biases and normalisation layers too (plain AdamW, as the paper)."""
    warmup_epochs: float = Field(0.0, ge=0)
    sam: SAMConfig = SAMConfig()


class ResolutionStage(Config):
    """Views of ``image_size`` once ``from_epoch`` epochs are finished."""

    from_epoch: int = Field(ge=0)
    image_size: int = Field(ge=8)


class TrainConfig(Config):
    epochs: int = Field(100, ge=1, le=100_000)
    resolution: tuple[ResolutionStage, ...] | None = None
    """Progressive resolution: training views grow from stage to stage, to ``data.image_size`` at most; validation stays
    at that size, and so does all training where this is None. A teacher sees the student's views, but cached logits are
    those of the full size."""
    batch_size: int = Field(128, ge=1)
    """Faces in one forward pass, over all ranks together."""
    accumulation: int = Field(1, ge=1)
    """Forward passes for one step of the optimizer."""
    clip_grad: float | None = Field(1.0, gt=0)
    """Largest L2 norm of the whole gradient."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    channels_last: bool = True
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of the backbone; auto: on a GPU."""
    cuda_graph: Literal["auto"] | bool = "auto"
    """The whole step as one CUDA graph; auto: on a GPU that trains alone, without ``optimizer.sam.every``."""
    deterministic: bool = True
    """Only algorithms that give the same bits each time, of cuDNN and in compiled code, chosen without timing them."""
    sync_bn: bool = False
    """Batch-norm statistics over all ranks (GPU only); else each rank has its own."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an average of the weights that is evaluated and saved instead of them; off as in the paper."""
    best_metric: Literal["accuracy", "macro_f1", "balanced_accuracy"] = "macro_f1"
    log_every: int = Field(50, ge=1)
    """Steps between looks at the device (progress, NaN)."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints beside those at epochs' ends, for long epochs."""
    checkpoint_seconds: float = Field(20.0, ge=0)
    """At an epoch's end a checkpoint is written if the last one is as old as this; at the run's end always."""
    valid_batch_size: int = Field(512, ge=1)
    bootstrap: int = Field(1000, ge=0, le=MAX_RESAMPLES)
    """Resamples behind the confidence intervals in metrics.json."""

    @model_validator(mode="after")
    def _growing(self):
        if self.resolution is None:
            return self
        if not self.resolution or self.resolution[0].from_epoch != 0:
            raise ValueError("resolution: the first stage must have from_epoch 0")
        for a, b in zip(self.resolution, self.resolution[1:]):
            if b.from_epoch <= a.from_epoch or b.image_size <= a.image_size:
                raise ValueError(
                    f"resolution: each stage must start later and be larger than the one before, not "
                    f"{b.image_size} px from epoch {b.from_epoch} after {a.image_size} px from epoch {a.from_epoch}"
                )
        last = self.resolution[-1].from_epoch
        if last >= self.epochs:
            raise ValueError(f"resolution: the stage from epoch {last} never starts in {self.epochs} epochs")
        return self


class FeedConfig(Config):
    kind: Literal["auto", "dali", "resident", "torch"] = "auto"
    workers: int | None = Field(None, ge=0, le=1024)
    """Threads that prepare and decode faces; None: for a GPU one for each core, 8 at most; none beside a CPU's work."""


class StudentConfig(Config):
    """Everything that a run depends on."""

    name: Name = "student"
    """The variant, as it stands in tables."""
    seed: int = Field(1, ge=0, lt=2**64)
    device: str = "auto"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    augment: AugmentConfig = AugmentConfig()
    feed: FeedConfig = FeedConfig()

    @field_validator("name")
    @classmethod
    def _no_path(cls, name):
        if "/" in name or name.startswith("."):
            raise ValueError("must be no path: a run's folder is named by it")
        return name

    @model_validator(mode="after")
    def _full_size_is_largest(self):
        if self.train.resolution and self.train.resolution[-1].image_size > self.data.image_size:
            raise ValueError(
                f"train.resolution ends at {self.train.resolution[-1].image_size} px, above data.image_size "
                f"{self.data.image_size}"
            )
        return self

    @model_validator(mode="after")
    def _one_kind_of_step(self):
        if self.optimizer.sam.alternates and self.train.cuda_graph is True:
            raise ValueError("train.cuda_graph=true holds one kind of step: use auto, or optimizer.sam.every=1")
        return self

    def switches(self) -> dict[str, bool]:
        """Which terms are on."""
        objective = self.objective
        weights = {"kd": objective.kd.weight, "proto": objective.proto.weight, "d_geo": objective.geo.weight}
        return {"ce": True, **{name: weight > 0 for name, weight in weights.items()}}


# What may differ between a checkpoint and the run that resumes it: but for rounding it changes nothing that the run
# computes. The files themselves are compared by checksum.
RESUMABLE = (
    "device",
    "data.train",
    "data.valid",
    "data.class_map",
    "data.image_root",
    "model.weights",
    "objective.kd.teacher",
    "objective.kd.teacher_weights",
    "objective.proto.bank",
    "objective.backend",
    "train.compile",
    "train.cuda_graph",
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoint_seconds",
    "train.valid_batch_size",
    "train.bootstrap",
    "feed.kind",
    "feed.workers",
)


def packaged_configs() -> list[str]:
    """Names that ``--config`` takes without a path: B0, B1, ..., demo/B0, ..."""
    root = resources.files("ngd_fast.configs")
    names = [p.name for p in root.iterdir()]
    names += [f"demo/{p.name}" for p in (root / "demo").iterdir()] if (root / "demo").is_dir() else []
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def find_config(name: str | Path) -> Path:
    """A file as it is, or the packaged configuration of that name. Raises UserError for neither."""
    path = Path(name)
    # a folder is no configuration: one named demo/B0 or B3 must not hide the packaged one
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    packaged = Path(str(resources.files("ngd_fast.configs") / f"{name}.yaml"))
    if not packaged.is_file():
        raise UserError(f"--config {name}: no such file, and none of {', '.join(packaged_configs())}")
    return packaged


def load_student_config(name: str | Path | None, overrides: Sequence[str] = ()) -> StudentConfig:
    """Read ``name`` (a file or a packaged name; None: the defaults) and apply ``key=value`` overrides."""
    return load_config(StudentConfig, None if name is None else find_config(name), overrides)


def differing_keys(
    a: dict, b: dict, *, but_for: Sequence[str] = RESUMABLE, prefix: str = "", defaults: dict | None = None
) -> list[str]:
    """Dotted keys at which two dumped configurations differ, those in ``but_for`` left out.

    A key that one of them lacks is younger than it, and had what is now its default (StudentConfig's, in ``defaults``).
    """
    defaults = StudentConfig().model_dump(mode="json") if defaults is None else defaults
    keys = []
    for key in sorted(a.keys() | b.keys()):
        name = f"{prefix}{key}"
        if name in but_for:
            continue
        left, right = (side.get(key, defaults.get(key)) for side in (a, b))
        if isinstance(left, dict) and isinstance(right, dict):
            inner = defaults.get(key)
            keys += differing_keys(
                left, right, but_for=but_for, prefix=f"{name}.", defaults=inner if isinstance(inner, dict) else {}
            )
        elif left != right:
            keys.append(name)
    return keys
