"""The operators under torch.library's own checks and torch.compile(fullgraph=True)."""

import subprocess
import sys

import pytest
import torch
from cases import BACKENDS, device_of, make, mapped, relative, run

from ngd_fast.objective import backends, functional
from ngd_fast.objective.settings import Settings

pytestmark = pytest.mark.skipif(bool(backends.why_not("cpu")), reason=backends.why_not("cpu"))

SETTINGS = (8, [1, 2], Settings(var_cap=0.1, margin=1.3, var_weight=0.8, margin_weight=0.6).packed, 0.5, 1.0)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def tensors(device, *, requires_grad=False, **options):
    case = mapped(make(9, 32, 8, 5, **options), lambda t: t.to(device))
    for name in ("features", "logits"):
        case[name].requires_grad_(requires_grad)
    names = ("features", "logits", "target", "prototypes", "prior", "target", "teacher_logits", "class_weight")
    return [case[name] for name in names] + [None, None]


def test_the_objective_does_not_import_dynamo():
    """It takes a second, which those who do not compile need not wait."""
    script = (
        "import sys, torch; before = 'torch._dynamo' in sys.modules\n"
        "from ngd_fast import NGDObjective, functional\n"
        "assert ('torch._dynamo' in sys.modules) == before"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype):
    ops = torch.ops.ngd_fast
    torch.library.opcheck(ops.objective.default, (*tensors(device, requires_grad=True, dtype=dtype), *SETTINGS))
    for want in (True, False):
        torch.library.opcheck(ops.objective_fwd.default, (*tensors(device, dtype=dtype), *SETTINGS, want, want))
    features, _, target, *_ = tensors(device, dtype=dtype)
    torch.library.opcheck(ops.geo_sums.default, (features, target, 8))
    torch.library.opcheck(ops.scale_.default, (features, torch.tensor(2.0, device=device)))


@pytest.mark.gpu
def test_opcheck_triton():
    assert not backends.why_not("triton")
    from ngd_fast.objective import triton_ops

    torch.library.opcheck(triton_ops.objective_fwd, (*tensors("cuda", requires_grad=True), *SETTINGS, True, True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_fullgraph(backend, soft):
    torch._dynamo.reset()
    case = make(33, 64, 8, 5, soft=soft)
    compiled = torch.compile(functional.ngd_objective, fullgraph=True)
    expected = run(case, backend, grad_output=2.0)
    actual = run(case, backend, grad_output=2.0, compiled=compiled)
    for a, b in zip(actual, expected):
        assert relative(a, b) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step_with_a_network(backend):
    """Gradients flow on into layers that produced features and logits, and batches of another size do too."""
    torch._dynamo.reset()
    device = device_of(backend)
    torch.manual_seed(0)
    body, head = torch.nn.Linear(12, 16, device=device), torch.nn.Linear(16, 8, device=device)
    bank = mapped(make(1, 16), lambda t: t.to(device))

    def total(x, target):
        features = torch.relu(body(x))
        return functional.ngd_objective(
            features,
            head(features),
            target,
            bank["prototypes"],
            bank["prior"],
            margin=1.0,
            geo_weight=0.5,
            backend=backend,
        ).total

    compiled = torch.compile(total, fullgraph=True)
    for rows in (24, 40, 24):
        x, target = torch.randn(rows, 12, device=device), torch.randint(0, 8, (rows,), device=device)
        parameters = [*body.parameters(), *head.parameters()]
        expected = torch.autograd.grad(total(x, target), parameters)
        actual = torch.autograd.grad(compiled(x, target), parameters)
        assert all(relative(a, b) <= 1e-5 for a, b in zip(actual, expected))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_ramp_of_numbers_compiles_at_most_twice(backend):
    """Each new number must not compile again: fullgraph=True raises at Dynamo's limit of 8."""
    torch._dynamo.reset()
    case = make(9, 16)
    compiled = torch.compile(functional.ngd_objective, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for epoch in range(1, 5):
            case["geo_weight"] = 0.1 * epoch
            actual, expected = run(case, backend, compiled=compiled), run(case, backend)
            assert all(relative(a, b) <= 1e-6 for a, b in zip(actual, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_cuda_graph(backend):
    """Captured once, replayed on other values; the ramp is a tensor that the graph reads anew."""
    case = mapped(make(128, geo_weight=torch.tensor(0.5)), lambda t: t.cuda())
    case["features"].requires_grad_()
    case["logits"].requires_grad_()

    def step():
        case["features"].grad = case["logits"].grad = None
        functional.ngd_objective(**case, backend=backend).total.backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        case["features"].add_(0.5)
        case["geo_weight"].fill_(0.25)
    graph.replay()
    captured = case["features"].grad.clone()
    step()
    assert relative(captured, case["features"].grad) <= 1e-6
