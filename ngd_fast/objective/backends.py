"""Which backends are there, why one is not, and which one a call takes.

The extensions are tried once, when this module is imported; Triton only when it is asked for, because importing it
is slow.
"""

import functools
import importlib
import importlib.util
import os

import numpy
import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

NAMES = ("reference", "cpu", "triton", "cuda")
#: What the CUDA and Triton kernels are compiled for; the C++ backend has no such limits.
MAX_DIM, MAX_CLASSES, MAX_PROTOTYPES = 2048, 64, 256


def _mismatch() -> str:
    """Why the built extensions do not belong to the running PyTorch; empty where they do."""
    try:
        info = importlib.import_module("ngd_fast._build_info")
    except ImportError:
        return "the extensions are not built; run: pip install --no-build-isolation ."
    built, running = (version.split("+")[0].split(".")[:2] for version in (info.TORCH_VERSION, torch.__version__))
    if built != running:
        return (
            f"built with PyTorch {info.TORCH_VERSION}, but {torch.__version__} is running; "
            "build again in its folder: pip install --no-build-isolation --force-reinstall --no-deps ."
        )
    return ""


def _load_cpu() -> str:
    reason = _mismatch()
    if reason:
        return reason
    try:
        extension = importlib.import_module("ngd_fast._C")  # registers the operators; needs torch, imported above
    except ImportError as error:
        return f"ngd_fast._C does not load: {error}"
    if not all(hasattr(torch.ops.ngd_fast, name) for name in ("objective", "stem_fwd")):
        return "ngd_fast._C is older than this source; build again: pip install --no-build-isolation ."
    try:
        extension.instruction_set()
    except ValueError as error:  # the environment asks for one that this machine lacks
        return str(error)
    return ""


def _load_cuda(why_not_cpu: str) -> str:
    if why_not_cpu:
        return why_not_cpu
    info = importlib.import_module("ngd_fast._build_info")
    if info.WHY_NO_CUDA:
        return f"not built: {info.WHY_NO_CUDA}"
    if torch.version.cuda != info.CUDA_VERSION:
        return f"built for CUDA {info.CUDA_VERSION}, but the running PyTorch is for CUDA {torch.version.cuda}"
    try:
        importlib.import_module("ngd_fast._C_cuda")
    except ImportError as error:
        return f"ngd_fast._C_cuda does not load: {error}"
    return ""


_CPU = _load_cpu()
_CUDA = _load_cuda(_CPU)


@functools.cache
def _load_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'ngd-fast[triton]'"
    try:
        importlib.import_module("ngd_fast.objective.triton_ops")
    except Exception as error:  # a broken Triton raises all sorts of errors on import
        return f"Triton does not load: {type(error).__name__}: {error}"
    return ""


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def why_not_interpret() -> str:
    """Why Triton's interpreter cannot run the kernels, in one line; empty where it can, or where there is no Triton.

    Triton before 3.7 takes a loop's bounds with ``int()`` from arrays of one dimension, which NumPy 2.4 refuses.
    """
    if _load_triton():
        return ""
    triton = importlib.import_module("triton").__version__
    if _release(triton) >= (3, 7) or _release(numpy.__version__) < (2, 4):
        return ""
    return (
        f"Triton {triton} cannot interpret kernels beside NumPy {numpy.__version__}; "
        "take Triton 3.7 or NumPy 2.3 for that (compiled kernels are not affected)"
    )


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def why_not(name: str) -> str:
    """Why backend ``name`` cannot run on this machine, in one line; empty where it can."""
    if torch.compiler.is_compiling():
        from ngd_fast.objective import traced  # imports torch._dynamo, a second that eager users need not wait

        return traced.why_not(name)
    return find_why_not(name)


