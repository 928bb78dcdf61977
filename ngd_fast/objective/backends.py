"""Which backends are there, and why one is not. Which one a call takes: ``choice``.

The extensions are tried once, when this module is imported; Triton only when it is asked for, because importing it
is slow.
"""

import functools
import importlib
import importlib.util
import os

import numpy
import torch

from ngd_fast.objective import settings

NAMES = ("reference", "cpu", "triton", "cuda")
_OLDER = "is older than this source; build again: pip install --no-build-isolation ."


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
    reason = _load("ngd_fast._C", "stem_fwd")  # registers the operators; needs torch's libraries, imported above
    if reason:
        return reason
    try:
        importlib.import_module("ngd_fast._C").instruction_set()
    except ValueError as error:  # the environment asks for one that this machine lacks
        return str(error)
    return ""


def _load(module: str, *operators: str) -> str:
    """Import an extension; its settings must be ours, by name and in order: they go over as bare numbers."""
    try:
        extension = importlib.import_module(module)
    except ImportError as error:
        return f"{module} does not load: {error}"
    except RuntimeError:  # an operator of another signature
        return f"{module} {_OLDER}"
    ours = [list(settings.NAMES), list(settings.FUSED_KD_MODES)]
    theirs = [getattr(extension, name, "").split() for name in ("SETTINGS", "KD_MODES")]
    if ours != theirs or not all(hasattr(torch.ops.ngd_fast, name) for name in operators):
        return f"{module} {_OLDER}"
    return ""


def _load_cuda(why_not_cpu: str) -> str:
    if why_not_cpu:
        return why_not_cpu
    info = importlib.import_module("ngd_fast._build_info")
    if info.WHY_NO_CUDA:
        return f"not built: {info.WHY_NO_CUDA}"
    if torch.version.cuda != info.CUDA_VERSION:
        return f"built for CUDA {info.CUDA_VERSION}, but the running PyTorch is for CUDA {torch.version.cuda}"
    return _load("ngd_fast._C_cuda")


_CPU = _load_cpu()
_CUDA = _load_cuda(_CPU)


@functools.cache
def _load_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'ngd-fast[triton]'"
    try:
        importlib.import_module("ngd_fast.kernels.objective")
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
