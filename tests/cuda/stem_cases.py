"""Inputs of the fused stem, its result in float64, and how far two results are apart."""

import copy

import torch
from torch import nn


def layers(channels, *, inputs=3, seed=0):
    torch.manual_seed(seed)
    conv = nn.Conv2d(inputs, channels, 7, 2, 3, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, -1.5, 1.5)  # negative scales turn the largest into the smallest
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return conv, norm


def faces(count, height, width, dtype, seed=0):
    """Smooth pictures with a mean unlike 0, as normalised faces are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, height // 4, width // 4, generator=generator)
    images = nn.functional.interpolate(coarse, (height, width), mode="bilinear") + 0.6
    return (images + 0.1 * torch.randn(count, 1, height, width, generator=generator)).to(dtype)


def exact(images, conv, norm, grad_out):
    """Output and gradients of the four layers in float64, with the kernel rounded as the fused one rounds it.

    Rounding alone: the kernel's planes become one, of which all three get the gradient.
    """
    norm = copy.deepcopy(norm).double()
    kernel = conv.weight.detach().sum(1, keepdim=True).to(images.dtype).double().requires_grad_()
    out = norm(nn.functional.conv2d(images.double(), kernel, stride=2, padding=3))
    out = nn.functional.max_pool2d(out.relu(), 3, 2, 1)
    grads = torch.autograd.grad(out, (kernel, norm.weight, norm.bias), grad_out.double())
    return out.detach(), (grads[0].expand_as(conv.weight), *grads[1:]), norm


def error(got, want):
    return float(((got.double() - want).norm() / want.norm()).detach())
