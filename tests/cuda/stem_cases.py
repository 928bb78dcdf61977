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


def too_close_to_call(images, conv, norm):
    """Pooling windows whose largest two values, 0 of ReLU among them, float32 may order otherwise than float64 does.

    Those less than 2^-18 of their sums' magnitude apart: 64 roundings of float32. The fused stem drops four bits of a
    value to mark its place, which is half of that; its sums differ by a few roundings. -> [B, C, H/4, W/4].
    """
    norm = copy.deepcopy(norm).double()
    images, kernel = images.double(), conv.weight.detach().sum(1, keepdim=True).to(images.dtype).double()
    with torch.no_grad():
        sums = nn.functional.conv2d(images, kernel, stride=2, padding=3)
        magnitude = nn.functional.conv2d(images.abs(), kernel.abs(), stride=2, padding=3)
        mean, variance = norm.running_mean, norm.running_var
        if norm.training:
            mean, variance = sums.mean((0, 2, 3)), sums.var((0, 2, 3), unbiased=False)
        scale = norm.weight / (variance + norm.eps).sqrt()
        magnitude = magnitude * scale.abs()[:, None, None] + (norm.bias.abs() + (mean * scale).abs())[:, None, None]
        values = _windows(norm(sums), -torch.inf)
        first, second = torch.cat([values, torch.zeros_like(values[:, :, :1])], 2).topk(2, 2).values.unbind(2)
        return first - second < 2**-18 * _windows(magnitude, 0.0).amax(2)


def _windows(values, outside):
    """[B, C, H, W] -> [B, C, 9, H/2, W/2]: the windows of 3 x 3, stride 2, padding 1."""
    count, channels, height, width = values.shape
    padded = nn.functional.pad(values.reshape(-1, 1, height, width), (1, 0, 1, 0), value=outside)
    return nn.functional.unfold(padded, 3, stride=2).view(count, channels, 9, height // 2, width // 2)


def error(got, want):
    return float(((got.double() - want).norm() / want.norm()).detach())
