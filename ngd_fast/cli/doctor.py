"""ngd-fast doctor: what is here, what is not, and why."""

import json

import click

# What each optional package is for, and the extra that brings it.
_OPTIONAL = {
    "mne": "eeg",
    "h5py": "eeg",
    "nvidia.dali": "dali-cuda12 or dali-cuda13",
    "triton": "triton",
    "matplotlib": "viz",
    "umap": "umap",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
}
_DISTRIBUTIONS = {
    "nvidia.dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "umap": ("umap-learn",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(as_json):
    """Print versions, devices and backends; for each backend that is missing, why."""
    found = examine()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from ngd_fast.console import print_table

    print_table(("what", "found"), found["versions"].items(), title="Versions")
    print_table(("device", "what it is"), found["devices"].items(), title="Devices")
    rows = [(name, "yes" if why is None else f"no: {why}") for name, why in found["backends"].items()]
    print_table(("backend", "available"), rows, title="Backends of the objective")
    print_table(("package", "found"), found["optional"].items(), title="Optional packages")


def examine() -> dict[str, dict]:
    """Versions, devices, backends (name -> None, or why it is not available) and optional packages."""
    return {
        "versions": _versions(),
        "devices": _devices(),
        "backends": _backends(),
        "optional": {name: _optional(name, extra) for name, extra in _OPTIONAL.items()},
    }


def _versions() -> dict[str, str]:
    import platform
    import shutil
    import subprocess

    import numpy
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    import ngd_fast

    versions = {
        "ngd_fast": ngd_fast.__version__,
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "PyTorch's CUDA": torch.version.cuda or "none (a CPU build)",
        "NumPy": numpy.__version__,
        "system": platform.platform(),
    }
    try:
        from ngd_fast import _build_info
    except ImportError:
        versions["extensions"] = "not built"
    else:
        arch = _build_info.CUDA_ARCH_LIST
        versions["extensions"] = f"built for PyTorch {_build_info.TORCH_VERSION}" + (f", CUDA {arch}" if arch else "")
    for name, program in (("C++ compiler", shutil.which("c++")), ("nvcc", CUDA_HOME and f"{CUDA_HOME}/bin/nvcc")):
        try:
            output = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
            lines = output.splitlines()
            versions[name] = next((line for line in lines if "release" in line), lines[0])
        except (OSError, TypeError, subprocess.CalledProcessError):
            versions[name] = "not found (needed only to build)"
    return versions


def _devices() -> dict[str, str]:
    import torch

    devices = {"cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"}
    if torch.version.cuda is None:
        devices["cuda"] = "none: this PyTorch was built without CUDA"
    elif not torch.cuda.is_available():
        devices["cuda"] = "none: PyTorch has CUDA but sees no device (driver missing, or none in this machine)"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{device.name}, compute capability {device.major}.{device.minor}, {device.total_memory / 2**30:.0f} GiB"
        )
    return devices


def _backends() -> dict[str, str | None]:
    from ngd_fast.objective import backends

    available = backends.available()
    return {name: None if name in available else backends.why_not(name) for name in backends.NAMES}


def _optional(name: str, extra: str) -> str:
    import importlib.util
    from importlib import metadata

    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return f"not installed: pip install 'ngd-fast[{extra}]'"
    for distribution in _DISTRIBUTIONS.get(name, (name,)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "installed"
