"""Sharpness-aware steps against the method written plainly, and what they must leave alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from runs import assert_same_run, final_state, kill_at

from ngd_fast.errors import UserError
from ngd_fast.student.config import differing_keys, load_student_config
from ngd_fast.student.run import train_student
from ngd_fast.student.step_runner import StepRunner

ADAPTIVE = pytest.mark.parametrize("adaptive", [False, True])


def sam(rho, *, every=1, adaptive=False):
    return f"optimizer.sam={{rho: {rho}, every: {every}, adaptive: {str(adaptive).lower()}}}"


def bits(step):
    return [value.clone() for value in step.student.state_dict().values()]


def assert_same_bits(step, before):
    for (name, value), old in zip(step.student.state_dict().items(), before, strict=True):
        assert torch.equal(value, old), name


@ADAPTIVE
@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_is_sam_written_plainly(adaptive, accumulation, make_step, make_batches):
    # eps: AdamW's usual one makes steps of rounding errors where a gradient is nearly 0
    smooth = ("optimizer.eps=1", "optimizer.lr=0.1", "train.clip_grad=1", f"train.accumulation={accumulation}")
    step, _ = make_step("B0", sam(0.5, adaptive=adaptive), *smooth)
    plain, first_only = copy.deepcopy(step.student), copy.deepcopy(step.student)
    batches = make_batches(accumulation, 16)
    step.run(batches, [None] * accumulation)

    def loss_of(network, parameters):
        logits = [torch.func.functional_call(network, parameters, batch.images)[1] for batch in batches]
        options = {"weight": step.class_weight, "label_smoothing": 0.055}
        return sum(F.cross_entropy(x, batch.labels, **options) for x, batch in zip(logits, batches)) / accumulation

    weights = dict(plain.named_parameters())
    loss = loss_of(first_only, dict(first_only.named_parameters()))
    gradients = torch.autograd.grad(loss, list(first_only.parameters()))
    flat = torch.cat([g.flatten() for g in gradients])
    if adaptive:
        flat = flat * torch.cat([w.detach().abs().flatten() for w in weights.values()])
    length = flat.norm()
    moved = {}
    for (name, w), g in zip(weights.items(), gradients):
        e = 0.5 * (w.detach() ** 2 * g if adaptive else g) / length
        moved[name] = (w.detach() + e).requires_grad_()
    for w, g in zip(weights.values(), torch.autograd.grad(loss_of(copy.deepcopy(plain), moved), list(moved.values()))):
        w.grad = g
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1)
    torch.optim.AdamW(plain.parameters(), lr=0.1, eps=1, weight_decay=0.05).step()

    torch.testing.assert_close(step.history[0, 0], loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.history[0, -1], norm, rtol=1e-4, atol=1e-6)
    for (name, ours), theirs in zip(step.student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=name)
    for (name, ours), theirs in zip(step.student.named_buffers(), first_only.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=name)
    second = torch.cat([p.grad.flatten() for p in step.parameters])
    first = torch.cat([g.flatten() for g in gradients])
    assert F.cosine_similarity(first, second, dim=0) < 0.999, "no other gradient than without SAM"
    assert step.student.backbone.bn1.num_batches_tracked == accumulation


@ADAPTIVE
@pytest.mark.parametrize("rho", [1e-30, 1e6])
def test_weights_are_put_back_bit_for_bit(rho, adaptive, make_step, make_batches):
    step, _ = make_step("B0", sam(rho, adaptive=adaptive))
    plain, _ = make_step("B0")
    for one in (step, plain):
        one.schedule.zero_()  # a learning rate of 0
        one.run(make_batches(1, 16), [None])
    assert_same_bits(step, bits(plain))


@ADAPTIVE
def test_only_sound_gradients_move_weights_and_their_scale_does_not_count(adaptive, make_step):
    step, _ = make_step("B0", sam(0.5, adaptive=adaptive))
    before = bits(step)
    for value in (torch.nan, torch.inf, 0.0):
        for p in step.parameters:
            p.grad = torch.zeros_like(p)
        step.student.head.bias.grad[0] = value
        step._perturb()
        assert_same_bits(step, before)
    moved = []
    for scale in (1, 2**16):
        for p in step.parameters:
            p.grad = torch.full_like(p, 0.1 * scale)
        step._perturb()
        moved.append(bits(step))
        for value, old in zip(step.student.state_dict().values(), before):
            value.copy_(old)
    for a, b in zip(*moved):
        torch.testing.assert_close(a, b)
    if not adaptive:
        distance = sum((a - b).double().square().sum() for a, b in zip(moved[0], before)).sqrt()
        torch.testing.assert_close(distance, torch.tensor(0.5, dtype=torch.float64), rtol=1e-4, atol=0)


def test_every_second_step_and_off(make_step, make_batches):
    batches, calls = make_batches(4, 16), []
    off, _ = make_step("B0", sam(0, every=2, adaptive=True))
    plain, _ = make_step("B0")
    second, _ = make_step("B0", sam(0.1, every=2))
    second.student.register_forward_hook(lambda *_: calls.append(int(second.step)))
    for i, batch in enumerate(batches):
        for step in (off, plain, second):
            step.run([batch], [None])
        assert_same_bits(off, bits(plain))
        if i == 0:
            assert_same_bits(second, bits(plain))
    assert calls == [0, 1, 1, 2, 3, 3]
    assert not torch.equal(second.student.head.weight, plain.student.head.weight)


def test_resumes_between_two_sharp_steps(small_config, tmp_path, monkeypatch):
    config = small_config("B0", sam(0.1, every=2), "train.checkpoint_every=1")
    train_student(config, tmp_path / "whole")
    kill_at(monkeypatch, 4, config, tmp_path / "parts")
    assert final_state(tmp_path / "parts")["progress"]["step"] == 3
    train_student(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_what_cannot_be_is_named(make_step):
    with pytest.raises(
        UserError, match=r"cuda_graph=true holds one kind of step: use auto, or optimizer\.sam\.every=1"
    ):
        load_student_config("B0", [sam(0.1, every=2), "train.cuda_graph=true"])
    load_student_config("B0", [sam(0, every=2), "train.cuda_graph=true"])
    with pytest.raises(UserError, match=r"optimizer\.sam\.rho: .* greater than or equal to 0"):
        load_student_config("B0", [sam(-1)])
    with pytest.raises(UserError, match=r"optimizer\.sam\.every: .* greater than or equal to 1"):
        load_student_config("B0", [sam(0.1, every=0)])
    with pytest.raises(ValueError, match="one kind of step"):
        StepRunner([make_step("B0", sam(0.1, every=2))[0]], use_graph=True)
    plain = load_student_config("B0").model_dump(mode="json")
    del plain["optimizer"]["sam"]  # a checkpoint from before there was SAM
    assert differing_keys(plain, load_student_config("B0").model_dump(mode="json")) == []
    assert differing_keys(plain, load_student_config("B0", [sam(0.1)]).model_dump(mode="json")) == ["optimizer.sam.rho"]
