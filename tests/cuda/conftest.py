"""The CUDA kernels on the CPU: compiles csrc/cuda against the emulator, calls the launch functions through ctypes."""

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent / "emulator"
CSRC = Path(__file__).resolve().parents[2] / "csrc"
TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.float64: 4}
GUARD = 64  # bytes of a fixed pattern around everything that kernels write


class Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int))


class Args(ctypes.Structure):
    """ngd_fast::ObjectiveArgs of csrc/cuda/objective_cuda.h."""

    _fields_ = (
        [("rows", ctypes.c_int64), ("dim", ctypes.c_int), ("classes", ctypes.c_int), ("prototype_count", ctypes.c_int)]
        + [(name, Tensor) for name in ("features", "logits", "teacher_logits", "target_distribution")]
        + [("target", ctypes.c_void_p), ("labels", ctypes.c_void_p)]
        + [(name, Tensor) for name in ("prototypes", "prior", "class_weight", "geo_weight", "class_sums")]
        + [("prior_per_row", ctypes.c_bool), ("high_valence", ctypes.c_uint64)]
        + [(name, ctypes.c_double) for name in ("label_smoothing", "kd_weight", "kd_temperature")]
        + [("kd_is_kl", ctypes.c_bool), ("kd_scale_by_t2", ctypes.c_bool)]
        + [(name, ctypes.c_double) for name in ("proto_weight", "proto_temperature", "geo_weight_value", "var_cap")]
        + [(name, ctypes.c_double) for name in ("margin", "var_weight", "margin_weight", "geo_grad_scale")]
        + [(name, Tensor) for name in ("terms", "grad_features", "grad_logits")]
        + [("workspace", ctypes.c_void_p)]
    )


def describe(tensor):
    if tensor is None:
        return Tensor(None, 0)
    assert tensor.is_contiguous()
    return Tensor(tensor.data_ptr(), TYPES[tensor.dtype])


class Guarded:
    """A tensor of NaN (all bits set) between guards that must stay as they are."""

    def __init__(self, shape, dtype):
        count = int(torch.Size(shape).numel()) * dtype.itemsize
        self.bytes = torch.full((count + 2 * GUARD,), 255, dtype=torch.uint8)
        self.tensor = self.bytes[GUARD : GUARD + count].view(dtype).view(shape)

    def check(self):
        assert (self.bytes[:GUARD] == 255).all(), "a kernel wrote before its output"
        assert (self.bytes[-GUARD:] == 255).all(), "a kernel wrote beyond its output"
        return self.tensor


class Emulator:
    """The ops of ngd_fast._C_cuda, run on the CPU."""

    def __init__(self, library):
        self.library = library
        for function in (library.args_size, library.objective_workspace, library.geo_sums_workspace):
            function.restype = ctypes.c_size_t
        assert library.args_size() == ctypes.sizeof(Args)
        self.machine()

    def machine(self, *, multiprocessors=3, max_cluster=16, capability=90, max_shared=227 * 1024, seed=0):
        self.library.set_machine(multiprocessors, max_cluster, capability, max_shared, seed)

    def objective(
        self, *, features=None, logits=None, target=None, prototypes=None, prior=None, labels=None, teacher_logits=None,
        class_weight=None, geo_weight=None, class_sums=None, num_classes=8, high_valence=(1, 2), label_smoothing=0.055,
        kd_weight=0.3, kd_temperature=5.0, kd_mode="mse", kd_scale_by_t2=False, proto_weight=0.12,
        proto_temperature=0.9, var_cap=0.5, margin=1.0, var_weight=1.0, margin_weight=1.0, geo_grad_scale=1.0,
        want_grad=True,
    ):  # fmt: skip
        any_input = features if features is not None else logits
        exact = any_input.dtype == torch.float64
        is_tensor = isinstance(geo_weight, torch.Tensor)
        soft = target is not None and target.is_floating_point()
        terms = Guarded((6,), torch.float64 if exact else torch.float32)
        grads = [Guarded(t.shape, t.dtype) if want_grad and t is not None else None for t in (features, logits)]
        args = Args(
            rows=any_input.shape[0],
            dim=0 if features is None else features.shape[1],
            classes=num_classes,
            prototype_count=0 if prototypes is None else prototypes.shape[0],
            features=describe(features),
            logits=describe(logits),
            teacher_logits=describe(teacher_logits),
            target_distribution=describe(target if soft else None),
            target=None if soft or target is None else target.data_ptr(),
            labels=None if labels is None or geo_weight is None else labels.data_ptr(),
            prototypes=describe(prototypes),
            prior=describe(prior),
            class_weight=describe(class_weight),
            geo_weight=describe(geo_weight if is_tensor else None),
            class_sums=describe(class_sums),
            prior_per_row=prior is not None and prior.ndim == 2,
            high_valence=sum(1 << c for c in high_valence),
            label_smoothing=label_smoothing,
            kd_weight=kd_weight,
            kd_temperature=kd_temperature,
            kd_is_kl=kd_mode == "kl",
            kd_scale_by_t2=kd_scale_by_t2,
            proto_weight=proto_weight,
            proto_temperature=proto_temperature,
            geo_weight_value=0.0 if is_tensor or geo_weight is None else geo_weight,
            var_cap=var_cap,
            margin=margin,
            var_weight=var_weight,
            margin_weight=margin_weight,
            geo_grad_scale=geo_grad_scale,
            terms=describe(terms.tensor),
            grad_features=describe(grads[0] and grads[0].tensor),
            grad_logits=describe(grads[1] and grads[1].tensor),
        )
        self._run("objective", args)
        return terms.check(), *(None if grad is None else grad.check() for grad in grads)

    def geo_sums(self, features, labels, num_classes):
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        out = Guarded((num_classes, features.shape[1] + 2), dtype)
        args = Args(
            rows=features.shape[0],
            dim=features.shape[1],
            classes=num_classes,
            features=describe(features),
            labels=labels.data_ptr(),
            terms=describe(out.tensor),
        )
        self._run("geo_sums", args)
        return out.check()

    def scale(self, tensor, factor):
        target, by = describe(tensor), describe(factor)
        assert self.library.scale(ctypes.byref(target), ctypes.c_int64(tensor.numel()), ctypes.byref(by)) == 0

    def workspace_bytes(self, **sizes):
        return self.library.objective_workspace(ctypes.byref(Args(**sizes)))

    def _run(self, name, args):
        workspace = Guarded((getattr(self.library, f"{name}_workspace")(ctypes.byref(args)),), torch.uint8)
        args.workspace = workspace.tensor.data_ptr()
        assert getattr(self.library, name)(ctypes.byref(args)) == 0, "the launch was refused"
        workspace.check()


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the kernels for the CPU")
    build = tmp_path_factory.mktemp("emulator")
    flags = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Werror", "-Wno-unknown-pragmas"]

    def compile_one(source):
        target = build / f"{source.stem}.o"
        include = ["-x", "c++", "-include", HERE / "emulator.h", "-I", CSRC]
        subprocess.run([compiler, *flags, *include, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "bridge.cpp"]))
    library = build / "kernels.so"
    subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
    return Emulator(ctypes.CDLL(str(library)))
