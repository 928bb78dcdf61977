"""The vision teacher's logits: computed on each view that the student sees, or once on two views of each face."""

import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ngd_fast.artifacts.files import atomic_path, sha256
from ngd_fast.console import progress
from ngd_fast.errors import UserError
from ngd_fast.faces.augment import FLIP, AugmentConfig, seed_key, uniform
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.feeds import Batch, make_feed
from ngd_fast.student.networks import build_student
from ngd_fast.student.resnet import ResNet
from ngd_fast.student.weights import load_student, read_state_dict, student_file


class LogitsOnly(nn.Module):
    """A network as a teacher: images normalised by the pupil's mean and std -> logits [B, C] float32.

    images [B, 3, S, S], or [B, 1, S, S] standing for three equal channels.
    """

    def __init__(self, network: nn.Module, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None):
        super().__init__()
        self.network = network
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """The same images, of the same dtype, by the mean and std that the network learned with."""
        return images if self.scale is None else (images * self.scale + self.shift).to(images.dtype)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self.normalised(images)
        if images.shape[1] == 1 and not isinstance(getattr(self.network, "backbone", None), ResNet):
            images = images.expand(-1, 3, -1, -1)
        out = self.network(images)
        return (out[1] if isinstance(out, tuple) else out).float()


def load_kd_teacher(
    teacher: str, *, weights: str | None, class_names: tuple[str, ...], mean, std, image_size: int
) -> tuple[LogitsOnly, str]:
    """The teacher named by ``teacher`` and the SHA-256 of its weights.

    A run folder or student file of ours; or "torchvision:NAME" / "timm:NAME" with ``weights``, a file holding that
    classifier with one output for each of ``class_names``. ``mean``, ``std``: how the pupil's images are normalised; a
    student of ours that learned with other values gets its own. In eval mode, frozen, its batch norms folded.
    Raises UserError where the classes differ or a file is missing.
    """
    file = teacher_file(teacher, weights)
    if _is_foreign(teacher):
        network = _foreign_classifier(teacher, file, len(class_names), image_size)
        return _frozen(LogitsOnly(network)), sha256(file)
    network, meta = load_student(teacher)
    if tuple(meta["class_names"]) != tuple(class_names):
        raise UserError(f"teacher {teacher}: knows {', '.join(meta['class_names'])}; the data {', '.join(class_names)}")
    scale = shift = None
    ours, theirs = ([torch.tensor(v).expand(3).float() for v in p] for p in ((mean, std), (meta["mean"], meta["std"])))
    if any(not torch.equal(a, b) for a, b in zip(ours, theirs)):
        scale, shift = (_per_channel(v) for v in (ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]))
    return _frozen(LogitsOnly(network, scale, shift)), sha256(file)


def _per_channel(values: torch.Tensor) -> torch.Tensor:
    """[1, 3, 1, 1], or [1, 1, 1, 1] where all are equal, so that one channel stays one."""
    return (values[:1] if (values == values[0]).all() else values).view(1, -1, 1, 1)


def teacher_file(teacher: str | None, weights: str | None) -> Path:
    """The file that holds the teacher's weights. Raises UserError where none is named or it is not there."""
    if teacher is None:
        raise UserError("objective.kd.weight is above 0 but there is no teacher: give --teacher (a run folder)")
    if not _is_foreign(teacher):
        return student_file(teacher)
    if weights is None:
        raise UserError(f"teacher {teacher}: needs objective.kd.teacher_weights, a file with an output for each class")
    if not Path(weights).is_file():
        raise UserError(f"{weights}: no such file of weights")
    return Path(weights)


def _is_foreign(teacher: str) -> bool:
    return teacher.startswith(("torchvision:", "timm:"))


def _foreign_classifier(teacher: str, weights: Path, classes: int, image_size: int) -> nn.Module:
    """A torchvision or timm classifier with its own last layer, loaded from a file."""
    state = read_state_dict(weights)
    package, _, name = teacher.partition(":")
    build_student(teacher, image_size=image_size)  # says what is wrong with the name or the installation
    if package == "timm":
        import timm

        network = timm.create_model(name, num_classes=classes)
    else:
        from torchvision import models

        network = models.get_model(name, weights=None, num_classes=classes)
    try:
        network.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{weights}: does not hold {teacher} with {classes} outputs: {reason}") from None
    return network


def _frozen(teacher: LogitsOnly) -> LogitsOnly:
    teacher.eval().requires_grad_(False)
    fold_batch_norms(teacher)
    return teacher


def fold_batch_norms(module: nn.Module) -> None:
    """Fold, in place, each batch norm of an eval-mode ResNet into the convolution before it: conv1/bn1, downsample."""
    for parent in list(module.modules()):
        children = dict(parent.named_children())
        pairs = [(name, name.replace("conv", "bn")) for name in children if name.startswith("conv")]
        if isinstance(parent, nn.Sequential):
            pairs = [(str(i), str(i + 1)) for i in range(len(parent) - 1)]
        for conv, norm in pairs:
            if isinstance(children.get(conv), nn.Conv2d) and isinstance(children.get(norm), nn.BatchNorm2d):
                setattr(parent, conv, fuse_conv_bn_eval(children[conv], children[norm]))
                setattr(parent, norm, nn.Identity())


