"""The suite's core over the oldest and the newest versions that pyproject.toml admits; prints a Markdown table.

    python tests/versions.py [oldest] [gpu] [newest] [--folder FOLDER]

Needs Python 3.11, `uv`, the network, and for each row some 8 GB of disk: PyTorch's wheels for Linux hold CUDA. Each row
is an environment made from nothing, the package built in a copy of the tree, and ``CORE``; the environment is
removed afterwards. Exit status 1 where a test failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("eeg", "viz", "dali-cuda13", "triton", "dev")
CORE = (
    *("objective", "kernels", "prototypes", "teacher", "faces", "eeg", "cli", "test_config.py", "test_selfcheck.py"),
    *("student/test_networks.py", "student/test_step.py", "student/test_training.py", "evaluation/test_metrics.py"),
)
#: row -> Python, uv's options, and requirements beside those of pyproject.toml.
ROWS = {
    "oldest": ("3.10", ["--resolution=lowest-direct"], []),
    # What machines with a GPU often have: a PyTorch of last year beside a NumPy of today.
    "gpu": ("3.12", [], ["torch==2.11.*", "numpy>=2.4"]),
    "newest": ("3.13", [], []),
}
SHOWN = ("torch", "numpy", "triton", "mne", "nvidia-dali-cuda130", "pandas", "pydantic", "scikit-learn", "scipy")


def run(*command, **environment) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=environment.pop("cwd", None), env={**os.environ, **environment},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}")
    return done.stdout


def make(row: str, folder: Path) -> Path:
    """An environment with the package built in a copy of the tree, ``folder``/tree; its Python."""
    version, options, more = ROWS[row]
    for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0"):
        if name and (ROOT / name).exists():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "tree" / name)
    run("uv", "venv", "-q", "--python", version, folder / "env")
    python = folder / "env" / "bin" / "python"
    install = ["uv", "pip", "install", "-q", "--python", python]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    extras = [f"--extra={extra}" for extra in EXTRAS]
    if row == "oldest":
        build = [requirement.replace(">=", "==") for requirement in build]  # those without a bound stay the newest
    run(*install, *build)
    run(*install, *options, "-r", ROOT / "pyproject.toml", *extras, *more)
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    here = folder / "tree"
    run(*install, "--no-deps", "--no-build-isolation", "-e", here, cwd=here, NGD_FAST_CUDA="0", PATH=path)
    return python


def test(python: Path, folder: Path) -> dict[str, int]:
    """Run ``CORE``; what pytest counted, its output goes to ``folder``/core.log."""
    xml = folder / "core.xml"
    with open(folder / "core.log", "w") as log:
        subprocess.run(
            [python, "-m", "pytest", "-q", f"--junitxml={xml}", *(f"tests/{name}" for name in CORE)],
            cwd=folder / "tree", stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    suite = next(ElementTree.parse(xml).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {"passed": counts["tests"] - failed - counts["skipped"], "failed": failed, "skipped": counts["skipped"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--folder", type=Path, help="where environments are made and logs stay (default: a new one)")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    options = parser.parse_args()
    base = options.folder or Path(tempfile.mkdtemp(prefix="versions-"))
    print("| | Python | " + " | ".join(SHOWN) + " | passed | failed | skipped |")
    print("|" + "---|" * (len(SHOWN) + 5), flush=True)
    bad = False
    for row in options.rows:
        folder = base.resolve() / row
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            python = make(row, folder)
            listed = json.loads(run("uv", "pip", "list", "--format=json", "--python", python))
            versions = {entry["name"]: entry["version"] for entry in listed}
            counts = test(python, folder)
        finally:
            if not options.keep:
                shutil.rmtree(folder / "env", ignore_errors=True)
        cells = [row, ROWS[row][0], *(versions.get(name, "") for name in SHOWN), *map(str, counts.values())]
        print(f"| {' | '.join(cells)} |", flush=True)
        bad = bad or counts["failed"] > 0
    print(f"\nlogs: {base}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
