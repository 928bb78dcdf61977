"""What torchrun runs in test_distributed.py: ``gradients`` of one step, or ``train`` with a rank that dies once."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from ngd_fast.faces.feeds import Batch
from ngd_fast.prototypes.bank import PrototypeBank
from ngd_fast.student.config import load_student_config
from ngd_fast.student.distributed import Ranks, join_ranks
from ngd_fast.student.networks import build_student
from ngd_fast.student.schedule import schedule_table
from ngd_fast.student.step import StudentStep

CPU = torch.device("cpu")


def whole_batch() -> tuple[Batch, torch.Tensor]:
    """128 faces of noise with uneven classes, and a teacher's logits of them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(128, 3, 24, 24, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = (torch.rand(128, generator=generator).square() * 8).long()
    teacher_logits = torch.randn(128, 8, generator=generator)
    return Batch(images, torch.eye(8)[labels], labels, torch.arange(128)), teacher_logits


def rows_of(batch: Batch, logits: torch.Tensor, ranks: Ranks) -> tuple[Batch, torch.Tensor]:
    part = slice(ranks.rank, None, ranks.world_size)
    return Batch(*(tensor[part] for tensor in vars(batch).values())), logits[part]


def gradients(ranks: Ranks, bank: PrototypeBank, backend: str | None) -> dict[str, torch.Tensor]:
    """B3's gradients on this rank's rows, averaged by DDP. Batch norm is in eval mode: else each rank has its own."""
    changes = ["objective.geo.schedule.kind=constant", "objective.geo.weight=0.5", "train.clip_grad=null"]
    changes += ["model.arch=resnet18-w4", "train.precision=fp32", "objective.geo.margin=2.0"]
    changes += [] if backend is None else [f"objective.backend={backend}"]
    config = load_student_config("B3", changes)
    torch.manual_seed(0)
    student = build_student(config.model.arch).eval()
    table = schedule_table(config, 1)
    step = StudentStep(
        student, config, schedule=table, class_counts=[50, 30, 20, 9, 8, 5, 3, 3], bank=bank, device=CPU, ranks=ranks
    )
    batch, logits = rows_of(*whole_batch(), ranks)
    step.run([batch], [logits])
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    return {**found, "geo": step.history[0, 4:6].clone()}


def main() -> None:
    what, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    if what == "gradients":
        bank, out = arguments
        ranks, _ = join_ranks("cpu")
        for backend in ("reference", None):
            found = gradients(ranks, PrototypeBank.load(bank), backend)
            arrays = {name: value.numpy() for name, value in found.items()}
            np.savez(Path(out) / f"{backend or 'fastest'}_rank{ranks.rank}.npz", **arrays)
        ranks.close()
        return
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        run, count = StudentStep.run, [0]

        def dying(self, *args):
            count[0] += 1
            if count[0] == 9:
                os._exit(1)
            return run(self, *args)

        StudentStep.run = dying
    from ngd_fast.cli import main as command

    command(arguments)


if __name__ == "__main__":
    main()
