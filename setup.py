"""Builds the C++ extension everywhere and the CUDA one where torch has CUDA and a fitting nvcc is there.

PyTorch 2.8 or later comes first, then `pip install --no-build-isolation .` (setuptools 64 or later): a wheel fits the
PyTorch it was built with. After an upgrade of torch `ngd-fast doctor` says so; install again.

Environment:
    NGD_FAST_CUDA: auto (default) builds the CUDA backend where torch has CUDA and its toolkit (nvcc of that major
        version, headers) is found; 1 does or fails; 0 never does.
    TORCH_CUDA_ARCH_LIST, MAX_JOBS, CUDA_HOME: as torch.utils.cpp_extension reads them. By default 8.0 to 9.0, and 10.0,
        12.0 where nvcc knows them, with PTX. No GPU is needed to compile.

Extras, of which the package imports with none: eeg (MNE), dali-cuda12, dali-cuda13, triton, viz, umap, export (ONNX),
detect (faces in photographs), dev. `make demo VENV=/path` uses the PyTorch of an environment that is there. Everything
else is in pyproject.toml.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent  # setuptools before 66 gives a relative name; ninja compiles elsewhere
NEEDS_NO_TORCH = {"sdist", "egg_info", "dist_info", "clean", "--version", "--name"}


def sources(folder, *suffixes):
    return sorted(p.relative_to(ROOT).as_posix() for s in suffixes for p in (ROOT / "csrc" / folder).glob(f"*{s}"))


def nvcc_release(cuda_home):
    """'13.0' for the nvcc below ``cuda_home``, or None."""
    try:
        text = subprocess.run(
            [Path(cuda_home) / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else None


def finds_cuda_headers(cuda_home):
    """Would the C++ compiler find the CUDA runtime's headers, as PyTorch's build calls it?"""
    compiler = [os.environ.get("CXX", "c++"), os.environ.get("CPPFLAGS", ""), os.environ.get("CXXFLAGS", "")]
    folders = [f"{cuda_home}/include", os.environ.get("CUDA_INC_PATH", "")]
    include = [f"-I{folder}" for folder in folders if folder]
    command = [*shlex.split(" ".join(compiler)), *include, "-E", "-x", "c++", "-"]
    return subprocess.run(command, input=b"#include <cuda_runtime.h>\n", capture_output=True).returncode == 0


def why_no_build(torch):
    """The reason that nothing can be built here, in one line; empty where the C++ backend can be."""
    if not _torch_at_least(torch, 2, 8):
        return f"this PyTorch is {torch.__version__}, and ngd_fast needs 2.8 or later"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} was not found (Debian: apt-get install g++; or set CXX)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "no Python.h: the headers of this Python are missing (Debian: apt-get install python3-dev)"
    return ""


def why_no_cuda(torch, cuda_home):
    """The reason not to build the CUDA backend, in one line; empty where it can be built."""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    release = nvcc_release(cuda_home) if cuda_home else None
    if release is None:
        return f"nvcc was not found (PyTorch was built with CUDA {torch.version.cuda}; set CUDA_HOME to that toolkit)"
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {release}, PyTorch was built with CUDA {torch.version.cuda}: their major versions differ"
    if not finds_cuda_headers(cuda_home):
        return f"{cuda_home} has nvcc, but {cuda_home}/include no cuda_runtime.h; set CUDA_HOME to the toolkit"
    return ""


def toolkit(torch, guess):
    """The CUDA toolkit to build with: PyTorch's guess, or, where that is none, the one that nvcc is really of.

    PyTorch guesses from where nvcc is on the path, and a link or a wrapper in /usr/local/bin leads it astray. What the
    environment names is taken as it is.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return guess
    said = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [os.path.normpath(top) for top in re.findall(r"^#\$ TOP=(.+)$", said, re.MULTILINE)]
    homes = [guess, str(Path(nvcc).resolve().parents[1]), *tops, "/usr/local/cuda"]
    return next((home for home in homes if not why_no_cuda(torch, home)), guess)


def default_arch_list(cuda_home):
    """Every architecture we tune for that this nvcc knows; PTX of the last for those to come."""
    nvcc = Path(cuda_home) / "bin" / "nvcc"
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    wanted = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
    known = [arch for arch in wanted if f"compute_{arch.replace('.', '')}" in listed]
    return ";".join(known) + "+PTX"


def extensions():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        if NEEDS_NO_TORCH & set(sys.argv):
            return [], {}
        sys.exit(
            "error: ngd_fast is built against the PyTorch it will run with, and none is installed here. "
            "Install torch, then: pip install --no-build-isolation ."
        )
    if not NEEDS_NO_TORCH & set(sys.argv) and (reason := why_no_build(torch)):
        sys.exit(f"error: {reason}")

    wish = os.environ.get("NGD_FAST_CUDA", "auto")
    if wish not in ("auto", "1", "0"):
        sys.exit(f"error: NGD_FAST_CUDA={wish}: must be auto, 1 or 0")
    reason = "switched off by NGD_FAST_CUDA=0 when ngd_fast was built" if wish == "0" else ""
    if not reason:
        cpp_extension.CUDA_HOME = toolkit(torch, cpp_extension.CUDA_HOME)  # all of cpp_extension reads it there
        reason = why_no_cuda(torch, cpp_extension.CUDA_HOME)
    if reason and wish == "1":
        sys.exit(f"error: NGD_FAST_CUDA=1, but {reason}")

    include = [str(ROOT / "csrc")]
    # Not -march=native: a wheel must run on other machines. csrc/cpu chooses its instruction set when it is loaded.
    cxx = ["-O3", "-std=c++20" if _torch_at_least(torch, 2, 12) else "-std=c++17", "-fopenmp", "-Wno-unknown-pragmas"]
    modules = [
        cpp_extension.CppExtension(
            "ngd_fast._C",
            sources("cpu", ".cpp"),
            include_dirs=include,
            extra_compile_args={"cxx": cxx},
            extra_link_args=["-fopenmp"],
        )
    ]
    if not reason:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_arch_list(cpp_extension.CUDA_HOME))
        modules.append(
            cpp_extension.CUDAExtension(
                "ngd_fast._C_cuda",
                sources("cuda", ".cpp", ".cu"),
                include_dirs=include,
                extra_compile_args={"cxx": cxx, "nvcc": ["-O3", cxx[1], "-lineinfo", "--expt-relaxed-constexpr"]},
            )
        )

    class BuildExtension(cpp_extension.BuildExtension):
        """Also leaves a note of what was built and why not the rest; `ngd-fast doctor` reads it."""

        def run(self):
            super().run()
            lines = [
                '"""Written by setup.py when the extensions were built."""\n',
                f"TORCH_VERSION = {torch.__version__!r}",
                f"CUDA_VERSION = {torch.version.cuda if not reason else None!r}",
                f"CUDA_ARCH_LIST = {os.environ.get('TORCH_CUDA_ARCH_LIST', '') if not reason else ''!r}",
                f"WHY_NO_CUDA = {reason!r}",
            ]
            folder = ROOT if self.inplace else Path(self.build_lib)
            (folder / "ngd_fast" / "_build_info.py").write_text("\n".join(lines) + "\n")
            if reason:
                print(f"ngd_fast: built without the CUDA backend: {reason}")

    return modules, {"build_ext": BuildExtension}


def _torch_at_least(torch, major, minor):
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (major, minor)


ext_modules, cmdclass = extensions()
setup(license="Apache-2.0", ext_modules=ext_modules, cmdclass=cmdclass)
