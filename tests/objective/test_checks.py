"""Bad arguments: the name, what came, what was wanted. And backends that are not there."""

import cases
import pytest
import torch

from ngd_fast.objective import backends, choice, functional

B, D, C, K = 6, 16, 4, 5


def call(backend=None, **changes):
    return functional.ngd_objective(**{**cases.make(B, D, C, K), **changes}, backend=backend)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(B)}, ValueError, r"logits: wanted shape \[B, C\], got \[6\]"),
        ({"logits": [1.0]}, TypeError, "logits: wanted a tensor, got list"),
        ({"logits": torch.zeros(B, C, dtype=torch.int32)}, TypeError, "logits: wanted float32.* got int32"),
        ({"features": torch.zeros(B + 1, D)}, ValueError, r"features: wanted shape \[6, D\], got \[7, 16\]"),
        ({"features": None}, ValueError, "features: None, but"),
        ({"target": torch.zeros(B)}, TypeError, "target: wanted int64 class indices, got float32"),
        ({"target": torch.zeros(B, dtype=torch.int32)}, TypeError, "target: wanted int64 class indices, got int32"),
        ({"target": torch.zeros(B, C + 1)}, ValueError, r"target: wanted shape \[6, 4\], got \[6, 5\]"),
        ({"target": torch.zeros(B + 2, dtype=torch.int64)}, ValueError, r"target: wanted shape \[6\], got \[8\]"),
        ({"labels": torch.zeros(B, 1, dtype=torch.int64)}, ValueError, r"labels: wanted shape \[6\]"),
        ({"prototypes": torch.zeros(K, D + 1)}, ValueError, r"prototypes: wanted shape \[K, 16\], got \[5, 17\]"),
        ({"prototypes": torch.zeros(0, D)}, ValueError, "prototypes: wanted at least one"),
        ({"prior": torch.zeros(K + 1)}, ValueError, r"prior: wanted shape \[5\] or \[6, 5\], got \[6\]"),
        ({"prior": None}, ValueError, "prior: wanted .* got None"),
        ({"teacher_logits": torch.zeros(B, C + 1)}, ValueError, r"teacher_logits: wanted shape \[6, 4\]"),
        ({"class_weight": torch.zeros(C - 1)}, ValueError, r"class_weight: wanted shape \[4\], got \[3\]"),
        ({"geo_weight": torch.zeros(1)}, ValueError, r"geo_weight: wanted shape \[\], got \[1\]"),
        ({"geo_weight": "0.1"}, TypeError, "geo_weight: wanted a number, got str"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: wanted a number from 0 to 1, got 1.5"),
        ({"kd_temperature": 0.0}, ValueError, "kd_temperature: wanted a number above 0, got 0.0"),
        ({"proto_temperature": -1}, ValueError, "proto_temperature: wanted a number above 0, got -1"),
        ({"kd_weight": float("nan")}, ValueError, "kd_weight: wanted a finite number, got nan"),
        ({"kd_mode": "mae"}, ValueError, "kd_mode: wanted 'mse' or 'kl' or 'logitstd' or 'dkd' or 'dist', got 'mae'"),
        ({"high_valence": (1, 4)}, ValueError, "high_valence: wanted classes from 0 to 3, got 4"),
        ({"high_valence": (1, 1)}, ValueError, "high_valence: wanted different classes"),
        ({"high_valence": (1.0,)}, TypeError, "high_valence: wanted class indices"),
        ({"high_valence": 1}, TypeError, "high_valence: wanted a list or tuple of class indices, got int"),
        ({"prototypes": None}, ValueError, "prior: wanted None without prototypes"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


TENSORS = ("features", "target", "prototypes", "prior", "labels", "teacher_logits", "class_weight", "geo_weight")


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_on_another_device_is_named(name):
    case = cases.make(B, D, C, K, geo_weight=torch.tensor(0.5), labels=torch.zeros(B, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"{name}: wanted a tensor on cpu as the others, got one on meta"):
        functional.ngd_objective(**{**case, name: case[name].to("meta")})


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["target", "labels"])
@pytest.mark.parametrize("value", [4, -2, 2**40, -(2**63)])
def test_class_out_of_range(backend, name, value):
    if reason := backends.why_not(backend):
        pytest.skip(reason)
    indices = torch.zeros(B, dtype=torch.int64)
    indices[3] = value
    with pytest.raises(IndexError, match=name):
        call(backend, **{"target": torch.zeros(B, dtype=torch.int64), name: indices})


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize("name", ["target", "labels"])
def test_class_out_of_range_on_a_gpu_is_nan(backend, name):
    case = cases.make(B, D, C, K, labels=torch.zeros(B, dtype=torch.int64))
    case[name] = torch.tensor([0, 1, 2, 9, -7, 2**40])
    # The reference runs where its tensors are; on the CPU it raises.
    result = cases.run(cases.mapped(case, lambda t: t.cuda()), backend)
    assert result.terms[0].isnan() and result.features.isfinite().all() and result.logits.isfinite().all()


def test_operators_called_directly_check_too():
    if reason := backends.why_not("cpu"):
        pytest.skip(reason)
    features, labels = torch.zeros(B, D), torch.zeros(B, dtype=torch.int64)
    with pytest.raises(ValueError, match="labels: wanted shape"):
        torch.ops.ngd_fast.geo_sums(features, labels[:-1], C)
    with pytest.raises(TypeError, match="features: wanted float32"):
        torch.ops.ngd_fast.geo_sums(features.int(), labels, C)
    with pytest.raises(IndexError, match="labels"):
        torch.ops.ngd_fast.geo_sums(features, labels + C, C)


@pytest.mark.gpu
def test_operators_called_directly_name_a_tensor_on_the_cpu():
    """One tensor on the GPU is enough for the dispatcher to choose its kernel."""
    features, labels = torch.zeros(B, D), torch.zeros(B, dtype=torch.int64)
    with pytest.raises(ValueError, match="features: wanted a tensor on a GPU as the others, got one on cpu"):
        torch.ops.ngd_fast.geo_sums(features, labels.cuda(), C)
    with pytest.raises(ValueError, match="labels: wanted a tensor on cuda:0, got one on cpu"):
        torch.ops.ngd_fast.geo_sums(features.cuda(), labels, C)
    with pytest.raises(ValueError, match="gradient: wanted a tensor on a GPU as the others, got one on cpu"):
        torch.ops.ngd_fast.scale_(features, torch.ones((), device="cuda"))


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: wanted one of reference, cpu, triton, cuda"):
        call("fast")


def test_missing_backend_says_why(monkeypatch):
    monkeypatch.setattr(backends, "_CPU", "built with PyTorch 2.8.0, but 2.9.0 is running")
    with pytest.raises(RuntimeError, match=r"'cpu' is not available: built with PyTorch 2.8.0"):
        call("cpu")
    assert torch.equal(call().total, call("reference").total)
    assert "cpu" not in backends.available()


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_gpu_that_is_too_old(monkeypatch, name):
    """A launch there fails with "no kernel image", where backend=None must take the reference."""
    monkeypatch.setattr(backends, "_CUDA", "")
    monkeypatch.setattr(backends, "_load_triton", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, reason in (
        ((7, 5), "needs a GPU of compute capability 8.0 or later, this one has 7.5"),
        ((8, 0), ""),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        backends._too_old.cache_clear()
        assert backends.why_not(name) == reason
    backends._too_old.cache_clear()


def test_a_backend_for_another_device_says_so():
    for name in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=f"backend '{name}'"):
            call(name)


def test_no_backend_named_takes_a_fused_one():
    if reason := backends.why_not("cpu"):
        pytest.skip(reason)
    assert choice.choose(None, choice.Inputs(*(torch.zeros(2, 3),) * 2), 3) == "cpu"
    assert backends.available()[-1] == "reference"


def test_versions_that_differ(monkeypatch):
    info = pytest.importorskip("ngd_fast._build_info")
    monkeypatch.setattr(info, "TORCH_VERSION", "1.13.0+cpu")
    assert "built with PyTorch 1.13.0+cpu" in backends._load_cpu()


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "interprets"),
    [("3.4.0", "2.4.0", False), ("3.6.0", "2.4.6", False), ("3.6.0+git1", "2.5.0rc1", False)]
    + [("3.6.0", "2.3.5", True), ("3.4.0", "1.26.4", True), ("3.7.0", "2.4.0", True), ("3.10.0", "3.0", True)],
)
def test_an_interpreter_that_cannot_run_beside_this_numpy(monkeypatch, triton_version, numpy_version, interprets):
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", triton_version)
    monkeypatch.setattr("numpy.__version__", numpy_version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends.why_not_interpret.cache_clear()
    try:
        assert (backends.why_not("triton") == "") is interprets
        assert interprets or f"Triton {triton_version} cannot interpret" in backends.why_not("triton")
        # Kernels that are compiled are not concerned.
        monkeypatch.delenv("TRITON_INTERPRET")
        assert "interpret kernels" not in backends.why_not("triton")
    finally:
        backends.why_not_interpret.cache_clear()
