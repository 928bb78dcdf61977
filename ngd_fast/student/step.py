"""One step of training: forward, objective, backward, clipping, optimizer. Run by ``StepRunner``, for one student.

Everything that changes from step to step (learning rate, D-Geo's weight, step counter, the terms of the last steps)
lies in device tensors that are changed in place, so that a step asks the device nothing and can be captured as one CUDA
graph (:mod:`ngd_fast.student.step_runner`); without a graph the same lines run as they are.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ngd_fast.errors import UserError
from ngd_fast.faces.feeds import Batch
from ngd_fast.objective import functional
from ngd_fast.prototypes.bank import PrototypeBank
from ngd_fast.student.config import CEConfig, StudentConfig
from ngd_fast.student.distributed import Ranks
from ngd_fast.student.muon import Muon, muon_weights
from ngd_fast.student.networks import Student, compile_network, weight_decay_groups

TERMS = ("loss", "ce", "kd", "proto", "geo_var", "geo_margin", "grad_norm")
"""Columns of a step's history; all but the first and last unweighted."""

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def class_weights(config: CEConfig, counts: Sequence[int] | np.ndarray) -> torch.Tensor | None:
    """float32 [C]: count^-power, scaled to a mean of 1 over the classes that occur (1 for those that do not)."""
    if config.class_weights == "none":
        return None
    counts = np.asarray(counts, dtype=np.float64)
    occurs = counts > 0
    weights = np.where(occurs, np.maximum(counts, 1) ** -config.class_weight_power, 0)
    return torch.tensor(np.where(occurs, weights / weights[occurs].mean(), 1.0), dtype=torch.float32)


