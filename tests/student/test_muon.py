"""Muon: its orthogonalisation, its step against PyTorch's, and who gets it. test_step.py has whole steps with it."""

import pytest
import torch
from torch import nn

from ngd_fast.errors import UserError
from ngd_fast.student.muon import Muon, muon_weights, orthogonalize

MUON = "optimizer.kind=muon"


def optimizer_of(weights, **options):
    """Muon for ``weights``, and AdamW for one number that has no gradient."""
    return Muon(weights, torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.1, fused=True), **options)


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (1, 64, 576)])
def test_singular_values_come_near_one(shape):
    sizes = torch.logspace(-4, 4, shape[0])[:, None, None]
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * sizes
    for dtype in (torch.float32, torch.bfloat16):
        got = orthogonalize(matrices, dtype)
        values = torch.linalg.svdvals(got.float())
        assert got.shape == shape and got.dtype == dtype
        assert values.min() > 0.6 and values.max() < 1.4
    one_by_one = torch.cat([orthogonalize(matrix[None], torch.float32) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices, torch.float32), one_by_one)
    assert not orthogonalize(torch.zeros(shape), torch.float32).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch before 2.9")
def test_step_is_that_of_pytorch(monkeypatch):
    """Also for convolutions, which are their matrices [O, I * k * k]."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # PyTorch's iterates in bfloat16 everywhere
    torch.manual_seed(0)
    shapes = [(12, 30), (30, 12), (12, 30), (8, 3, 3, 3), (32, 4, 1, 1), (8, 3, 3, 3)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    ours[-1].data = ours[-1].data.contiguous(memory_format=torch.channels_last)
    theirs = [nn.Parameter(p.detach().flatten(1).clone()) for p in ours]
    options = {"weight_decay": 0.1, "momentum": 0.9}
    lr = torch.zeros(())
    one = optimizer_of(ours, lr=lr, lr_scale=0.5, **options)
    two = torch.optim.Muon(theirs, lr=0.0, adjust_lr_fn="match_rms_adamw", **options)
    assert len(one.param_groups) == 4 + 1
    for step in range(4):
        lr.fill_(0.02 * (step + 1))
        two.param_groups[0]["lr"] = 0.01 * (step + 1)
        for a, b in zip(ours, theirs):
            a.grad = torch.empty_like(a).copy_(torch.randn(a.shape))
            b.grad = a.grad.flatten(1).clone()
        one.step()
        two.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a.flatten(1), b, rtol=0, atol=1e-4)


def test_stem_head_and_vectors_stay_with_adamw(make_step, make_batches):
    step, _ = make_step("B0", MUON, "optimizer.decay_all=false", "optimizer.muon_lr_scale=2", "optimizer.momentum=0.8")
    step.run(make_batches(1, 16), [None])
    student, states = step.student, step.optimizer.state
    by_muon = {name for name, p in student.named_parameters() if "momentum_buffer" in states[p]}
    layers = {name for name, p in student.named_parameters() if name.startswith("backbone.layer") and p.ndim == 4}
    assert by_muon == layers and len(layers) == 19
    assert all("exp_avg" in states[p] for name, p in student.named_parameters() if name not in by_muon)
    *matrices, decayed, spared = step.optimizer.param_groups
    assert {(g["momentum"], g["lr_scale"], g["weight_decay"]) for g in matrices} == {(0.8, 2.0, 0.05)}
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3, 7, 7), (256, 32), (8, 256)]
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0.0
    assert all(group["lr"] is step.lr for group in step.optimizer.param_groups)


def test_grouped_and_frozen_convolutions_are_left_out(make_step, monkeypatch):
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 1)]
    layers[3].requires_grad_(False)
    assert muon_weights(nn.Sequential(*layers)) == [layers[2].weight]
    monkeypatch.setattr("ngd_fast.student.step.muon_weights", lambda backbone: muon_weights(backbone.conv1))
    with pytest.raises(UserError, match=r"muon: model\.arch resnet18-w4 has no convolutions behind its first"):
        make_step("B0", MUON)


def test_adamw_is_what_it_was(make_step):
    step, _ = make_step("B0")
    assert type(step.optimizer) is torch.optim.AdamW
    (group,) = step.optimizer.param_groups
    assert group["params"] == list(step.student.parameters())


def test_fp16_scaler_leaves_out_a_step_that_overflows(make_step, make_batches):
    step, _ = make_step("B0", MUON, "train.precision=fp16", "train.clip_grad=null")
    batch = make_batches(1, 16)
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 2.0**10})
    step.run(batch, [None])
    parameters, moments = [p.detach().clone() for p in step.parameters], [t.clone() for t in step.optimizer_tensors()]
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 2.0**120})
    step.run(batch, [None])
    assert step.scaler.get_scale() == 2.0**119
    assert all(torch.equal(p, before) for p, before in zip(step.parameters, parameters))
    assert all(torch.equal(t, before) for t, before in zip(step.optimizer_tensors(), moments))


def test_scaled_gradients_are_scaled_back():
    """Where nobody called unscale_ before the step, as one that clips must."""
    weights = [nn.Parameter(torch.ones(4, 6)) for _ in range(2)]
    for weight, factor in zip(weights, (1, 1024)):
        scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        optimizer = optimizer_of([weight], lr=0.1, weight_decay=0.0)
        scaler.scale((weight * torch.arange(24.0).view(4, 6)).sum()).backward()
        scaler.step(optimizer)
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], 0.05 * torch.arange(24.0).view(4, 6))
    assert torch.equal(*weights) and not torch.equal(weights[0], torch.ones(4, 6))