class Teacher(Protocol):
    """What a training step asks for logits."""

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch's first step."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """float32 [B, C]; no gradient, no question to the device."""


class LiveTeacher:
    """The teacher's forward pass on the very views that the student sees."""

    def __init__(self, module: nn.Module, *, autocast: torch.dtype | None):
        self.module, self.autocast = module, autocast

    def set_epoch(self, epoch: int) -> None:
        pass

    def __call__(self, batch: Batch) -> torch.Tensor:
        device = batch.images.device.type
        with torch.no_grad(), torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return self.module(batch.images)


def combine_logits(logits: Sequence[torch.Tensor], combine: str, temperature: float) -> torch.Tensor:
    """Those of several teachers, each [..., C], as one float32 [..., C].

    ``combine``: "logits" for their mean; "probabilities" for the log of the mean of their softmaxes at ``temperature``,
    times it, so that the result's softmax at that temperature is this mean.
    """
    stacked = torch.stack([teacher.float() for teacher in logits])
    if combine == "logits":
        return stacked.mean(0)
    logs = (stacked / temperature).log_softmax(-1)
    return (logs.logsumexp(0) - math.log(len(logits))) * temperature


class CombinedTeacher:
    """Several teachers as one; see :func:`combine_logits`."""

    def __init__(self, teachers: Sequence[Teacher], combine: str, temperature: float):
        self.teachers, self.combine, self.temperature = list(teachers), combine, temperature

    def set_epoch(self, epoch: int) -> None:
        for teacher in self.teachers:
            teacher.set_epoch(epoch)

    def __call__(self, batch: Batch) -> torch.Tensor:
        return combine_logits([teacher(batch) for teacher in self.teachers], self.combine, self.temperature)


class CachedTeacher:
    """Logits of each plain face and of its mirror image; a step looks up the one that the student's view is closer to.

    ``table`` is float16 [2, N, C] (0 plain, 1 mirrored) over the rows of the feed's faces. Nothing is computed in a
    step but one gather, so that it costs the same whatever the teacher is.
    """

    def __init__(self, table: torch.Tensor, augment: AugmentConfig, seed: int):
        self.table, self.augment, self.key = table, augment, seed_key(seed)
        self.mirrored = torch.zeros(table.shape[1], dtype=torch.int64, device=table.device)

    def set_epoch(self, epoch: int) -> None:
        """Work out which faces ``epoch`` mirrors, by the numbers that the feed draws."""
        flips = uniform(self.key, epoch, np.arange(self.table.shape[1]), FLIP) < np.float32(self.augment.flip)
        self.mirrored.copy_(torch.from_numpy(flips.astype(np.int64)))

    def __call__(self, batch: Batch) -> torch.Tensor:
        return self.table[self.mirrored[batch.index], batch.index].float()


def cached_logits(
    folder: str | Path,
    teacher: LogitsOnly,
    checksum: str,
    faces: Faces,
    *,
    device: torch.device,
    autocast: torch.dtype | None,
    workers: int | None = None,
    **feed_options,
) -> np.ndarray:
    """Memory-mapped float16 [2, N, C]: ``teacher``'s logits on ``faces`` plain and mirrored, computed once.

    The file's name is a hash of the teacher's checksum, the data's checksum and the view's geometry, so that it is
    never stale. ``workers``: threads that prepare the faces. ``feed_options``: image_size, mean, std, grey as for
    make_feed.
    """
    text = repr((checksum, faces.checksum, sorted(feed_options.items()), str(autocast)))
    path = Path(folder) / f"kd_logits_{hashlib.sha256(text.encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        options = {"kind": "torch", "batch_size": 256, "train": False, "device": device, "num_workers": workers}
        feed = make_feed(faces, **options, **feed_options)
        live = LiveTeacher(teacher, autocast=autocast)
        rows = []
        for batch in progress(feed.epoch(0), desc="teacher logits", total=feed.steps_per_epoch, unit="batch"):
            plain = live(batch)
            batch.images = batch.images.flip(3)
            rows.append(torch.stack([plain, live(batch)]).half().cpu())
        feed.close()
        content = io.BytesIO()  # NumPy's own error for a full disk does not say what it is
        np.save(content, torch.cat(rows, dim=1).numpy(), allow_pickle=False)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content.getvalue())
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable file of logits ({error}); delete it and it is made again") from None
    if table.shape != (2, len(faces), len(faces.class_names)) or table.dtype != np.float16:
        raise UserError(f"{path}: must be float16 {[2, len(faces), len(faces.class_names)]}, is {table.dtype} "
                        f"{list(table.shape)}; delete it and it is made again")  # fmt: skip
    return table
