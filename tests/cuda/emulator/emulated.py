"""The CUDA kernels on the CPU: compiles csrc/cuda against the emulator, calls the launch functions through ctypes."""

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ngd_fast.objective.settings import NAMES, Settings

HERE = Path(__file__).parent
CSRC = Path(__file__).resolve().parents[3] / "csrc"
TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.float64: 4}
NOTHING = torch.empty(1)
GUARD = 64  # bytes of a fixed pattern around everything that kernels write


class Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int))


#: Of the fields of csrc/settings.h; kd_mode, a word in Python, is a number there.
KINDS = {float: ctypes.c_double, bool: ctypes.c_bool, str: ctypes.c_int}


class Args(ctypes.Structure):
    """ngd_fast::ObjectiveArgs of csrc/cuda/objective_cuda.h, behind the settings that it inherits."""

    _fields_ = (
        [(name, KINDS[type(getattr(Settings(), name))]) for name in NAMES]
        + [("rows", ctypes.c_int64)]
        + [(name, ctypes.c_int) for name in ("dim", "classes", "prototype_count")]
        + [(name, Tensor) for name in ("features", "logits", "teacher_logits", "target_distribution")]
        + [("target", ctypes.c_void_p), ("labels", ctypes.c_void_p)]
        + [(name, Tensor) for name in ("prototypes", "prior", "class_weight", "geo_weight", "class_sums")]
        + [("prior_per_row", ctypes.c_bool), ("high_valence", ctypes.c_uint64)]
        + [("geo_weight_value", ctypes.c_double), ("geo_grad_scale", ctypes.c_double)]
        + [(name, Tensor) for name in ("terms", "grad_features", "grad_logits")]
        + [("workspace", ctypes.c_void_p)]
    )


def describe(tensor):
    if tensor is None:
        return Tensor(None, 0)
    assert tensor.is_contiguous()
    return Tensor(address(tensor), TYPES[tensor.dtype])


def address(tensor):
    """Where a tensor lies; null only where there is none, as in csrc/cuda/objective.cpp."""
    return None if tensor is None else tensor.data_ptr() or NOTHING.data_ptr()


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
    """The ops of ngd_fast._C_cuda, run on the CPU. `repeat`: how often one after the other, with the same buffers."""

    def __init__(self, path):
        self.path = path
        self.library = library = ctypes.CDLL(str(path))
        for function in (library.args_size, library.objective_workspace, library.geo_sums_workspace):
            function.restype = ctypes.c_size_t
        library.faults.restype = ctypes.c_char_p
        assert library.args_size() == ctypes.sizeof(Args)
        self.repeat = 1
        self.machine()

    def machine(
        self, *, multiprocessors=3, max_cluster=16, capability=90, max_shared=227 * 1024, seed=0, compiled=None
    ):
        compiled = capability if compiled is None else compiled
        self.library.set_machine(multiprocessors, max_cluster, capability, max_shared, seed, compiled)

    def objective(
        self, *, features=None, logits=None, target=None, prototypes=None, prior=None, labels=None, teacher_logits=None,
        class_weight=None, geo_weight=None, class_sums=None, num_classes=8, geo_grad_scale=1.0, want_grad=True,
        **options,
    ):  # fmt: skip
        settings = Settings(**{"var_cap": 0.5, "margin": 1.0, **options})
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
            target=address(None if soft else target),
            labels=address(None if geo_weight is None else labels),
            prototypes=describe(prototypes),
            prior=describe(prior),
            class_weight=describe(class_weight),
            geo_weight=describe(geo_weight if is_tensor else None),
            class_sums=describe(class_sums),
            prior_per_row=prior is not None and prior.ndim == 2,
            high_valence=sum(1 << c for c in settings.high_valence),
            **{name: int(v) if name == "kd_mode" else v for name, v in zip(NAMES, settings.packed)},
            geo_weight_value=0.0 if is_tensor or geo_weight is None else geo_weight,
            geo_grad_scale=geo_grad_scale,
            terms=describe(terms.tensor),
            grad_features=describe(grads[0] and grads[0].tensor),
            grad_logits=describe(grads[1] and grads[1].tensor),
        )
        inputs = {
            "features": features, "logits": logits, "teacher_logits": teacher_logits, "target": target,
            "labels": labels, "prototypes": prototypes, "prior": prior, "class_weight": class_weight,
            "geo_weight": geo_weight if is_tensor else None, "class_sums": class_sums,
        }  # fmt: skip
        outputs = {"terms": terms, "grad_features": grads[0], "grad_logits": grads[1]}
        outputs = {key: value and value.tensor for key, value in outputs.items()}
        self.run("objective", args, inputs, outputs, self.library.objective_workspace(ctypes.byref(args)))
        return terms.check(), *(None if grad is None else grad.check() for grad in grads)

    def geo_sums(self, features, labels, num_classes):
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        out = Guarded((num_classes, features.shape[1] + 2), dtype)
        args = Args(
            rows=features.shape[0],
            dim=features.shape[1],
            classes=num_classes,
            features=describe(features),
            labels=address(labels),
            terms=describe(out.tensor),
        )
        inputs = {"features": features, "labels": labels}
        size = self.library.geo_sums_workspace(ctypes.byref(args))
        self.run("geo_sums", args, inputs, {"sums": out.tensor}, size)
        return out.check()

    def scale(self, tensor, factor):
        target, by = describe(tensor), describe(factor)
        self._watch({"tensor": tensor, "factor": factor}, filled=True)
        self._call("scale", ctypes.byref(target), ctypes.c_int64(tensor.numel()), ctypes.byref(by))

    def workspace_bytes(self, **sizes):
        return self.library.objective_workspace(ctypes.byref(Args(**sizes)))

    def run(self, name, args, inputs, outputs, workspace_bytes):
        """Calls a launch function; the tensors by name (or None) are all that its kernels may touch."""
        workspace = Guarded((workspace_bytes,), torch.uint8)
        args.workspace = workspace.tensor.data_ptr()
        self._watch(inputs, filled=True)
        self._watch({**outputs, "workspace": workspace.tensor}, filled=False)
        self._call(name, ctypes.byref(args))
        workspace.check()

    def _watch(self, tensors, filled):
        for name, tensor in tensors.items():
            if tensor is not None:
                size = ctypes.c_size_t(tensor.numel() * tensor.element_size())
                self.library.watch(ctypes.c_void_p(tensor.data_ptr()), size, filled, f"buffer {name}".encode())

    def _call(self, name, *args):
        errors = [getattr(self.library, name)(*args) for _ in range(self.repeat)]
        self.library.forget_buffers()
        faults = self.library.faults().decode()
        assert not faults, re.sub(r"{([0-9a-f]+)}", lambda match: self._line(match[1]), faults)
        assert not any(errors), "the launch was refused"

    def _line(self, offset):
        """Function and line of an offset in the library; the innermost of those inlined."""
        lookup = subprocess.run(["addr2line", "-Cfe", self.path, offset], capture_output=True, text=True)
        function, line, *_ = *lookup.stdout.split("\n"), offset, ""
        return f"{function.split('(')[0]}, {Path(line).name}"


