"""KD's modes that the reference alone computes (dkd, dist): the papers' formulas, finite results, who computes them."""

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ngd_fast import NGDObjective
from ngd_fast.objective import backends, choice, functional, ops, reference
from ngd_fast.objective.settings import FUSED_KD_MODES, Settings

MODES = ["dkd", "dist"]


def pair(rows=9, classes=8, seed=1):
    return 2 * torch.randn(2, rows, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dkd_of_the_paper(z, teacher, t, target, alpha, beta):
    """arXiv 2203.08679, row by row; None: a row without a target."""
    losses = []
    for zs, zt, c in zip(z, teacher, target):
        if c is None:
            continue
        (p, others), (pt, others_t) = (
            (x.exp()[c] / x.exp().sum(), torch.cat([x[:c], x[c + 1 :]]).softmax(0)) for x in (zs / t, zt / t)
        )
        tckd = pt * (pt / p).log() + (1 - pt) * ((1 - pt) / (1 - p)).log()
        losses.append(alpha * tckd + beta * (others_t * (others_t / others).log()).sum())
    return sum(losses) / len(losses)


def dist_of_the_paper(z, teacher, t):
    """arXiv 2205.10536, with both weights 1."""
    p, q = ((x / t).softmax(1).numpy() for x in (z, teacher))
    inter, intra = (1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(u, v)]) for u, v in ((p, q), (p.T, q.T)))
    return inter + intra


