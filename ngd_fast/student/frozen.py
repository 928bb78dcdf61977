"""A student frozen for a CPU: batch norm folded into the convolutions, ReLU and shortcut computed within them.

The fused convolutions are oneDNN's, by the operators that torch.compile lowers to when it freezes a network for a CPU;
here without a compiler, for any batch. bfloat16 where the processor multiplies it (AVX-512 BF16, AMX), else float32.
"""

import torch
from torch import nn

from ngd_fast.student.networks import Student
from ngd_fast.student.resnet import BasicBlock, Bottleneck, ResNet

PRECISIONS = ("auto", "fp32", "bf16")


def cpu_multiplies_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; elsewhere it would be slower than float32."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return _onednn_has_bf16() and any(ask() for ask in asked if ask is not None)


def _onednn_has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def why_not(module: nn.Module) -> str:
    """The reason that ``module`` cannot be frozen, in one line; empty where it can be."""
    if not isinstance(module, Student) or not isinstance(module.backbone, ResNet):
        return "only students on this package's ResNets are frozen"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    if not all(hasattr(torch.ops.mkldnn, f"_convolution_pointwise{end}") for end in ("", "_")):
        return f"PyTorch {torch.__version__} has no fused convolutions for a CPU"
    return ""


class _Convolution:
    """A convolution with the batch norm that follows it, as oneDNN wants it for inputs like the first one."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype):
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        self.weight = (conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype)
        self.bias = (norm.bias.double() - norm.running_mean.double() * scale).to(dtype)
        self.geometry = (list(conv.padding), list(conv.stride), [1, 1], 1)
        self.packed = None

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None:
            weight = self.weight.contiguous(memory_format=torch.channels_last)
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, list(x.shape))
            self.weight = None
        return self.packed

    def __call__(self, x: torch.Tensor, *, relu: bool) -> torch.Tensor:
        after = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, self._pack(x), self.bias, *self.geometry, after, [], "")

    def add_relu(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """ReLU(convolution of x + shortcut), written into ``shortcut``."""
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            shortcut, x, self._pack(x), self.bias, *self.geometry, "add", 1.0, "relu", [], None
        )


class FrozenStudent:
    """images [B, 3, S, S] float32 on a CPU -> (features [B, D] of norm 1, logits [B, C]), float32, as the student's.

    ``student`` is left as it is, in eval mode; later changes of its convolutions have no effect. ``precision``: "fp32"
    (the same numbers to rounding), "bf16", or "auto". Raises ValueError where :func:`why_not` gives a reason.
    """

    def __init__(self, student: Student, precision: str = "auto"):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, is {precision!r}")
        if reason := why_not(student):
            raise ValueError(reason)
        bf16 = cpu_multiplies_bf16() if precision == "auto" else precision == "bf16"
        if bf16 and not _onednn_has_bf16():
            raise ValueError("precision bf16: oneDNN has no bfloat16 on this processor; wanted fp32 or auto")
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.student, network = student.eval(), student.backbone
        with torch.no_grad():
            self.stem = _Convolution(network.conv1, network.bn1, self.dtype)
            self.blocks = [
                self._block(block)
                for layer in (network.layer1, network.layer2, network.layer3, network.layer4)
                for block in layer
            ]

    def _block(self, block: BasicBlock | Bottleneck) -> tuple[list[_Convolution], _Convolution | None]:
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if isinstance(block, Bottleneck):
            pairs.append((block.conv3, block.bn3))
        shortcut = None if block.downsample is None else _Convolution(*block.downsample, self.dtype)
        return [_Convolution(*pair, self.dtype) for pair in pairs], shortcut

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.to(self.dtype).contiguous(memory_format=torch.channels_last)
        x = torch.max_pool2d(self.stem(x, relu=True), 3, stride=2, padding=1)
        for (*first, last), downsample in self.blocks:
            shortcut = x if downsample is None else downsample(x, relu=False)
            for convolution in first:
                x = convolution(x, relu=True)
            x = last.add_relu(x, shortcut)
        return self.student.classify(self.student.projection(x.mean(dim=(2, 3)).float()))
