"""A frozen student gives what the student gives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngd_fast.student import frozen
from ngd_fast.student.frozen import FrozenStudent
from ngd_fast.student.networks import Student, build_student


def trained(arch):
    """A student whose batch norms have seen something."""
    torch.manual_seed(0)
    student = build_student(arch)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return student.eval()


@pytest.mark.parametrize("arch", ["resnet18-w16", "resnet34-w8", "resnet50-w8", "resnet18-w5"])
@pytest.mark.parametrize("size", [17, 48])
@torch.no_grad()
def test_float32_is_the_student_to_rounding(arch, size):
    student = trained(arch)
    state = copy.deepcopy(student.state_dict())
    network = FrozenStudent(student, "fp32")
    exact = copy.deepcopy(student).double()
    for batch in (3, 1, 8):
        images = torch.randn(batch, 3, size, size)
        features = F.normalize(exact.projection(exact.backbone(images.double())), dim=1)
        for got, plain, want in zip(network(images), student(images), (features, exact.head(features))):
            assert got.dtype == torch.float32
            bound = 3 * (plain - want).abs().max() + 1e-6 * want.abs().max()
            assert (got - want).abs().max() <= bound
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())


@pytest.mark.skipif(not frozen._onednn_has_bf16(), reason="oneDNN has no bfloat16 on this processor")
@torch.no_grad()
def test_bfloat16_is_as_good_as_autocast():
    student = trained("resnet18-w16")
    images = torch.randn(16, 3, 48, 48)
    want = student(images)[1]
    with torch.autocast("cpu", torch.bfloat16):
        autocast = student(images)[1]
    got = FrozenStudent(student, "bf16")(images)[1]
    assert (got - want).norm() < 2 * (autocast - want).norm()
    assert (got - want).norm() < 0.05 * want.norm()


@torch.no_grad()
def test_the_same_bits_again_and_input_untouched():
    network = FrozenStudent(trained("resnet18-w8"))
    images = torch.randn(4, 3, 32, 32)
    kept = images.clone()
    assert torch.equal(network(images)[1], network(images)[1])
    assert torch.equal(images, kept)


def test_auto_takes_what_the_processor_multiplies(monkeypatch):
    student = trained("resnet18-w8")
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(frozen, "cpu_multiplies_bf16", lambda has=has: has)
        monkeypatch.setattr(frozen, "_onednn_has_bf16", lambda: True)
        assert FrozenStudent(student).dtype == dtype


def test_what_cannot_be_frozen_says_why(monkeypatch):
    other = Student(nn.Flatten(), 12, 4, 8, 1.0)
    assert "only students on this package's ResNets" in frozen.why_not(other)
    with pytest.raises(ValueError, match="only students"):
        FrozenStudent(other)
    with pytest.raises(ValueError, match="precision must be one of"):
        FrozenStudent(trained("resnet18-w8"), "fp8")
    monkeypatch.setattr(frozen, "_onednn_has_bf16", lambda: False)
    with pytest.raises(ValueError, match="no bfloat16 on this processor"):
        FrozenStudent(trained("resnet18-w8"), "bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "no oneDNN" in frozen.why_not(trained("resnet18-w8"))
