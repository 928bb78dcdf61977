"""The Triton objective against the float64 reference: in the interpreter on the CPU, and compiled on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ngd_fast.objective import backends, reference

HERE = Path(__file__).parent


def _load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _load("objective_cases")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """name -> (terms, grad_features, grad_logits) of every case, computed in one process that interprets Triton."""
    pytest.importorskip("triton")
    if reason := backends.why_not_interpret():
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("interpreted") / "results.pt"
    done = subprocess.run(
        [sys.executable, HERE / "run_interpreted.py", out], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def on_gpu():
    from ngd_fast.kernels import objective

    def compute(case, **how):
        tensors, options = cases.arguments(**case)
        # Strides survive .to(), so strided and broadcast rows reach the kernel as they are.
        tensors = {name: None if tensor is None else tensor.to("cuda") for name, tensor in tensors.items()}
        return [result.cpu() for result in cases.call(objective.objective_fwd, tensors, options, **how)]

    return compute


def expected(case, dtype=torch.float64):
    """(terms, grad_features, grad_logits) by the reference, inputs converted to ``dtype`` (None: as they are)."""
    tensors, options = cases.arguments(**case)
    if dtype:
        tensors = {k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in tensors.items()}
    leaves = [tensors[name].requires_grad_() for name in ("features", "logits") if tensors[name] is not None]
    geo_weight = case.get("geo_weight", cases.OPTIONS["geo_weight"])
    inputs = (*(tensors[name] for name in cases.TENSORS), geo_weight)
    terms = reference.objective(*inputs, num_classes=options["num_classes"], settings=cases.settings(options))
    grads = iter(torch.autograd.grad(terms.total, leaves, allow_unused=True))
    grads = [None if tensors[name] is None else next(grads) for name in ("features", "logits")]
    return torch.stack(terms).detach(), *grads


def error(got, want):
    """Relative error of a vector; absolute where the vector is 0."""
    norm = want.double().norm()
    difference = (got.double() - want.double()).norm()
    return (difference / norm if norm > 0 else difference).item()


def check(got, case, *, store_factor):
    terms, *grads = got
    want_terms, *want_grads = expected(case)
    torch.testing.assert_close(terms.double(), want_terms, rtol=1e-5, atol=1e-6)
    plain = expected(case, None)[1:] if case.get("dtype") else want_grads
    for name, grad, want, rounded in zip(("features", "logits"), grads, want_grads, plain):
        if want is None:
            assert grad.numel() == 0 or not grad.any(), name
            continue
        want = want.nan_to_num(0.0)  # autograd's gradient of a NaN row that is left out is 0 * NaN; the kernel's is 0
        limit = 1e-5 if "dtype" not in case else max(1e-5, store_factor * error(rounded, want))
        assert error(grad, want) <= limit, name


def check_nan(got, case):
    """NaN terms where the reference has them; and where the inputs have no NaN, its gradients."""
    terms, *grads = got
    want_terms, *want_grads = expected(case)
    assert terms[0].isnan()
    torch.testing.assert_close(terms.double(), want_terms, rtol=1e-5, atol=1e-6, equal_nan=True)
    for grad, want in zip(grads, want_grads):
        if want_terms[3].isnan() and len(want):
            continue
        torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("name", cases.CASES)
def test_values_and_gradients(interpreted, name):
    # The interpreter truncates to bfloat16 where hardware rounds: twice the error, and 3 leaves room for chance.
    check(interpreted[name], cases.CASES[name], store_factor=3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CASES)
def test_values_and_gradients_gpu(on_gpu, name):
    check(on_gpu(cases.CASES[name]), cases.CASES[name], store_factor=2)


@pytest.mark.parametrize("name", cases.NAN_CASES)
def test_total_is_nan(interpreted, name):
    check_nan(interpreted[name], cases.NAN_CASES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.NAN_CASES)
def test_total_is_nan_gpu(on_gpu, name):
    check_nan(on_gpu(cases.NAN_CASES[name]), cases.NAN_CASES[name])


@pytest.mark.parametrize("B", [37, 300])
def test_options_of_the_operator(interpreted, B):
    """B = 37 is one launch, B = 300 three."""
    tensors, options = cases.arguments(B=B)
    plain = interpreted[f"again {B}"]
    # A weight on the device replaces the number, bit for bit.
    for a, b in zip(plain, interpreted[f"device weight {B}"]):
        assert torch.equal(a, b)
    # The class sums are those of the reference, and giving them changes nothing.
    sums = interpreted[f"sums {B}"]
    want = reference.geo_sums(tensors["features"].double(), tensors["labels"], 8)
    torch.testing.assert_close(sums.double(), want, rtol=1e-6, atol=1e-5)
    for a, b in zip(plain, interpreted[f"given sums {B}"]):
        assert error(b, a) < 1e-6
    # grad_scale multiplies D-Geo's gradient and nothing else.
    doubled = expected(dict(B=B, geo_weight=2 * options["geo_weight"]))
    assert error(interpreted[f"grad scale {B}"][1], doubled[1]) < 1e-5
    assert torch.equal(interpreted[f"grad scale {B}"][0], plain[0])
    # Gradients that nobody wants are not made; the values are the same.
    terms, *grads = interpreted[f"no gradients {B}"]
    assert torch.equal(terms, plain[0]) and all(grad.shape == (0,) for grad in grads)
    # Scaling in place; by 1 it leaves every bit.
    assert torch.equal(interpreted[f"scaled by 1.0 {B}"], tensors["features"])
    torch.testing.assert_close(interpreted[f"scaled by 0.3 {B}"], tensors["features"] * 0.3)


def test_autograd(interpreted):
    """Gradients are scaled once; a second backward pass, which computes again, refuses inputs that have changed."""
    for actual, once in zip(interpreted["by autograd"], interpreted["again 37"][1:]):
        torch.testing.assert_close(actual, 2 * once)
    assert "modified by an inplace operation" in interpreted["refusal"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("B", "dtype"),
    [(128, torch.float32), (5000, torch.bfloat16), (262_144, torch.bfloat16), (100_003, torch.float32)],
    ids=["one launch", "one tile a program", "persistent grid", "odd"],
)
def test_same_bits_every_run(on_gpu, B, dtype):
    """Which program ends last differs from run to run; what it adds must not."""
    case = dict(B=B, dtype=dtype)
    first = on_gpu(case)
    for _ in range(10):
        for a, b in zip(first, on_gpu(case)):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_workspace_is_small():
    """At B=262,144 the call allocates the gradients and less than 1 MB more."""
    from ngd_fast.kernels import objective

    tensors, options = cases.arguments(B=1024, dtype=torch.bfloat16)
    tensors = {k: v.cuda() for k, v in tensors.items()}
    for name in ("features", "logits", "target", "labels", "teacher_logits"):
        tensors[name] = tensors[name].repeat(256, *[1] * (tensors[name].dim() - 1))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, grad_x, grad_z = cases.call(objective.objective_fwd, tensors, options)
    gradients = grad_x.nbytes + grad_z.nbytes
    assert torch.cuda.max_memory_allocated() - before - gradients < 1_000_000


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_refuses_other_types(dtype):
    objective = pytest.importorskip("ngd_fast.kernels.objective")
    tensors, options = cases.arguments()
    tensors["features"] = tensors["features"].to(dtype)
    with pytest.raises(TypeError, match="features: the triton backend takes"):
        cases.call(objective.objective_fwd, tensors, options)


def test_interpreter_is_off_in_this_process():
    """Only the subprocess interprets; other folders' tests see Triton as it is."""
    assert "TRITON_INTERPRET" not in os.environ