@pytest.mark.parametrize("t", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scale", [False, True])
def test_they_are_the_papers_formulas(t, scale):
    z, teacher = pair()
    factor = t * t if scale else 1.0
    target = torch.tensor([0, 7, 3, -100, 3, 1, -100, 2, 5])
    theirs = dkd_of_the_paper(z, teacher, t, [None if c < 0 else c for c in target.tolist()], 0.7, 3.0)
    ours = reference.kd(z, teacher, t, "dkd", scale, target, 0.7, 3.0)
    assert torch.allclose(ours, theirs * factor, rtol=1e-11)
    ours = reference.kd(z, teacher, t, "dist", scale)
    assert float(ours) == pytest.approx(dist_of_the_paper(z, teacher, t) * factor, rel=1e-11)


@pytest.mark.parametrize("t", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode, t):
    z, teacher = pair(rows=3, classes=4)
    target = torch.tensor([0, -100, 3])
    loss = lambda z, teacher: reference.kd(z, teacher, t, mode, False, target)  # noqa: E731
    inputs = (z.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    assert t != 1 or torch.autograd.gradgradcheck(loss, inputs)


def test_a_distributions_target_is_its_first_largest_entry():
    z, teacher = pair(rows=4, classes=3)
    soft = torch.tensor([[0.2, 0.4, 0.4], [0.1, 0.2, 0.7], [1 / 3] * 3, [0.0] * 3])  # zeros: no target
    of_soft, of_index = (
        reference.kd(z, teacher, 2.0, "dkd", False, target) for target in (soft, torch.tensor([1, 2, 0, -100]))
    )
    assert torch.equal(of_soft, of_index)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_without_a_target(mode):
    """dkd: no gradient there; dist compares all rows."""
    case = cases.make(6, 8, 4, 3, kd_mode=mode, target=torch.tensor([0, 1, -100, 2, 3, -100]), geo_weight=None)
    gradient = cases.run(case, None).logits
    assert gradient[[0, 1, 3, 4]].any(1).all() and gradient[[2, 5]].any(1).tolist() == [mode == "dist"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [0.001, 0.1, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("mode", MODES)
def test_finite_at_every_temperature(mode, t, dtype):
    rng = torch.Generator().manual_seed(0)
    logits, teacher = 3 * torch.randn(2, 8, 8, generator=rng)
    logits[1], logits[2], teacher[3], teacher[4] = 0.3, 3e4 * logits[2] / logits[2].abs().max(), -2.0, -logits[4]
    teacher[0] = torch.tensor([60.0] + [-40.0] * 3 + [5.0] * 4)  # p_t is 1
    logits[5], logits[6] = 0.1 * torch.arange(8) * 1e-4, teacher[0].roll(1)
    settled = (logits[:1].expand(8, 8), teacher[:1].expand(8, 8))  # columns are constant
    for z, zt in ((logits, teacher), (teacher, logits), settled, (logits[:, :1], teacher[:, :1])):
        for rows in (8, 1):
            z = z[:rows].detach().to(dtype).requires_grad_()
            out = functional.ngd_objective(
                None, z, torch.zeros(rows, dtype=torch.int64), kd_mode=mode, kd_temperature=t, geo_weight=None,
                teacher_logits=zt[:rows].to(dtype), kd_scale_by_t2=rows == 8,
            )  # fmt: skip
            assert out.kd.isfinite() and torch.autograd.grad(out.total, z)[0].isfinite().all()


def test_a_sure_teacher_still_teaches_the_other_classes():
    """Where p_t rounds to 1 in float32 NCKD is that of float64."""
    teacher = torch.tensor([[200.0, 1.0, 0.0, -3.0]])
    z, target = torch.tensor([[150.0, -2.0, 0.5, 0.0]]), torch.tensor([0])
    single, double = (reference.kd(z.to(d), teacher.to(d), 1.0, "dkd", False, target) for d in (z.dtype, torch.float64))
    assert float(single) == pytest.approx(float(double), rel=1e-6) and single > 1


def test_what_is_constant_correlates_with_nothing():
    z, teacher = torch.zeros(5, 4).requires_grad_(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    loss = reference.kd(z, teacher, 2.0, "dist")
    assert loss == 2 and not torch.autograd.grad(loss, z)[0].any()
    assert float(reference.kd(teacher, teacher, 2.0, "dist").abs()) < 1e-6


@pytest.mark.parametrize("mode", FUSED_KD_MODES)
def test_the_other_modes_are_to_the_bit_what_they_were(mode):
    z, teacher, t = *(x.float().requires_grad_() for x in pair()), 5.0
    if mode == "mse":
        before = ((z - teacher) / t).square().mean()
    else:
        a, b = (F.layer_norm(x, x.shape[1:], eps=1e-5) if mode == "logitstd" else x for x in (z, teacher))
        log_p, log_teacher = F.log_softmax(a / t, dim=1), F.log_softmax(b / t, dim=1)
        p = log_teacher.exp()
        before = torch.where(p == 0, 0.0, p * (log_teacher - log_p)).sum() / z.shape[0]
    now = reference.kd(z, teacher, t, mode, False, torch.zeros(9, dtype=torch.int64), 0.5, 2.0)
    assert torch.equal(now, before)
    assert all(map(torch.equal, *(torch.autograd.grad(loss, (z, teacher)) for loss in (now, before))))


@pytest.mark.parametrize("mode", MODES)
def test_only_the_reference_has_them(mode):
    if reason := backends.why_not("cpu"):
        pytest.skip(reason)
    case = cases.make(6, 8, 4, 3, kd_mode=mode)
    with pytest.raises(RuntimeError, match=rf"'cpu' cannot do this: has no kd_mode '{mode}'; the reference has"):
        functional.ngd_objective(**case, backend="cpu")
    assert all(map(torch.equal, cases.run(case, None), cases.run(case, "reference")))
    # Without a teacher the mode does not matter, and the fused backend computes as ever.
    case["teacher_logits"] = None
    assert all(map(torch.equal, cases.run(case, None), cases.run({**case, "kd_mode": "mse"}, "cpu")))
    tensors = (case["features"], case["logits"], case["target"], *[None] * 4)
    settings = Settings(kd_mode=mode)
    assert ops.eager(None, settings, *tensors[:6], None, None, None) is not None
    assert ops.eager(None, settings, *tensors[:6], case["logits"], None, None) is None
    assert choice.choose(None, choice.Inputs(*tensors), 4, mode) == "cpu"


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_fullgraph(mode, soft):
    torch._dynamo.reset()
    case = cases.make(33, 16, 8, 5, soft=soft, kd_mode=mode, kd_scale_by_t2=True)
    compiled = torch.compile(functional.ngd_objective, fullgraph=True, backend="aot_eager")
    for a, b in zip(cases.run(case, None, compiled=compiled), cases.run(case, "reference")):
        assert cases.relative(a, b) <= 1e-6


def test_alpha_and_beta_reach_it():
    z, teacher = (x.float() for x in pair(6, 4))
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    module = NGDObjective(kd_mode="dkd", geo_weight=None, kd_alpha=0.0)
    nckd = module(None, z, target, teacher).kd
    module.kd_alpha, module.kd_beta = 1.0, 0.0
    tckd = module(None, z, target, teacher).kd
    module.kd_alpha, module.kd_beta = 2.0, 4.0
    assert torch.allclose(module(None, z, target, teacher).kd, 2 * tckd + nckd / 2)
    with pytest.raises(ValueError, match="kd_beta: wanted a finite number, got nan"):
        module.kd_beta = float("nan")
