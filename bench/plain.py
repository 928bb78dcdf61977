"""Training as a careful PyTorch user writes it: what the step and the trainer of this package are measured against.

Channels-last, bf16 autocast on a GPU, fused AdamW, foreach clipping, cuDNN's algorithms chosen by timing them; network
and objective compiled as one; the whole step in one CUDA graph. The teacher is cast to bfloat16 and compiled. Faces lie
in device memory and their views are drawn there, so that nothing waits for data. What our step does besides (schedule,
history, views that can be repeated and resumed exactly) is left out, which only makes this faster.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from ngd_fast.bench import _timing
from torch import Tensor, nn

from ngd_fast.devices import torch_compile

HOWS = ("eager", "compiled", "graph")

Objective = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(features, logits, labels, teacher_logits) -> loss."""


def amp_dtype(device: torch.device) -> torch.dtype | None:
    return torch.bfloat16 if device.type == "cuda" else None


def training_step(
    student: nn.Module,
    objective: Objective,
    batch: Callable[[], tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    how: str,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> _timing.Call:
    """A call that makes one step on the images and labels that ``batch`` gives; ``how`` is one of HOWS.

    ``student`` returns (features, logits); ``teacher`` gives an image's logits, see :func:`make_teacher`. The call
    returns the loss.
    """
    student = student.to(device, memory_format=torch.channels_last).train()
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.05, fused=True, capturable=device.type == "cuda")

    def loss_of(images, labels, teacher_logits):
        with torch.autocast(device.type, amp_dtype(device), enabled=amp_dtype(device) is not None):
            features, logits = student(images)
        return objective(features, logits, labels, teacher_logits)

    if how != "eager":
        loss_of = torch_compile(loss_of, dynamic=False)

    def step():
        images, labels = batch()
        teacher_logits = None if teacher is None else teacher(images)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(images, labels, teacher_logits)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        return loss.detach()

    return _captured_at_first_call(step) if how == "graph" else step


def _captured_at_first_call(step: _timing.Call) -> _timing.Call:
    # Not here: what decides over cuDNN's algorithms is set around the calls.
    replay = None

    def call():
        nonlocal replay
        replay = replay or _timing.in_graph(step)
        return replay()

    return call


def make_teacher(network: nn.Module, device: torch.device, *, compiled: bool) -> Callable[[Tensor], Tensor]:
    """The frozen ``network``, a Student, in bfloat16 on a GPU but for its head: images -> float32 logits."""
    dtype = amp_dtype(device) or torch.float32
    network = network.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    network.head.float()

    def logits(images):
        with torch.no_grad():
            return network(images.to(dtype))[1].float()

    return torch_compile(logits, dynamic=False) if compiled else logits


def make_views(
    pixels: Tensor, labels: Tensor, rows: Tensor, size: int, *, compiled: bool
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that draws new views of the faces ``rows``: the paper's crop, flip and mild jitter.

    pixels uint8 [N, 1, H, W], labels int64 [N] and rows int64 [B] lie on one device. Images come out as
    [B, 3, size, size], channels-last, normalised, bfloat16 on a GPU.
    """
    dtype = amp_dtype(pixels.device) or torch.float32

    def views():
        count = len(rows)
        u = torch.rand(6, count, device=pixels.device)
        side = (0.8 + 0.2 * u[0]).sqrt()
        matrix = torch.zeros(count, 2, 3, device=pixels.device)
        matrix[:, 0, 0] = torch.where(u[1] < 0.5, -side, side)
        matrix[:, 1, 1] = side
        matrix[:, :, 2] = ((1 - side) * (2 * u[2:4] - 1)).t()
        grid = F.affine_grid(matrix, (count, 1, size, size), align_corners=False)
        source = pixels.index_select(0, rows).float() / 255
        images = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False)
        gain, contrast = (0.9 + 0.2 * u[4:]).view(2, count, 1, 1, 1)
        images = (gain * (contrast * (images - 0.5) + 0.5)).clamp(0, 1)
        images = ((images - 0.5) / 0.25).to(dtype).expand(-1, 3, -1, -1)
        return images.contiguous(memory_format=torch.channels_last), labels.index_select(0, rows)

    return torch_compile(views, dynamic=False) if compiled else views
