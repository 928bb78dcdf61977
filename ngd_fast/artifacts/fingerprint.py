"""What a run was made from: switches, weights, checksums of its inputs, environment and commit."""

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ngd_fast._version import __version__
from ngd_fast.artifacts.files import is_plain, sha256, write_json, write_text
from ngd_fast.errors import UserError

FINGERPRINT_NAME = "ablation_fingerprint.json"


def make_fingerprint(
    run: str | Path,
    *,
    variant: str,
    seed: int,
    switches: Mapping[str, bool],
    weights: Mapping[str, float],
    files: Mapping[str, str | Path],
    checksums: Mapping[str, str] | None = None,
) -> dict:
    """Write ``ablation_fingerprint.json`` into the run folder ``run`` and return what was written.

    ``switches`` says which terms were on ({"kd": True, "proto": True, "d_geo": False}), ``weights`` with which weight.
    ``files`` {"config": path, "bank": path, "data_train": path, "weights": path} are hashed; paths inside the run are
    kept relative to it, others absolute, so that ``ngd-fast verify`` finds them again. ``checksums`` adds SHA-256 sums
    that belong to no single file, such as an image folder's. Raises UserError for a file that is not there.
    """
    run = Path(run)
    fingerprint = {
        "variant": variant,
        "seed": int(seed),
        "switches": {name: bool(value) for name, value in switches.items()},
        "weights": {name: float(value) for name, value in weights.items()},
        "files": {name: _describe_file(run, name, Path(path)) for name, path in files.items()},
        "checksums": dict(checksums or {}),
        "environment": environment(),
        "commit": commit(),
    }
    write_json(run / FINGERPRINT_NAME, fingerprint)
    return fingerprint


def _describe_file(run: Path, name: str, path: Path) -> dict[str, str]:
    if not path.is_file():
        raise UserError(f"fingerprint: {name} is to be hashed, but {path} is no file")
    path, run = path.resolve(), run.resolve()
    inside = path.is_relative_to(run)
    return {"path": path.relative_to(run).as_posix() if inside else str(path), "sha256": sha256(path)}


def check_fingerprint(run: str | Path, fingerprint: Mapping) -> tuple[list[str], list[str]]:
    """Hash the fingerprint's files again: (one line for each that changed, one line for each that is not there).

    A file outside the run (data, bank) that is absent proves nothing; one inside the run that is absent is a change.
    """
    changed, absent = [], []
    for name, entry in fingerprint.get("files", {}).items():
        path = Path(run) / entry["path"]
        if not is_plain(path):
            outside = Path(entry["path"]).is_absolute()
            (absent if outside else changed).append(f"{name}: {entry['path']} is not there")
        elif sha256(path) != entry["sha256"]:
            changed.append(f"{name}: {entry['path']} is not the file that the run was made from")
    return changed, absent


def environment() -> dict:
    """Versions and devices that numbers can depend on. Nothing here names a user or a folder."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "ngd_fast": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "devices": devices,
        "packages": packages("numpy", "scipy", "scikit-learn", "triton", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    }


def packages(*names: str) -> dict[str, str]:
    """Installed versions of the named distributions (of all of them without names), sorted by name."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    if names:
        found = {name: version for name, version in found.items() if name.lower() in names}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def commit() -> str | None:
    """The git commit of the package's sources, with "-dirty" where they differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        state = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("-dirty" if state.stdout.strip() else "")


def write_environment(folder: str | Path) -> None:
    """Write ``pip_freeze.txt`` and ``git_commit.txt``, as the paper's repository names them."""
    folder = Path(folder)
    lines = [f"# Python {sys.version.split()[0]}", *(f"{name}=={version}" for name, version in packages().items())]
    write_text(folder / "pip_freeze.txt", "\n".join(lines) + "\n")
    write_text(folder / "git_commit.txt", (commit() or f"ngd_fast {__version__}, not from a git checkout") + "\n")
