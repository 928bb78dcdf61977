"""The training step against the same step written plainly; its schedule, history, averaging and accumulation."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ngd_fast.objective import functional, reference
from ngd_fast.student.config import CEConfig, OptimizerConfig, load_student_config
from ngd_fast.student.schedule import learning_rate, schedule_table
from ngd_fast.student.step import TERMS, class_weights
from ngd_fast.student.step_runner import StepRunner, restore, snapshot

OPTIMIZERS = pytest.mark.parametrize(
    "kind",
    [
        "optimizer.kind=adamw",
        "optimizer.kind=muon",
        "optimizer.sam.rho=0.1",
        "optimizer.sam={rho: 0.5, adaptive: true}",
    ],
)


def test_class_weights_are_mild_and_average_to_one():
    counts = [1000, 16, 81, 0]
    weights = class_weights(CEConfig(), counts)
    raw = np.array([1000, 16, 81]) ** -0.25
    np.testing.assert_allclose(weights[:3], raw / raw.mean(), rtol=1e-6)
    assert weights[3] == 1 and weights[:3].mean() == pytest.approx(1)
    assert class_weights(CEConfig(class_weights="none"), counts) is None


def test_learning_rate_warms_up_and_falls_by_a_cosine():
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_epochs=2)
    rates = [learning_rate(config, step, 50, 5) for step in range(50)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0 and rates[30] == pytest.approx(0.55)
    assert rates[49] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 39 / 40)))


def test_schedule_table_holds_the_ramp_at_fractional_epochs():
    table = schedule_table(load_student_config("B3"), steps_per_epoch=4)
    assert table.shape == (400, 2)
    weights = table[:, 1]
    assert (weights[:81] == 0).all() and (weights[240:] == torch.tensor(0.012)).all()
    assert weights[160] == pytest.approx(0.006, rel=1e-5)  # epoch 40: half way
    assert weights[161] == pytest.approx(0.012 * 0.5 * (1 - math.cos(math.pi * 20.25 / 40)), rel=1e-5)


def test_step_is_the_plain_step(make_step, make_batches):
    """Three steps of B3 against AdamW, clipping and the reference objective written out."""
    step, bank = make_step(
        "B3", "objective.geo.schedule.start=0", "objective.geo.schedule.end=0", "train.clip_grad=0.5"
    )
    plain = copy.deepcopy(step.student)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.0, weight_decay=0.05)
    batches, teacher_logits = make_batches(3, 16), torch.randn(3, 16, 8)
    norms = []
    for i, (batch, logits_t) in enumerate(zip(batches, teacher_logits)):
        step.run([batch], [logits_t])
        features, logits = plain(batch.images)
        ce = F.cross_entropy(logits, batch.labels, weight=step.class_weight, label_smoothing=0.055)
        kd = ((logits - logits_t) / 5).square().mean()
        proto = functional.proto_kd(features, bank.prototypes, bank.prior, temperature=0.9, backend="reference")
        var, margin = reference.d_geo(features, batch.labels, 8, (1, 2), functional.VAR_CAP, functional.MARGIN)
        loss = ce + 0.30 * kd + 0.12 * proto + 0.012 * (var + margin)
        optimizer.param_groups[0]["lr"] = float(step.schedule[i, 0])
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
        optimizer.step()
        expected = torch.stack([loss, ce, kd, proto, var, margin, norms[-1]]).detach()
        torch.testing.assert_close(step.history[i], expected, rtol=1e-4, atol=1e-5)
    assert max(norms) > 0.5, "the test should clip"
    for (name, ours), theirs in zip(step.student.named_parameters(), plain.parameters()):
        # AdamW divides by the root of the second moment: where a gradient is nearly 0, rounding decides its sign
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 * 3 * 0.2, msg=name)
        assert (ours - theirs).abs().mean() < 1e-5, name


def test_history_is_a_ring_over_the_last_steps(make_step, make_batches):
    step, _ = make_step("B0", "train.log_every=4")
    losses = []
    for batch in make_batches(6, 16):
        step.run([batch], [None])
        losses.append(float(step.history[(int(step.step) - 1) % 4, 0]))
    assert int(step.step) == 6
    torch.testing.assert_close(step.history[:, 0], torch.tensor([losses[4], losses[5], losses[2], losses[3]]))


def test_accumulated_gradient_is_that_of_the_whole_batch(make_step, make_batches):
    """With batch norm in eval mode and no class weights every term of B2 is a mean over rows."""
    whole, _ = make_step("B2", "objective.ce.class_weights=none", "train.clip_grad=null")
    parts, _ = make_step("B2", "objective.ce.class_weights=none", "train.clip_grad=null", "train.accumulation=2")
    (batch,) = make_batches(1, 16)
    halves = [type(batch)(*(t[rows] for t in vars(batch).values())) for rows in (slice(0, 8), slice(8, 16))]
    logits = torch.randn(16, 8)
    for step in (whole, parts):
        step.student.eval()
    whole.run([batch], [logits])
    parts.run(halves, [logits[:8], logits[8:]])
    for a, b in zip(whole.parameters, parts.parameters):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole.history[0], parts.history[0], rtol=1e-5, atol=1e-6)


def test_average_follows_the_weights(make_step, make_batches):
    step, _ = make_step("B0", "train.ema=0.75")
    before = step.student.head.weight.detach().clone()
    step.run(make_batches(1, 16), [None])
    expected = 0.75 * before + 0.25 * step.student.head.weight.detach()
    torch.testing.assert_close(step.weights()["head.weight"], expected)
    assert step.weights()["backbone.bn1.num_batches_tracked"] == 1


def test_soft_targets_and_drawn_labels(make_step, make_batches):
    (batch,) = make_batches(1, 16)
    features, logits = torch.randn(16, 256), torch.randn(16, 8)
    soft, _ = make_step("B0", "objective.ce.targets=distributions", "objective.ce.class_weights=none")
    expected = F.cross_entropy(logits, batch.target_dist, label_smoothing=0.055)
    torch.testing.assert_close(soft.objective(features, logits, batch, None).ce, expected)
    drawn, _ = make_step("B0", "data.draw_labels=true", "objective.ce.class_weights=none")
    expected = F.cross_entropy(logits, batch.target_dist.argmax(1), label_smoothing=0.055)
    torch.testing.assert_close(drawn.objective(features, logits, batch, None).ce, expected)


def test_fp16_scaler_leaves_out_a_step_that_overflows(make_step, make_batches):
    step, _ = make_step("B0", "train.precision=fp16", "train.clip_grad=null")
    weights = step.student.head.weight.detach().clone()
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 2.0**120})
    batch = make_batches(1, 16)
    step.run(batch, [None])
    assert torch.equal(step.student.head.weight, weights)
    assert step.scaler.get_scale() == 2.0**119
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 2.0**10})
    step.run(batch, [None])
    assert not torch.equal(step.student.head.weight, weights)


@OPTIMIZERS
def test_state_goes_over_to_another_step_bit_for_bit(kind, make_step, make_batches):
    batches = make_batches(4, 16)
    one, _ = make_step("B0", kind, "train.ema=0.9")
    two, _ = make_step("B0", kind, "train.ema=0.9", "seed=9")
    for batch in batches[:2]:
        one.run([batch], [None])
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in (one, two):
        for batch in batches[2:]:
            step.run([batch], [None])
    assert_equal_steps(one, two)


@OPTIMIZERS
@pytest.mark.parametrize("steps_before", [0, 2])
def test_restore_undoes_a_warm_up(kind, steps_before, make_step, make_batches):
    """What a capture runs to warm up must leave no trace, also not in an optimizer that was fresh."""
    batches = make_batches(5, 16)
    plain, _ = make_step("B0", kind)
    warmed, _ = make_step("B0", kind)
    for batch in batches[:steps_before]:
        plain.run([batch], [None])
        warmed.run([batch], [None])
    before = snapshot(warmed)
    addresses = [t.data_ptr() for t in warmed.tensors()]
    for batch in batches[2:]:
        warmed.run([batch], [None])
    restore(warmed, before)
    assert [t.data_ptr() for t in warmed.tensors()] == addresses
    for batch in batches[steps_before : steps_before + 2]:
        plain.run([batch], [None])
        warmed.run([batch], [None])
    assert_equal_steps(plain, warmed)


def test_warm_up_may_run_past_the_end_of_the_schedule(make_step, make_batches):
    step, _ = make_step("B0")
    step.step.fill_(len(step.schedule) - 1)
    before = snapshot(step)
    for batch in make_batches(3, 16):
        step.run([batch], [None])
    restore(step, before)
    assert int(step.step) == len(step.schedule) - 1


def test_side_by_side_is_the_same_as_alone(make_step, make_batches):
    batches = make_batches(3, 16)
    alone = [make_step(name)[0] for name in ("B0", "B2")]
    together = [make_step(name)[0] for name in ("B0", "B2")]
    teacher_logits = torch.randn(16, 8)

    class Teacher:
        calls = 0

        def __call__(self, batch):
            self.calls += 1
            return teacher_logits

    teacher = Teacher()
    runner = StepRunner(together, teacher, use_graph=False)
    for batch in batches:
        runner([batch])
        for step in alone:
            step.run([batch], [teacher_logits])
    assert teacher.calls == 3, "the teacher is asked once for all students"
    for a, b in zip(alone, together):
        assert_equal_steps(a, b)


class _NoQuestions(TorchDispatchMode):
    """Raises where a value would have to come from the device to the host."""

    asked = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.asked, func
        return func(*args, **(kwargs or {}))


@OPTIMIZERS
def test_step_asks_the_device_nothing(kind, make_step, make_batches, monkeypatch):
    # On the CPU the objective looks at its labels, to raise IndexError; on a GPU it does not.
    monkeypatch.setattr("ngd_fast.objective.checks.index_values", lambda *args: None)
    step, _ = make_step("B3", kind, "objective.backend=reference", "train.ema=0.9")
    batches = make_batches(2, 16)
    step.run(batches[:1], [torch.zeros(16, 8)])
    with _NoQuestions():
        step.run(batches[1:], [torch.zeros(16, 8)])


@pytest.mark.gpu
@OPTIMIZERS
@pytest.mark.parametrize("count", [1, 2])
def test_graph_is_the_same_as_eager(kind, count, make_step, make_batches, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device = torch.device("cuda")
    settings = (kind, "train.channels_last=true", "train.precision=fp32")
    eager = [make_step("B0", *settings, device=device)[0] for _ in range(count)]
    captured = [make_step("B0", *settings, device=device)[0] for _ in range(count)]
    plain, graph = StepRunner(eager, use_graph=False), StepRunner(captured, use_graph=True)
    for batch in make_batches(6, 16, device=device):
        plain([batch])
        graph([batch])
    torch.cuda.synchronize()
    for a, b in zip(eager, captured):
        assert int(b.step) == 6
        rtol = 1e-3 if "muon" in kind else 1e-4  # Muon iterates in bfloat16
        torch.testing.assert_close(a.history, b.history, rtol=rtol, atol=rtol / 10)


def assert_equal_steps(a, b):
    for name, value in a.student.state_dict().items():
        assert torch.equal(value, b.student.state_dict()[name]), name
    for ours, theirs in zip(a.optimizer_tensors(), b.optimizer_tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert a.history.shape[1] == len(TERMS) and int(a.step) == int(b.step)
    assert (a.average is None) == (b.average is None)
    for name in a.average or ():
        assert torch.equal(a.average[name], b.average[name]), name
