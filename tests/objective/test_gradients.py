"""How gradients are handed over: scaled, once, twice, not at all; and what refuses to be differentiated."""

import cases
import pytest
import torch
from cases import BACKENDS, assert_close, device_of, make, mapped, relative, run, truth

from ngd_fast.objective import backends, functional

pytestmark = pytest.mark.skipif(bool(backends.why_not("cpu")), reason=backends.why_not("cpu"))


def on_device(case, backend):
    case = mapped(case, lambda t: t.to(device_of(backend)))
    leaves = [case[name].requires_grad_() for name in ("features", "logits")]
    return case, leaves


@pytest.mark.parametrize(
    "options",
    [{}, {"kd_mode": "kl", "soft": True, "prior_per_row": True}, {"kd_mode": "logitstd"}],
    ids=["index", "soft", "logitstd"],
)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradcheck(backend, options):
    case, leaves = on_device(make(7, 5, 4, 3, dtype=torch.float64, **options), backend)
    names = ("features", "logits")

    def total(*inputs):
        return functional.ngd_objective(**{**case, **dict(zip(names, inputs))}, backend=backend).total

    assert torch.autograd.gradcheck(total, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_incoming_gradient(backend):
    case = make()
    assert_close(run(case, backend, grad_output=-3.5), truth(case, grad_output=-3.5))


@pytest.mark.parametrize("rows", [128, 20_000])
@pytest.mark.parametrize(
    "backend", ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda"))]
)
def test_float16_under_a_loss_scale(backend, rows):
    """Gradients of a mean over many rows vanish in float16 unless they are scaled first; and 2^16 itself overflows."""
    case = make(rows, 16, dtype=torch.float16)
    got = run(case, backend, grad_output=2.0**16)
    plain, want = run(case, "reference", grad_output=2.0**16), truth(case, grad_output=2.0**16)
    for name in ("features", "logits"):
        assert getattr(got, name).dtype == torch.float16
        assert relative(getattr(got, name), getattr(want, name)) <= 2 * relative(
            getattr(plain, name), getattr(want, name)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_backward_recomputes(backend):
    case, leaves = on_device(make(), backend)
    total = functional.ngd_objective(**case, backend=backend).total
    first = torch.autograd.grad(total, leaves, torch.full_like(total, 5.0), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(total, leaves)
    assert all(relative(5 * b, a) <= 1e-6 for a, b in zip(kept, second))
    assert all(torch.equal(a, b) for a, b in zip(kept, first))  # the first ones are the caller's now
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_changed_input_is_noticed_by_a_second_backward(backend):
    case, leaves = on_device(make(), backend)
    case["logits"] = case["logits"] * 1.0
    total = functional.ngd_objective(**case, backend=backend).total
    torch.autograd.grad(total, leaves, retain_graph=True)
    case["logits"].data.zero_()
    with torch.no_grad():
        case["logits"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["target", "prototypes", "prior", "labels", "teacher_logits", "class_weight", "geo_weight"]
)
def test_a_second_backward_refuses_other_constants(backend, name):
    case, leaves = on_device(make(geo_weight=torch.tensor(0.5), labels=torch.zeros(37, dtype=torch.int64)), backend)
    total = functional.ngd_objective(**case, backend=backend).total
    case[name].zero_()  # the next batch may overwrite the last one's buffers: the gradient has been computed
    torch.autograd.grad(total, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_incoming_gradient(backend):
    case, leaves = on_device(make(), backend)
    torch._C._functions.UndefinedGrad()(functional.ngd_objective(**case, backend=backend).total).backward()
    assert all(leaf.grad is None for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_raises(backend):
    case, leaves = on_device(make(), backend)
    total = functional.ngd_objective(**case, backend=backend).total
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, leaves, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["features", "logits"])
def test_gradient_of_one_input(backend, wanted):
    case = mapped(make(), lambda t: t.to(device_of(backend)))
    case[wanted].requires_grad_()
    functional.ngd_objective(**case, backend=backend).total.backward()
    assert relative(case[wanted].grad, getattr(truth(make()), wanted)) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_and_inference_mode(backend):
    case, _ = on_device(make(), backend)
    expected = torch.stack([term.detach() for term in functional.ngd_objective(**case, backend=backend)])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = functional.ngd_objective(**case, backend=backend)
        assert not out.total.requires_grad and torch.equal(torch.stack(list(out)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_are_detached_and_inputs_untouched(backend):
    case, leaves = on_device(make(dtype=torch.bfloat16), backend)
    before = mapped(case, lambda t: t.detach().clone())
    out = functional.ngd_objective(**case, backend=backend)
    assert out.total.requires_grad and not any(term.requires_grad for term in out[1:])
    (out.total * 2).backward()
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(case[name].detach(), value), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_shared_by_two_losses(backend):
    """A gradient written into the logits would show here: a second loss of the same logits."""
    case, (features, logits) = on_device(make(), backend)
    total = functional.ngd_objective(**case, backend=backend).total
    other = logits.square().sum()
    (total + other).backward()
    expected = run(make(), "reference").logits + 2 * make()["logits"]
    assert relative(logits.grad, expected) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["prototypes", "prior", "teacher_logits", "class_weight", "geo_weight"])
def test_gradient_by_anything_else_is_the_references(backend, name):
    case, _ = on_device(make(geo_weight=torch.tensor(0.5)), backend)
    case[name] = case[name].detach().requires_grad_()
    with pytest.raises(RuntimeError, match=f"no gradient by {name}"):
        functional.ngd_objective(**case, backend=backend)
    functional.ngd_objective(**case).total.backward()
    assert case[name].grad.norm() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_the_references(backend):
    case = mapped(make(), lambda t: t.to(device_of(backend)))
    direction = torch.ones_like(case["logits"]).cumsum(1)

    def total(logits, backend=None):
        return functional.ngd_objective(**{**case, "logits": logits}, backend=backend).total

    _, slope = torch.func.jvp(total, (case["logits"],), (direction,))
    assert float(slope) == pytest.approx(float((truth(make()).logits * direction.cpu()).sum()), rel=1e-4)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda logits: total(logits, backend), (case["logits"],), (direction,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_by_torch_func_are_the_references(backend):
    case = mapped(make(), lambda t: t.to(device_of(backend)))

    def total(logits, backend=None):
        return functional.ngd_objective(**{**case, "logits": logits}, backend=backend).total

    assert relative(torch.func.grad(total)(case["logits"]).cpu(), truth(make()).logits) <= 1e-5
    with pytest.raises(RuntimeError, match=r"no derivative by torch\.func"):
        torch.func.grad(lambda logits: total(logits, backend))(case["logits"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    case, leaves = on_device(make(), backend)
    plain = functional.ngd_objective(**case, backend=backend)
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        inside = functional.ngd_objective(**case, backend=backend)
        by_reference = functional.ngd_objective(**case, backend="reference")
    assert torch.equal(inside.total, plain.total)
    assert by_reference.total.item() == pytest.approx(plain.total.item(), rel=1e-5)
    gradients = torch.autograd.grad(inside.total, leaves)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_learns(backend):
    """Descent along the gradients brings every term down."""
    case, leaves = on_device(make(64, 16, 8, 25, geo_weight=0.1), backend)
    optimizer = torch.optim.SGD(leaves, lr=20.0)
    start = functional.ngd_objective(**case, backend=backend)
    for _ in range(60):
        optimizer.zero_grad()
        out = functional.ngd_objective(**case, backend=backend)
        out.total.backward()
        optimizer.step()
    assert out.total < start.total and out.kd < start.kd and out.proto < start.proto
    assert out.geo_margin < start.geo_margin and cases.relative(out.total, start.total) > 0.3