class StudentStep:
    """A student, its optimizer and its objective; :meth:`run` makes one step.

    Parameters
    ----------
    student         on ``device``, in the memory format that it shall keep
    schedule        float32 [steps, 2], see :func:`ngd_fast.student.schedule.schedule_table`
    class_counts    [C], for the class weights
    bank            needed where Proto-KD is on
    compiled        torch.compile the network
    """

    def __init__(
        self,
        student: Student,
        config: StudentConfig,
        *,
        schedule: torch.Tensor,
        class_counts: Sequence[int] | np.ndarray,
        bank: PrototypeBank | None,
        device: torch.device,
        ranks: Ranks | None = None,
        compiled: bool = False,
    ):
        self.student, self.config, self.device = student, config, device
        self.ranks = ranks or Ranks()
        self.autocast = AUTOCAST[config.train.precision]
        self.network = self._wrap(student, compiled)
        self.schedule = schedule.to(device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.geo_weight = torch.zeros((), device=device)
        self.lr = torch.zeros((), device=device)
        self.history = torch.zeros(config.train.log_every, len(TERMS), device=device)
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self._begun = 0  # steps, as the host counts them: replays of a graph are not among them
        self.average = None
        if config.train.ema is not None:
            self.average = {name: value.clone() for name, value in student.state_dict().items()}
        self._objective_constants(class_counts, bank)

    def _wrap(self, student: Student, compiled: bool) -> nn.Module:
        deterministic = self.config.train.deterministic
        network = compile_network(student, deterministic=deterministic) if compiled else student
        if self.ranks.world_size == 1:
            return network
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)

    def _make_optimizer(self) -> torch.optim.AdamW | Muon:
        options = self.config.optimizer
        matrices = muon_weights(self.student.backbone) if options.kind == "muon" else []
        decay = {"everything": options.decay_all, "but_for": matrices}
        adamw = torch.optim.AdamW(
            weight_decay_groups(self.student, options.weight_decay, **decay),
            lr=self.lr,
            betas=options.betas,
            eps=options.eps,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        if options.kind == "adamw":
            return adamw
        if not matrices:
            arch = self.config.model.arch
            raise UserError(f"optimizer.kind=muon: model.arch {arch} has no convolutions behind its first; use adamw")
        return Muon(
            matrices,
            adamw,
            lr=self.lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            lr_scale=options.muon_lr_scale,
        )

    def _objective_constants(self, class_counts, bank: PrototypeBank | None) -> None:
        objective = self.config.objective
        move = lambda tensor: None if tensor is None else tensor.to(self.device)  # noqa: E731
        self.class_weight = move(class_weights(objective.ce, class_counts))
        with_bank = bank is not None and objective.proto.weight > 0
        self.prototypes = move(bank.prototypes) if with_bank else None
        self.prior = move(bank.prior) if with_bank else None
        self.class_prior = move(bank.class_prior) if with_bank and objective.proto.prior == "class" else None
        self.use_kd = objective.kd.weight > 0
        self.use_geo = objective.geo.weight > 0
        self.settings = objective.settings()

    def run(self, batches: Sequence[Batch], teacher_logits: Sequence[torch.Tensor | None]) -> None:
        """One step of the optimizer on ``config.train.accumulation`` batches. Changes device tensors only.

        ``teacher_logits``: [B, C] float32 for each batch; None where no student here learns from a teacher.
        """
        # A warm-up before a capture may run past the end.
        values = self.schedule.index_select(0, self.step.clamp(max=len(self.schedule) - 1))
        self.lr.copy_(values[0, 0])
        self.geo_weight.copy_(values[0, 1])
        terms = self._gradients(batches, teacher_logits)
        sam = self.config.optimizer.sam
        self._begun += 1
        if sam.rho > 0 and self._begun % sam.every == 0:
            self._second_pass(batches, teacher_logits)
        norm = self._update()
        mean = terms[0] if len(terms) == 1 else torch.stack(terms).mean(dim=0)
        row = torch.cat([mean, norm.view(1)])
        slot = self.step.remainder(len(self.history))
        self.history.index_copy_(0, slot, row.unsqueeze(0))
        self.step.add_(1)

    def _gradients(self, batches, teacher_logits) -> list[torch.Tensor]:
        """Make the gradients of the batches' mean; returns each batch's terms."""
        self.optimizer.zero_grad(set_to_none=True)
        last = len(batches) - 1
        return [
            self._forward_backward(batch, logits, synchronise=i == last)
            for i, (batch, logits) in enumerate(zip(batches, teacher_logits, strict=True))
        ]

    def _second_pass(self, batches, teacher_logits) -> None:
        """SAM: put the gradients at perturbed weights in place of the first; weights and buffers keep their bits."""
        tensors = [*(p.detach() for p in self.parameters), *self.student.buffers()]
        before = [tensor.clone() for tensor in tensors]
        self._perturb()
        self._gradients(batches, teacher_logits)
        for tensor, value in zip(tensors, before):
            tensor.copy_(value)

    @torch.no_grad()
    def _perturb(self) -> None:
        """Move the weights w by rho g / |g|; adaptive: rho w^2 g / | |w| g |. No matter how GradScaler scaled g."""
        sam = self.config.optimizer.sam
        moves = [p.grad for p in self.parameters]
        sizes = torch._foreach_abs(self.parameters) if sam.adaptive else None
        if sam.adaptive:
            moves = torch._foreach_mul(moves, sizes)
        factor = sam.rho / torch.nn.utils.get_total_norm(moves, foreach=True)
        sound = (factor > 0) & (factor < torch.inf)  # neither NaN, nor of a norm that is infinite or 0
        if sam.adaptive:
            moves = torch._foreach_mul(moves, sizes)
        for p, move in zip(self.parameters, moves):
            p.copy_(torch.where(sound, p + factor * move, p))

    def _forward_backward(self, batch: Batch, teacher_logits, *, synchronise: bool) -> torch.Tensor:
        if self.ranks.world_size > 1:
            self.network.require_backward_grad_sync = synchronise
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            features, logits = self.network(batch.images)
        out = self.objective(features, logits, batch, teacher_logits)
        self.scaler.scale(out.total / self.config.train.accumulation).backward()
        return torch.stack([out.total.detach(), out.ce, out.kd, out.proto, out.geo_var, out.geo_margin]).float()

    def objective(self, features, logits, batch: Batch, teacher_logits) -> functional.ObjectiveOutput:
        """The configured objective of one batch."""
        target = batch.labels
        if self.config.objective.ce.targets == "distributions":
            target = batch.target_dist
        elif self.config.data.draw_labels:
            target = batch.target_dist.argmax(dim=1)
        settings = self.settings
        if self.ranks.world_size > 1 and self.class_weight is not None and not target.is_floating_point():
            target = self._target_over_ranks(target)
            settings = replace(settings, label_smoothing=0.0)
        return functional.objective(
            settings,
            features,
            logits,
            target,
            self.prototypes,
            self.prior if self.class_prior is None else self.class_prior[batch.labels],
            labels=batch.labels if self.use_geo else None,
            teacher_logits=teacher_logits if self.use_kd else None,
            class_weight=self.class_weight,
            geo_weight=self.geo_weight if self.use_geo else None,
            group=True if self.ranks.world_size > 1 else None,
            backend=self.config.objective.backend,
        )

    def _target_over_ranks(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels as scaled distributions, whose CE averages over ranks to the weighted CE of the whole batch.

        F.cross_entropy divides by the sum of the rows' class weights, which each rank knows only for its own rows; for
        distributions it divides by the number of rows, so that the quotient of the two can be put into the target.
        """
        smoothing, classes = self.config.objective.ce.label_smoothing, len(self.class_weight)
        weight_sum = self.class_weight[labels].sum()
        dist.all_reduce(weight_sum)
        target = F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes
        return target * (len(labels) * self.ranks.world_size / weight_sum)

    def _update(self) -> torch.Tensor:
        """Clip, step and average; returns the gradient's norm before clipping."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters], foreach=True)
        if self.config.train.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.train.clip_grad, norm, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self._update_average()
        return norm.detach().float()

    @torch.no_grad()
    def _update_average(self) -> None:
        for name, value in self.student.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - self.config.train.ema)
            else:
                self.average[name].copy_(value)

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that are evaluated and saved: the average where it is on, else the student's."""
        return self.student.state_dict() if self.average is None else self.average

    def state_dict(self) -> dict:
        """Everything that the next step depends on, as tensors and plain values."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "average": self.average,
            "step": int(self.step),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from :meth:`state_dict`, in place."""
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["optimizer"]})
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr  # load_state_dict put copies there, which nothing would change any more
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            for name, value in state["average"].items():
                self.average[name].copy_(value)
        self.step.fill_(state["step"])
        self._begun = state["step"]
        # Where the epoch's steps are all done, its log still names what the last of them had.
        last = self.schedule[max(0, state["step"] - 1)]
        self.lr.copy_(last[0])
        self.geo_weight.copy_(last[1])

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that :meth:`run` changes, but for the optimizer's own."""
        own = [self.step, self.geo_weight, self.lr, self.history]
        return [*self.student.state_dict().values(), *own, *(self.average or {}).values()]

    def optimizer_tensors(self) -> list[torch.Tensor]:
        """The optimizer's moments and counters; none before its first step."""
        return [value for state in self.optimizer.state.values() for value in state.values()]