def find_why_not(name: str) -> str:
    """What ``why_not`` answers, in code that Dynamo cannot trace."""
    if name not in NAMES:
        raise ValueError(f"backend: wanted one of {', '.join(NAMES)} or None, got {name!r}")
    if name == "reference":
        return ""
    if name == "cpu":
        return _CPU
    reason = _CUDA if name == "cuda" else _load_triton()
    if reason:
        return reason
    if name == "triton" and interpreting():
        return why_not_interpret()
    if not torch.cuda.is_available():
        return "no CUDA device is visible" + (" (TRITON_INTERPRET=1 runs it on the CPU)" if name == "triton" else "")
    return _too_old()


@functools.cache
def _too_old() -> str:
    """Whether the GPU has the instructions that the kernels are written in: bfloat16 and TF32 on tensor cores."""
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"needs a GPU of compute capability 8.0 or later, this one has {major}.{minor}"


def available() -> tuple[str, ...]:
    """The backends that can run on this machine, the fastest first."""
    return tuple(name for name in reversed(NAMES) if not why_not(name))


def _unfit(
    name: str,
    features: Tensor | None,
    logits: Tensor | None,
    constants: tuple[Tensor | None, ...],
    num_prototypes: int,
    num_classes: int,
) -> str:
    """Why a backend cannot take these tensors; empty where it can."""
    device = (features if features is not None else logits).device.type
    if name == "cpu" and device != "cpu":
        return f"takes CPU tensors, got {device}"
    if name == "cuda" and device != "cuda":
        return f"takes CUDA tensors, got {device}"
    if name == "triton":
        if device != "cuda" and not (device == "cpu" and interpreting()):
            return f"takes CUDA tensors, got {device}"
        if any(t is not None and t.dtype == torch.float64 for t in (features, logits)):
            return "has no float64"
    if name in ("triton", "cuda"):
        dim = 0 if features is None else features.shape[1]
        for what, size, limit in (
            ("features: D", dim, MAX_DIM),
            ("classes: C", num_classes, MAX_CLASSES),
            ("prototypes: K", num_prototypes, MAX_PROTOTYPES),
        ):
            if size > limit:
                return f"{what} = {size} is above its limit of {limit}"
    if forward_ad._current_level >= 0:
        return "has no forward-mode derivative (take backend='reference')"
    if not torch.compiler.is_compiling():  # Dynamo does not know the question
        transforms = _functorch.get_interpreter_stack() or ()
        if any(transform.key() == _functorch.TransformType.Grad for transform in transforms):
            return "has no derivative by torch.func (take backend='reference')"
    if torch.is_grad_enabled():
        for what, tensor in zip(
            ("target", "prototypes", "prior", "teacher_logits", "class_weight", "geo_weight"), constants
        ):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return f"has no gradient by {what} (detach it, or take backend='reference')"
    return ""


def choose(
    backend: str | None,
    features: Tensor | None,
    logits: Tensor | None,
    target: Tensor | None,
    prototypes: Tensor | None,
    prior: Tensor | None,
    teacher_logits: Tensor | None,
    class_weight: Tensor | None,
    geo_weight: Tensor | float | None,
    num_classes: int,
) -> str:
    """The backend of a call: the one named, or else the fastest that is there and takes these tensors.

    Raises ValueError for an unknown name, RuntimeError for a named backend that is not there or does not fit.
    """
    constants = (target, prototypes, prior, teacher_logits, class_weight, geo_weight)
    num_prototypes = 0 if prototypes is None else prototypes.shape[0]
    if backend is None:
        device = (features if features is not None else logits).device.type
        for name in ("cpu",) if device == "cpu" else ("cuda", "triton") if device == "cuda" else ():
            if not why_not(name) and not _unfit(name, features, logits, constants, num_prototypes, num_classes):
                return name
        return "reference"
    reason = why_not(backend)
    if reason:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    if backend != "reference":
        reason = _unfit(backend, features, logits, constants, num_prototypes, num_classes)
        if reason:
            raise RuntimeError(f"backend {backend!r} cannot do this: {reason}")
    return backend