CHECKS = [
    "-g1", "-fsanitize=thread,alignment,bounds,null,shift,signed-integer-overflow,integer-divide-by-zero",
    "--param", "tsan-instrument-func-entry-exit=0", "--param", "tsan-distinguish-volatile=1",
]  # fmt: skip


def compiler_or_skip():
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the kernels for the CPU")
    return compiler


def build(folder, checked):
    """Compiles the kernels for the CPU; `checked`: with a call of emulator/checks.cpp for every load and store."""
    compiler = compiler_or_skip()
    # -fno-thread-jumps: one barrier of the source stays one in the code, by which the emulator tells them apart;
    # without it g++ takes some variables for uninitialized that are not
    flags = ["-std=c++17", "-O1", "-fPIC", "-fno-thread-jumps", "-U_FORTIFY_SOURCE"]
    flags += ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
    kernels = sorted((CSRC / "cuda").glob("*.cu"))

    def compile_one(source):
        target = folder / f"{source.stem}.o"
        include = ["-x", "c++", "-include", HERE / "emulator.h", "-I", CSRC]
        checks = CHECKS if checked and source in kernels else []
        subprocess.run([compiler, *flags, *checks, *include, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*kernels, *sorted(HERE.glob("*.cpp"))]))
    library = folder / "kernels.so"
    subprocess.run([compiler, "-shared", *objects, "-ldl", "-o", library], check=True)
    return Emulator(library)


def make(rows, dim=256, classes=8, prototypes=25, dtype=torch.float32, *, soft=False, prior_rows=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    labels, target = (torch.randint(0, classes, (rows,), generator=generator) for _ in range(2))
    labels[1::5] = -1
    return {
        "features": (3 * normal(rows, dim) + normal(1, dim)).to(dtype),
        "logits": (2 * normal(rows, classes)).to(dtype),
        "target": normal(rows, classes).softmax(1).to(wide) if soft else target,
        "prototypes": (0.3 * normal(prototypes, dim) + normal(1, dim)).to(wide),
        "prior": normal(*((rows, prototypes) if prior_rows else (prototypes,))).softmax(-1).to(wide),
        "labels": labels,
        "teacher_logits": (2 * normal(rows, classes)).to(dtype),
        "class_weight": (normal(classes).abs() + 0.5).to(wide),
        "geo_weight": 0.05,
    }
