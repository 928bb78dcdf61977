"""The reference against PyTorch's own losses, and D-Geo against loops written from the paper's text."""

import cases
import pytest
import torch
import torch.nn.functional as F

from ngd_fast.objective import backends, functional, reference


def slow_d_geo(features, labels, high_valence, var_cap, margin):
    rows = {}
    for row, label in zip(features, labels.tolist()):
        if label >= 0:
            rows.setdefault(label, []).append(row / row.norm())
    means = {c: sum(members) / len(members) for c, members in rows.items()}
    var = 0.0
    for c in high_valence:
        if c in rows:
            sigma2 = sum(float((f - means[c]).norm()) ** 2 for f in rows[c]) / len(rows[c])
            var += max(0.0, sigma2 - var_cap)
    repulsion = sum(max(0.0, margin - float((means[a] - means[b]).norm())) for a in means for b in means if a != b)
    return var, repulsion


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.055, 1.0])
def test_cross_entropy_is_pytorchs(soft, weighted, smoothing):
    case = cases.make(soft=soft)
    logits, target = case["logits"].double().requires_grad_(), case["target"]
    if soft:
        target = target.double()
    else:
        target[3] = -100
    weight = case["class_weight"].double() if weighted else None
    ours = reference.cross_entropy(logits, target, weight, smoothing)
    theirs = F.cross_entropy(logits, target, weight, label_smoothing=smoothing)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-15)


@pytest.mark.parametrize("scale", [False, True])
def test_kd_is_pytorchs(scale):
    z, teacher, t = *torch.randn(2, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 5.0
    factor = t * t if scale else 1.0
    kl = F.kl_div((z / t).log_softmax(1), (teacher / t).softmax(1), reduction="batchmean") * factor
    assert torch.allclose(reference.kd(z, teacher, t, "kl", scale), kl)
    assert torch.allclose(reference.kd(z, teacher, t, "mse", scale), F.mse_loss(z / t, teacher / t) * factor)


def test_kd_of_standardised_logits():
    z, teacher, t = *torch.randn(2, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 2.0
    ours = reference.kd(z, teacher, t, "logitstd")
    # the formula of the paper's code, whose standard deviation is the sample's
    z, teacher = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (z, teacher))
    t *= (7 / 8) ** 0.5
    theirs = F.kl_div((z / t).log_softmax(1), (teacher / t).softmax(1), reduction="batchmean")
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4)  # STD_EPS


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("temperature", [0.001, 2.0, 100.0])
def test_kd_of_standardised_logits_has_finite_gradients(backend, temperature):
    if backends.why_not(backend):
        pytest.skip(backends.why_not(backend))
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    logits[1], logits[2] = 0.3, 3e4 * logits[2]  # flat; far apart
    teacher = torch.stack([-logits[0], logits[0], logits[0], torch.full((8,), -2.0)])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        z = logits.to(dtype).requires_grad_()
        out = functional.ngd_objective(
            None, z, torch.zeros(4, dtype=torch.int64), None, None, teacher_logits=teacher, geo_weight=None,
            kd_mode="logitstd", kd_temperature=temperature, backend=backend,
        )  # fmt: skip
        assert torch.autograd.grad(out.total, z)[0].isfinite().all()


@pytest.mark.parametrize("prior_per_row", [False, True])
def test_proto_kd_is_kl_to_the_softmax_of_cosines(prior_per_row):
    case = cases.make(prior_per_row=prior_per_row)
    features, prototypes, prior = (case[name].double() for name in ("features", "prototypes", "prior"))
    cosine = F.cosine_similarity(features.unsqueeze(1), prototypes.unsqueeze(0), dim=2)
    expected = F.kl_div((cosine / 0.9).log_softmax(1), prior.expand_as(cosine), reduction="batchmean")
    assert torch.allclose(reference.proto_kd(features, prototypes, prior, 0.9), expected)


def test_a_prior_of_zero_adds_nothing():
    features, prototypes = torch.randn(4, 8), torch.randn(3, 8)
    prior = torch.tensor([0.5, 0.5, 0.0])
    q = (F.normalize(features) @ F.normalize(prototypes).t() / 0.9).softmax(1)
    expected = (0.5 * (0.5 / q[:, :2]).log()).sum(1).mean()
    assert torch.allclose(functional.proto_kd(features, prototypes, prior, backend="reference"), expected, atol=1e-6)


def test_d_geo_is_the_loops():
    rng = torch.Generator().manual_seed(5)
    features = torch.randn(40, 16, dtype=torch.float64, generator=rng) + 0.7
    labels = torch.randint(-1, 6, (40,), generator=rng)
    labels[labels == 4] = 0  # class 4 is absent
    expected = slow_d_geo(features, labels, (1, 2), 0.3, 1.1)
    assert all(value > 0 for value in expected)
    actual = reference.d_geo(features, labels, 6, (1, 2), 0.3, 1.1)
    assert [float(term) for term in actual] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", ["kl", "logitstd"])
def test_second_derivatives(mode):
    case = cases.mapped(cases.make(6, 5, 4, 6, kd_mode=mode), lambda t: t.double() if t.is_floating_point() else t)

    def total(features, logits, prototypes, prior, teacher_logits, class_weight):
        changed = dict(features=features, logits=logits, prototypes=prototypes, prior=prior)
        changed.update(teacher_logits=teacher_logits, class_weight=class_weight)
        return functional.ngd_objective(**{**case, **changed}).total

    names = ("features", "logits", "prototypes", "prior", "teacher_logits", "class_weight")
    inputs = [case[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(total, inputs)
    assert torch.autograd.gradgradcheck(total, inputs)


def test_smoothing_keeps_float64():
    # 1 / C in float32 was once added to float64 targets: an error of 1e-9 that float32 tests cannot see.
    logits, target = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    ours = reference.cross_entropy(logits, target, None, 0.1)
    assert abs(float(ours - F.cross_entropy(logits, target, label_smoothing=0.1))) < 1e-14
