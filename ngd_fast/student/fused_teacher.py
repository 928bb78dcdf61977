"""A live teacher's forward pass: a ResNet's convolutions add bias, shortcut and ReLU as they write their output.

cuDNN has such epilogues. They take all but the convolutions out of a folded network's blocks; what they add, they add
in float32 and round once. Besides, autocast casts frozen float32 weights anew in every step; here it is done once. The
ops have no meta registration (torch 2.11), so that the blocks run uncompiled: inside a CUDA graph that costs nothing.
A step with a ResNet-50 teacher is 15 % faster by it (bench/RESULTS.md).
"""

import copy
import os
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_fast.errors import UserError
from ngd_fast.student.kd_teacher import LiveTeacher, LogitsOnly
from ngd_fast.student.networks import Student, compile_network
from ngd_fast.student.resnet import BasicBlock, Bottleneck, ResNet


def prepare_live_teacher(
    module: LogitsOnly, device: torch.device, autocast: torch.dtype | None, *, compiled: bool, deterministic: bool
) -> LiveTeacher:
    """The teacher of a training step from a frozen ``module`` on ``device``, in the way that runs fastest there.

    cuDNN's epilogues where :func:`why_not` has no objection; NGD_FAST_TEACHER=compiled does without.
    """
    wish = os.environ.get("NGD_FAST_TEACHER", "fused")
    if wish not in ("fused", "compiled"):
        raise UserError(f"NGD_FAST_TEACHER={wish}: must be fused or compiled")
    if wish == "fused" and not why_not(module, device, autocast):
        module = FusedTeacher(module, autocast, compiled=compiled, deterministic=deterministic)
    elif compiled:
        module = compile_network(module, deterministic=deterministic)
    return LiveTeacher(module, autocast=autocast)


def why_not(module: nn.Module, device: torch.device, autocast: torch.dtype | None) -> str:
    """Why cuDNN's epilogues cannot run this teacher; empty where they can."""
    if device.type != "cuda":
        return f"they need a GPU, not {device.type}"
    if autocast not in (torch.bfloat16, torch.float16):
        return f"autocast to {autocast}: wanted bfloat16 or float16"
    backbone = getattr(getattr(module, "network", None), "backbone", None)
    if not (isinstance(module, LogitsOnly) and type(module.network) is Student and type(backbone) is ResNet):
        return "none of our ResNets"
    if module.training or any(p.requires_grad for p in module.parameters()):
        return "it is not frozen"
    if any(conv.bias is None for conv in backbone.modules() if isinstance(conv, nn.Conv2d)):
        return "its batch norms are not folded into the convolutions"
    if backbone.conv1.out_channels % 8:
        return f"{backbone.conv1.out_channels} channels: tensor cores want a multiple of 8"
    return ""


class FusedTeacher(nn.Module):
    """The function of ``teacher``, a frozen LogitsOnly of a folded ResNet: images -> logits [B, C] float32.

    images [B, 1 or 3, S, S] float32 or ``dtype``; runs under autocast to ``dtype``, which the blocks' copies of weights
    and biases have. What comes before and after the blocks is the teacher's own, ``compiled`` or not.
    ``deterministic``: the first images of each size go through the blocks twice, and where the bits differ the blocks
    run without epilogues from then on, with a warning. PyTorch lets cuDNN.benchmark, but not cuDNN.deterministic,
    decide over the epilogues' algorithms.
    """

    def __init__(self, teacher: LogitsOnly, dtype: torch.dtype, *, compiled: bool, deterministic: bool):
        super().__init__()
        self.stem, self.tail = _Stem(teacher, dtype), _Tail(teacher.network)
        if compiled:
            self.stem, self.tail = (compile_network(m, deterministic=deterministic) for m in (self.stem, self.tail))
        backbone = teacher.network.backbone
        stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        self.blocks = nn.Sequential(*[_Block(block) for stage in stages for block in stage])
        self.blocks.to(dtype, memory_format=torch.channels_last)
        self.deterministic, self.settled = deterministic, set()

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.deterministic and x.shape not in self.settled and not capturing:
            self.settled.add(x.shape)
            if not torch.equal(self.blocks(x), self.blocks(x)):
                reason = "cuDNN's fused convolutions give other bits each time here: the teacher runs without them"
                warnings.warn(reason, stacklevel=2)
                for block in self.blocks:
                    block.epilogues = False
        return self.tail(self.blocks(x))


class _Stem(nn.Module):
    """images -> [B, width, S/4, S/4] of ``dtype``, channels-last: the epilogues take no mixture."""

    def __init__(self, teacher: LogitsOnly, dtype: torch.dtype):
        super().__init__()
        self.teacher, self.dtype = teacher, dtype

    def forward(self, images: Tensor) -> Tensor:
        x = self.teacher.network.backbone.stem(self.teacher.normalised(images))
        return x.to(self.dtype, memory_format=torch.channels_last)


class _Tail(nn.Module):
    """The last block's output [B, out_features, S/32, S/32] -> logits [B, C] float32."""

    def __init__(self, network: Student):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.classify(self.network.projection(x.mean(dim=(2, 3))))[1].float()


class _Block(nn.Module):
    """A copy of a folded BasicBlock or Bottleneck: [B, C, H, W] -> the block's output, never below 0."""

    def __init__(self, block: BasicBlock | Bottleneck):
        super().__init__()
        self.epilogues = True
        convs = [block.conv1, block.conv2] + ([block.conv3] if isinstance(block, Bottleneck) else [])
        *first, self.last = copy.deepcopy(convs)
        self.first = nn.ModuleList(first)
        self.shortcut = None
        if block.downsample is not None:
            self.shortcut = copy.deepcopy(block.downsample[0])
            # Alone, this bias would be a kernel that reads and writes the whole shortcut.
            self.last.bias.add_(self.shortcut.bias)
            self.shortcut.bias = None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for conv in self.first:
            x = _conv_relu(x, conv) if self.epilogues else F.relu_(conv(x))
        return _conv_add_relu(x, self.last, shortcut) if self.epilogues else F.relu_(self.last(x).add_(shortcut))


# The first is the second with alpha = 0 and its own output, not written yet, as the shortcut: the GPU test fills that
# memory with NaN.
def _conv_relu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """relu(conv(x))."""
    return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, conv.stride, conv.padding, (1, 1), 1)


def _conv_add_relu(x: Tensor, conv: nn.Conv2d, shortcut: Tensor) -> Tensor:
    """relu(conv(x) + shortcut)."""
    settings = (conv.stride, conv.padding, (1, 1), 1)
    return torch.cudnn_convolution_add_relu(x, conv.weight, shortcut, 1.0, conv.bias, *settings)
