"""The objective as a module that holds the bank and the settings."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from ngd_fast.objective import checks, functional
from ngd_fast.objective.functional import ObjectiveOutput
from ngd_fast.objective.settings import MARGIN, VAR_CAP, Settings, make


class NGDObjective(nn.Module):
    """``functional.ngd_objective`` with the prototype bank as buffers and the settings as attributes.

    ``settings`` holds them as one value; each is an attribute too, that can be read and set.

    Args:
        bank: a ``PrototypeBank`` (anything with ``prototypes`` [K, D] and ``prior`` [K]), or None: no Proto-KD.
        prototypes, prior: the same as tensors, instead of ``bank``. They are copied, and stay float32 (or float64)
            when the module is cast to a half type, which would round the bank.
        class_weight: [C] weights of CE, or None.
        the rest: as in ``functional.ngd_objective``. ``geo_weight`` None switches D-Geo off.

    Buffers are persistent: a checkpoint holds the bank that the student was trained with.
    """

    prototypes: Tensor | None
    prior: Tensor | None
    class_weight: Tensor | None

    def __init__(
        self,
        bank=None,
        *,
        prototypes: Tensor | None = None,
        prior: Tensor | None = None,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.055,
        kd_weight: float = 0.30,
        kd_temperature: float = 5.0,
        kd_mode: str = "mse",
        kd_scale_by_t2: bool = False,
        kd_alpha: float = 1.0,
        kd_beta: float = 8.0,
        proto_weight: float = 0.12,
        proto_temperature: float = 0.90,
        geo_weight: float | None = 0.012,
        var_cap: float = VAR_CAP,
        margin: float = MARGIN,
        var_weight: float = 1.0,
        margin_weight: float = 1.0,
        high_valence: Sequence[int] = (1, 2),
        group=None,
        backend: str | None = None,
    ):
        super().__init__()
        if bank is not None:
            if prototypes is not None or prior is not None:
                raise ValueError("bank: wanted either a bank or prototypes and prior, got both")
            if not (hasattr(bank, "prototypes") and hasattr(bank, "prior")):
                raise TypeError(f"bank: wanted what PrototypeBank.load(path) returns, got {type(bank).__name__}")
            prototypes, prior = bank.prototypes, bank.prior
        if (prototypes is None) != (prior is None):
            raise ValueError("prototypes, prior: wanted both or neither, got one")
        for name, value in (("prototypes", prototypes), ("prior", prior), ("class_weight", class_weight)):
            self.register_buffer(name, None if value is None else torch.as_tensor(value).detach().clone())
        self.settings = make(
            label_smoothing,
            kd_weight,
            kd_temperature,
            kd_mode,
            kd_scale_by_t2,
            proto_weight,
            proto_temperature,
            var_cap,
            margin,
            var_weight,
            margin_weight,
            high_valence,
            kd_alpha,
            kd_beta,
        )
        self.geo_weight = geo_weight
        self.group = group
        self.backend = backend

    def forward(
        self,
        features: Tensor | None,
        logits: Tensor,
        target: Tensor,
        teacher_logits: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        prior: Tensor | None = None,
        ramp: float | Tensor = 1.0,
    ) -> ObjectiveOutput:
        """The objective of one batch.

        ramp: factor on ``geo_weight`` (``schedule.Ramp``): a number, or a 0-dim tensor on the device that a captured
        graph reads anew at each replay. prior: [B, K], instead of the bank's. The others as in
        ``functional.ngd_objective``.
        """
        if isinstance(ramp, Tensor):
            checks.floating("ramp", ramp, (), device=getattr(logits, "device", None))
        else:
            checks.finite("ramp", ramp)
        return functional.objective(
            self.settings,
            features,
            logits,
            target,
            self.prototypes,
            self.prior if prior is None else prior,
            labels=labels,
            teacher_logits=teacher_logits,
            class_weight=self.class_weight,
            geo_weight=None if self.geo_weight is None else ramp * self.geo_weight,
            group=self.group,
            backend=self.backend,
        )

    def _apply(self, fn, recurse=True):
        # Device moves apply; a cast to a half type does not reach the bank.
        def keep_precision(tensor):
            moved = fn(tensor)
            if moved.dtype in (torch.bfloat16, torch.float16):
                moved = tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        """What ``repr`` shows: the bank and every setting."""
        bank = "no bank" if self.prototypes is None else f"bank {list(self.prototypes.shape)}"
        settings = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(Settings))
        return f"{bank}, {settings}, geo_weight={self.geo_weight}, backend={self.backend!r}"


def _setting(name: str) -> property:
    def get(self):
        return getattr(self.settings, name)

    def put(self, value):
        self.settings = replace(self.settings, **{name: value})

    return property(get, put, doc=f"``settings.{name}``; a new value is checked.")


for _field in fields(Settings):
    setattr(NGDObjective, _field.name, _setting(_field.name))
