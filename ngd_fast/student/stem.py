"""A ResNet's first layers on grey images, fused on the GPU: 7x7 convolution, batch norm, ReLU, 3x3 max-pooling.

The function is that of the four layers on three equal channels: the three planes of the kernel act as their sum, and
its gradient spreads back to each. The convolution's output, most of the memory traffic of a ResNet-18's step, is never
written (csrc/cuda/stem_cuda.h says how). It is rounded to the images' dtype once, after pooling, where layer by layer
it is rounded four times.
"""

import torch
from torch import Tensor, nn

from ngd_fast.objective import backends

_MOST_PIXELS = 512


def why_not_here(device: torch.device) -> str:
    """Why the fused stem does not run on ``device``; empty where it does."""
    if device.type != "cuda":
        return f"it needs a GPU, not {device.type}"
    missing = backends.why_not("cuda")
    return missing and f"the CUDA backend is missing: {missing}"


def why_not_size(height: int, width: int) -> str:
    """Why images of this size in pixels do not fit; empty where they do."""
    if height % 4 or width % 16 or not 4 <= height <= _MOST_PIXELS or not 16 <= width <= _MOST_PIXELS:
        return f"{height} x {width} pixels: wanted multiples of 4 and 16, up to {_MOST_PIXELS}"
    return ""


def why_not_channels(channels: int) -> str:
    """Why a convolution with so many outputs does not fit; empty where it does."""
    return f"{channels} channels: wanted a multiple of 32, up to 1024" if channels % 32 or channels > 1024 else ""


def why_not_layers(conv: nn.Conv2d, norm: nn.Module) -> str:
    """Why these layers do not fit; empty where they do.

    ``norm``: a BatchNorm2d; or Identity where it has been folded into ``conv``, which then has a bias and is frozen.
    """
    if isinstance(norm, nn.Identity):
        if any(p.requires_grad for p in conv.parameters()):
            return "a convolution without batch norm that learns: wanted BatchNorm2d, or one folded into frozen weights"
    elif type(norm) is not nn.BatchNorm2d:  # a subclass has other statistics
        return f"{type(norm).__name__}: wanted BatchNorm2d"
    elif norm.momentum is None or not norm.track_running_stats or conv.bias is not None:
        return "batch norm without moving averages, or a bias before it"
    if conv.weight.dtype != torch.float32 or (conv.kernel_size, conv.stride, conv.padding) != ((7, 7), (2, 2), (3, 3)):
        return "wanted a float32 convolution of 7 x 7, stride 2, padding 3"
    return why_not_channels(conv.out_channels)


def why_not(images: Tensor, conv: nn.Conv2d, norm: nn.Module) -> str:
    """Why these layers cannot run fused on these images [B, 1, H, W]; empty where they can."""
    if images.dtype not in (torch.bfloat16, torch.float16):
        return why_not_here(images.device) or f"the images are {images.dtype}, wanted bfloat16 or float16"
    if images.requires_grad:
        return "the images need a gradient"
    return why_not_here(images.device) or why_not_layers(conv, norm) or why_not_size(*images.shape[2:])


def grey_stem(images: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """maxpool(relu(norm(conv(images in three channels)))), fused; see :func:`why_not` for what it takes.

    images [B, 1, H, W] bfloat16 or float16, contiguous -> [B, C, H/4, W/4] of that dtype, channels-last. In training
    the batch's statistics move ``norm``'s running averages as BatchNorm2d does.
    """
    op = torch.ops.ngd_fast.stem_fwd
    if isinstance(norm, nn.Identity):
        return op(images, conv.weight, None, conv.bias, None, None, False, 0.0, False)[0]
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in (*conv.parameters(), *norm.parameters()))
    running = (None, None) if norm.training else (norm.running_mean, norm.running_var)
    out, _, _, statistics, _ = op(
        images, conv.weight, norm.weight, norm.bias, *running, norm.training, norm.eps, learns
    )
    if norm.training:
        with torch.no_grad():
            norm.running_mean.lerp_(statistics[0], norm.momentum)
            norm.running_var.lerp_(statistics[1], norm.momentum)
            norm.num_batches_tracked.add_(1)
    return out


def _fake_forward(images, weight, gamma, beta, mean, variance, batch_statistics, epsilon, want_index):
    count, channels = images.shape[0], weight.shape[0]
    shape = (count, channels, images.shape[2] // 4, images.shape[3] // 4)
    out = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)
    index = torch.empty_like(out, dtype=torch.uint8) if want_index else out.new_empty(0, dtype=torch.uint8)
    statistics = images.new_empty(5, channels, dtype=torch.float32)
    taps = images.new_empty(1 + channels if batch_statistics else 0, 56, dtype=torch.float32)
    return out, index, images.new_empty(channels, 56), statistics, taps


def _fake_backward(grad_out, images, weight, gamma, *_):
    return torch.empty_like(weight), weight.new_empty(len(weight)), weight.new_empty(len(weight))


def _setup_context(ctx, inputs, output):
    images, weight, gamma, *_, ctx.batch_statistics, _, want_index = inputs
    _, index, kernel, statistics, taps = output
    if want_index:
        ctx.save_for_backward(images, weight, gamma, index, kernel, statistics, taps)
    ctx.mark_non_differentiable(index, kernel, statistics, taps)
    ctx.set_materialize_grads(False)  # zeros for these four would be as much memory as the index


def _backward(ctx, grad_out, *_):
    if not ctx.saved_tensors:
        raise RuntimeError("ngd_fast::stem_fwd was called without want_index, so that it has no gradient")
    if ctx.needs_input_grad[0]:
        raise RuntimeError("ngd_fast::stem_fwd has no gradient for images")
    if grad_out is None:  # what comes after passes none on
        return (None,) * 9
    grads = torch.ops.ngd_fast.stem_bwd(grad_out, *ctx.saved_tensors, ctx.batch_statistics)
    wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[1:4])]
    return None, *wanted, None, None, None, None, None


if not backends.why_not("cpu"):  # which holds the schemas
    torch.library.register_fake("ngd_fast::stem_fwd", _fake_forward)
    torch.library.register_fake("ngd_fast::stem_bwd", _fake_backward)
    torch.library.register_autograd("ngd_fast::stem_fwd", _backward, setup_context=_setup_context)
