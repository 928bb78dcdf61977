"""What a run's JSON files must hold before tables and the report are made from them: they may come from anywhere."""

from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from ngd_fast.config import Config
from ngd_fast.evaluation.predictions import MAX_CLASSES, is_name

MAX_RESAMPLES = 100_000
MAX_EPOCHS = 100_000


def _require_name(text: str) -> str:
    if not is_name(text):
        raise ValueError("must be one line of at most 200 printable characters")
    return text


Name = Annotated[str, AfterValidator(_require_name)]
Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[list[Share], Field(min_length=2, max_length=2)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Part(Config):
    """Types as JSON has them; keys that are not named here may be there."""

    model_config = ConfigDict(strict=True, extra="allow", validate_default=False)


class _Rates(_Part):
    precision: Share
    recall: Share
    f1: Share
    auroc: Share = 0
    support: Count
    ci: dict[str, Interval] = {}


class _Bootstrap(_Part):
    resamples: Annotated[int, Field(ge=0, le=MAX_RESAMPLES)]
    seed: Count


class Block(_Part):
    """The metrics under one protocol, as :func:`~ngd_fast.evaluation.metrics.evaluate` makes them."""

    accuracy: Share
    macro_f1: Share
    balanced_accuracy: Share = 0
    auroc_macro: Share = 0
    ece: Share = 0
    n: Count
    classes: Annotated[list[Name], Field(min_length=1, max_length=MAX_CLASSES)]
    confusion: list[list[Count]]
    per_class: dict[str, _Rates] = {}
    absent: list[str] = []
    ci: dict[str, Interval] = {}
    bootstrap: _Bootstrap = None

    @model_validator(mode="after")
    def _fits(self):
        count = len(self.classes)
        if len(set(self.classes)) < count:
            raise ValueError(f"a class stands twice in {', '.join(self.classes)}")
        if [len(row) for row in self.confusion] != [count] * count:
            raise ValueError(f"confusion must be {count} x {count}, as there are classes")
        unknown = sorted({*self.per_class, *self.absent} - {*self.classes})
        if unknown:
            raise ValueError(f"{unknown[0]!r:.40} is none of its classes")
        return self


class _Setting(_Part):
    arch: Name = ""
    image_size: Count = 0
    epochs: Count = 0
    batch_size: Count = 0
    lr: Annotated[float, Field(ge=0, le=1e6)] = 0
    precision: Name = ""


class _Speed(_Part):
    images_per_second: Annotated[float, Field(ge=0, le=1e15)] = 0
    seconds: Annotated[float, Field(ge=0, le=1e15)] = 0


class Metrics(_Part):
    """A metrics.json but for its blocks."""

    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    best_epoch: Count = 0
    config: _Setting = None
    train: _Speed = None
    checkpoint: dict[str, Any] = {}


class _File(_Part):
    path: Annotated[str, Field(max_length=4096)]
    sha256: Name


class _Environment(_Part):
    torch: Name = ""
    ngd_fast: Name = ""
    devices: list[Name] = []


class Fingerprint(_Part):
    """An ablation_fingerprint.json."""

    switches: dict[Name, bool] = {}
    weights: dict[Name, Annotated[float, Field(ge=-1e6, le=1e6)]] = {}
    files: dict[Name, _File] = {}
    environment: _Environment = None
    commit: Name | None = None
