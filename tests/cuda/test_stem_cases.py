"""The inputs of the fused stem's tests: which windows float32 cannot be asked to judge."""

import pytest
import torch
from stem_cases import faces, layers, too_close_to_call
from torch import nn


def places(values):
    """Which value of its window max-pooling takes; -1 where ReLU leaves none."""
    values, index = nn.functional.max_pool2d(values, 3, 2, 1, return_indices=True)
    return index.where(values > 0, -1)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_differs_only_where_it_is_too_close(dtype, training):
    conv, norm = layers(64)
    norm.train(training)
    images = faces(4, 224, 224, dtype)
    unsure = too_close_to_call(images, conv, norm)
    kernel = conv.weight.detach().sum(1, keepdim=True).to(dtype)
    with torch.no_grad():
        single = norm(nn.functional.conv2d(images.float(), kernel.float(), stride=2, padding=3))
        norm.double()
        double = norm(nn.functional.conv2d(images.double(), kernel.double(), stride=2, padding=3))
    without_place = (single.view(torch.int32) & ~15).view(torch.float32)  # as the kernel compares them
    for rounded in (single, without_place):
        other = places(rounded) != places(double)
        assert not (other & ~unsure).any()
    assert other.any()  # a test without any would show nothing
    assert unsure.double().mean() < 1e-3


def test_values_of_one_window():
    conv, norm = layers(32, inputs=1)
    norm.eval()
    with torch.no_grad():
        conv.weight.zero_()[:, :, 3, 3] = 1  # the output is every second pixel
        nn.init.ones_(norm.weight), nn.init.zeros_(norm.bias)
        norm.running_mean.zero_(), norm.running_var.fill_(1 - norm.eps)
    for pair, close in {
        (1, 1 + 2**-20): True,
        (1, 1 + 2**-15): False,
        (-1, 2**-20): True,  # and ReLU's 0
        (-1, 2**-15): False,
        (-1, -1): False,  # ReLU takes all
    }.items():
        images = torch.full((1, 1, 16, 32), -1.0)
        images[0, 0, 4, 4], images[0, 0, 4, 6] = pair  # outputs (2, 2) and (2, 3), both in window (1, 1)
        unsure = too_close_to_call(images, conv, norm)
        assert unsure.shape == (1, 32, 4, 8)
        assert unsure[:, :, 1, 1].eq(close).all()
        assert not unsure[:, :, 2:].any() and not unsure[:, :, :, 3:].any()
