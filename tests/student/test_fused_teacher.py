"""The teacher with cuDNN's epilogues computes what the layers compute; where it runs and where it does not."""

import pytest
import torch
import torch.nn.functional as F
from norms import as_trained

from ngd_fast.errors import UserError
from ngd_fast.student import fused_teacher
from ngd_fast.student.fused_teacher import FusedTeacher, prepare_live_teacher, why_not
from ngd_fast.student.kd_teacher import LogitsOnly, fold_batch_norms
from ngd_fast.student.networks import build_student

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLAIN = {"compiled": False, "deterministic": True}


def make(arch, *, folded=True, scale=None, shift=None):
    torch.manual_seed(0)
    network = as_trained(build_student(arch))
    teacher = LogitsOnly(network, scale, shift).eval().requires_grad_(False)
    if folded:
        fold_batch_norms(teacher)
    return teacher


@pytest.fixture
def epilogues_by_layers(monkeypatch):
    """The two ops of cuDNN in PyTorch's own; returns how often each was called."""
    calls = {"relu": 0, "add_relu": 0}

    def convolve(name, x, conv):
        calls[name] += 1
        assert x.dtype == conv.weight.dtype == conv.bias.dtype
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)

    monkeypatch.setattr(fused_teacher, "_conv_relu", lambda x, conv: convolve("relu", x, conv).relu())
    monkeypatch.setattr(
        fused_teacher, "_conv_add_relu", lambda x, conv, shortcut: (convolve("add_relu", x, conv) + shortcut).relu()
    )
    return calls


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("arch", "expected"), [("resnet18-w16", (8, 8)), ("resnet34-w8", (16, 16)), ("resnet50-w16", (32, 16))]
)
@torch.no_grad()
def test_fused_computes_the_same(epilogues_by_layers, arch, expected, channels):
    scale, shift = torch.tensor(0.8).view(1, 1, 1, 1), torch.tensor(-0.1).view(1, 1, 1, 1)
    teacher = make(arch, scale=scale, shift=shift)
    fused = FusedTeacher(teacher, torch.float32, compiled=False, deterministic=False)
    images = torch.randn(2, channels, 48, 48)
    logits = fused(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, teacher(images), rtol=1e-4, atol=1e-5)
    assert tuple(epilogues_by_layers.values()) == expected


@pytest.mark.parametrize(
    ("device", "dtype", "teacher", "why"),
    [
        (GPU, torch.bfloat16, lambda: make("resnet18-w16"), ""),
        (GPU, torch.float16, lambda: make("resnet50-w8"), ""),
        (CPU, torch.bfloat16, lambda: make("resnet18-w16"), "a GPU, not cpu"),
        (GPU, None, lambda: make("resnet18-w16"), "autocast to None"),
        (GPU, torch.bfloat16, lambda: make("resnet18-w16", folded=False), "not folded"),
        (GPU, torch.bfloat16, lambda: make("resnet18-w16").requires_grad_(True), "not frozen"),
        (GPU, torch.bfloat16, lambda: make("resnet18-w4"), "4 channels"),
        (GPU, torch.bfloat16, lambda: LogitsOnly(torch.nn.Conv2d(3, 8, 1)), "none of our ResNets"),
    ],
)
def test_when_it_runs(device, dtype, teacher, why):
    got = why_not(teacher(), device, dtype)
    assert why in got and bool(why) == bool(got)


def test_one_switch_chooses(monkeypatch):
    teacher = make("resnet18-w8")
    prepare = lambda: prepare_live_teacher(teacher, CPU, torch.bfloat16, **PLAIN).module  # noqa: E731
    monkeypatch.delenv("NGD_FAST_TEACHER", raising=False)
    assert prepare() is teacher  # a CPU has no cuDNN
    monkeypatch.setattr(fused_teacher, "why_not", lambda *_: "")
    assert isinstance(prepare(), FusedTeacher)
    monkeypatch.setenv("NGD_FAST_TEACHER", "compiled")
    assert prepare() is teacher
    monkeypatch.setenv("NGD_FAST_TEACHER", "fast")
    with pytest.raises(UserError, match="fused or compiled"):
        prepare()


@torch.no_grad()
def test_bits_that_differ_from_call_to_call_are_noticed(epilogues_by_layers, monkeypatch):
    teacher, images = make("resnet18-w8"), torch.randn(2, 1, 48, 48)
    fused = FusedTeacher(teacher, torch.float32, **PLAIN)
    wanted = fused(images)
    assert fused.blocks[0].epilogues  # twice the same bits
    steady = fused_teacher._conv_relu
    monkeypatch.setattr(fused_teacher, "_conv_relu", lambda x, conv: steady(x, conv) + 1e-3 * torch.rand(()))
    fused(images)  # a size that is settled is not looked at again
    with pytest.warns(UserWarning, match="other bits"):
        fused(images[:1])
    calls = dict(epilogues_by_layers)
    torch.testing.assert_close(fused(images), wanted)
    assert epilogues_by_layers == calls


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_on_a_gpu_and_in_a_graph(dtype, channels):
    teacher = make("resnet50").to(GPU, memory_format=torch.channels_last)
    assert not why_not(teacher, GPU, dtype)
    fused = FusedTeacher(teacher, dtype, **PLAIN)
    images = torch.randn(32, channels, 64, 64, device=GPU).to(dtype)
    poison = [torch.full((1 << 26,), float("nan"), device=GPU) for _ in range(2)]
    del poison  # the outputs' memory is full of NaN, which no epilogue may read
    with torch.autocast("cuda", dtype):
        logits, wanted = fused(images), teacher(images)
        assert float((logits - wanted).norm() / wanted.norm()) < 2e-2
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            fused(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = fused(images)
    for _ in range(2):
        graph.replay()
        assert torch.equal(replayed, logits)
