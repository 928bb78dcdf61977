"""1x1 convolutions with a stride whose gradient is right on every CPU.

oneDNN's gradient by the weights of such a layer (``jit_1x1:avx2`` and ``jit_1x1:avx512_core``, channels-last) writes
past its workspace where the layer has fewer input channels than a vector has lanes, 8 or 16: the gradient is wrong, the
heap is damaged, or two threads wait for each other for ever (https://github.com/uxlfoundation/oneDNN/issues/6035).
"""

import torch
import torch.nn.functional as F
from torch import nn

LANES = 16  # float32 in a vector of AVX-512


class StridedConv2d(nn.Conv2d):
    """A ``Conv2d`` that, where oneDNN's gradient is not safe, takes the pixels it reads before it convolves them."""

    def unsafe(self) -> bool:
        pointwise = self.kernel_size == (1, 1) and self.padding in ((0, 0), "valid") and self.groups == 1
        return pointwise and self.stride != (1, 1) and self.in_channels < LANES

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and self.weight.requires_grad and torch.is_grad_enabled() and self.unsafe():
            return F.conv2d(x[..., :: self.stride[0], :: self.stride[1]], self.weight, self.bias)
        return super().forward(x)


def protect(network: nn.Module) -> nn.Module:
    """Turn the plain ``Conv2d`` layers that oneDNN's gradient is unsafe for into StridedConv2d; returns ``network``."""
    for module in network.modules():
        if type(module) is nn.Conv2d and StridedConv2d.unsafe(module):
            module.__class__ = StridedConv2d  # in place: parameters, hooks and names stay what they are
    return network


def protected(network: nn.Module) -> bool:
    return any(isinstance(module, StridedConv2d) and module.unsafe() for module in network.modules())
