"""The CUDA backend on a GPU: what the emulator cannot show. Values of every case are checked in test_kernels.py."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from ngd_fast import functional
from ngd_fast.objective import backends

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _cuda_backend():
    reason = backends.why_not("cuda")
    assert not reason, reason  # a machine with a GPU must have it: a skip here would hide a broken build


def make(rows, dtype=torch.float32, dim=256, classes=8, prototypes=25, device="cuda", seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = {
        "features": normal(rows, dim).to(dtype),
        "logits": (2 * normal(rows, classes)).to(dtype),
        "target": torch.randint(0, classes, (rows,), generator=generator),
        "prototypes": (normal(prototypes, dim) + normal(1, dim)).to(wide),
        "prior": normal(prototypes).softmax(0).to(wide),
        "teacher_logits": (2 * normal(rows, classes)).to(dtype),
        "class_weight": (normal(classes).abs() + 0.5).to(wide),
    }
    return {name: tensor.to(device) for name, tensor in case.items()}


def run(case, backend="cuda", upstream=1.0, **options):
    """The terms, and the gradients by features and logits."""
    leaves = [case[name].detach().clone().requires_grad_() for name in ("features", "logits")]
    given = {**case, "features": leaves[0], "logits": leaves[1]}
    out = functional.ngd_objective(**given, margin=1.0, backend=backend, **options)
    return torch.stack([term.detach() for term in out]), *torch.autograd.grad(out.total * upstream, leaves)


def truth(case, **options):
    wide = {name: t.double() if t.is_floating_point() else t for name, t in case.items()}
    return run(wide, "reference", **options)


def error(got, want):
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 31, 128, 256, 257, 1024, 16_384, 262_144])  # 256: the last that one cluster takes
def test_values_and_gradients(rows, dtype):
    case = make(rows, dtype)
    got, want = run(case), truth(case)
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got[0].double(), want[0], rtol=max(1e-5, 0.1 * tolerance), atol=1e-6)
    for mine, exact in zip(got[1:], want[1:]):
        # gradients of a mean over many rows lie below float16's normal numbers, where it has few digits
        below_normal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * exact.numel() ** 0.5
        assert (mine.double() - exact).norm() < tolerance * exact.norm() + below_normal


@pytest.mark.parametrize(("dim", "classes", "prototypes"), [(40, 5, 7), (2048, 64, 256), (257, 9, 33)])
def test_other_shapes(dim, classes, prototypes):
    case = make(700, dim=dim, classes=classes, prototypes=prototypes)
    got, want = run(case), truth(case)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
    assert error(got[1], want[1]) < 1e-5
    assert error(got[2], want[2]) < 1e-5


def test_gradcheck():
    case = make(6, torch.float64, dim=5, classes=3, prototypes=4)

    def total(features, logits):
        given = {**case, "features": features, "logits": logits}
        return functional.ngd_objective(**given, margin=1.0, geo_weight=0.5, backend="cuda").total

    assert torch.autograd.gradcheck(total, [case[name].requires_grad_() for name in ("features", "logits")])


def test_upstream_gradient_and_strides():
    case = make(200)
    base = run(case)
    for a, b in zip(run(case, upstream=-3.0)[1:], base[1:]):
        torch.testing.assert_close(a, -3 * b, rtol=1e-6, atol=0)
    strided = dict(case)
    strided["features"] = torch.cat([case["features"]] * 2, 1)[:, ::2]
    strided["logits"] = case["logits"].t().contiguous().t()
    contiguous = {name: tensor.contiguous() for name, tensor in strided.items()}
    for a, b in zip(run(strided), run(contiguous)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("rows", "dtype"), [(128, torch.float32), (5000, torch.float32), (16_384, torch.bfloat16)])
def test_same_bits_each_time(rows, dtype):
    case = make(rows, dtype)
    first = run(case)
    for _ in range(20):
        for a, b in zip(run(case), first):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("rows", "dtype"), [(128, torch.float32), (16_384, torch.bfloat16)])
def test_graph_follows_its_inputs(rows, dtype):
    static, geo_weight = make(rows, dtype), torch.tensor(0.0, device="cuda")
    leaves = [static[name].requires_grad_() for name in ("features", "logits")]

    def step():
        total = functional.ngd_objective(**static, geo_weight=geo_weight, margin=1.0, backend="cuda").total
        return total.detach(), *torch.autograd.grad(total, leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed, weight in ((1, 0.012), (2, 0.5)):
        fresh = make(rows, dtype, seed=seed)
        with torch.no_grad():
            for name, tensor in fresh.items():
                static[name].copy_(tensor)
            geo_weight.fill_(weight)
        graph.replay()
        terms, *grads = run(fresh, geo_weight=torch.tensor(weight, device="cuda"))
        assert torch.equal(captured[0], terms[0])
        for a, b in zip(captured[1:], grads):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [128, 20_000])
def test_side_streams(rows):
    cases = [make(rows, seed=seed) for seed in range(4)]
    want = [run(case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(5):
        got = []
        for stream, case in zip(streams, cases):
            with torch.cuda.stream(stream):
                got.append(run(case))
        torch.cuda.synchronize()
        for mine, theirs in zip(got, want):
            for a, b in zip(mine, theirs):
                assert torch.equal(a, b)


def test_asks_the_device_nothing():
    case = make(300)
    run(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    for rows in (128, 5000):
        case = make(rows, device="cuda:1")
        with torch.cuda.device(0):
            got = run(case)
        for a, b in zip(got, run({name: tensor.to("cuda:0") for name, tensor in case.items()})):
            assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu())


def test_memory_beyond_the_gradients():
    case = make(262_144, torch.bfloat16)
    inputs = [case[name].requires_grad_() for name in ("features", "logits")]
    functional.ngd_objective(**case, backend="cuda").total.backward()
    for leaf in inputs:
        leaf.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    functional.ngd_objective(**case, backend="cuda").total.backward()
    gradients = sum(leaf.grad.numel() * leaf.grad.element_size() for leaf in inputs)
    assert torch.cuda.max_memory_allocated() - before - gradients < 1_000_000


def test_index_out_of_range():
    for rows in (64, 3000):
        case = make(rows)
        case["target"][5] = 8
        terms, *_ = run(case)
        assert terms[0].isnan() and terms[1].isnan()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool, repository):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        pytest.skip("compute-sanitizer not found")
    script = (
        "import torch; from tests.cuda.test_gpu import make, run\n"
        "for rows, dtype in ((37, torch.float32), (128, torch.bfloat16), (1100, torch.float32), (1100, torch.half)):\n"
        "    run(make(rows, dtype)); run(make(rows, dtype, dim=72))\n"
        "torch.cuda.synchronize()"
    )
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=280)
    text = result.stdout + result.stderr
    if "not supported" in text:
        pytest.skip(f"compute-sanitizer {tool} does not work on this machine")
    assert result.returncode == 0, text[-3000:]
