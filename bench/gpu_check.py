"""make gpu-check: where a GPU is, build the extension, run every GPU test and the benches, print a table.

Needs torch with CUDA, its nvcc, triton, numpy, pytest and pytest-benchmark; no network. Under 8 minutes on one H200. A
short table comes last, everything goes to --out as JSON. Exit status: 0 all tests passed; 1 a test failed, or none
ran, or the build failed; 2 no GPU is visible. Tests and benches of the training step and the feeds run where the
packages that they need are installed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Folders whose tests import torch, triton, numpy and pytest alone.
TESTS = ("tests/objective", "tests/kernels", "tests/cuda")
MORE_TESTS = ("tests/faces", "tests/student")  # need the package's other dependencies too
OBJECTIVE = {"float32": (128, 16_384), "bfloat16": (128, 1024, 16_384, 262_144)}
MEASURE_OBJECTIVE = """
import json, sys, torch
from ngd_fast.bench import _timing, objective
device = torch.device("cuda")
rows = objective.measure(int(sys.argv[1]), sys.argv[2], device, objective.implementations(device), seconds=0.15)
print(json.dumps(rows))
"""
MEASURE_STEP = """
import json, sys, torch
from ngd_fast.bench import step
print(json.dumps(step.measure(sys.argv[1], 128, 224, torch.device("cuda"), ("compiled", "graph"), seconds=1.0)))
"""
MEASURE_FEEDS = """
import json, torch
from ngd_fast.bench import feeds
device = torch.device("cuda")
print(json.dumps([feeds.measure(kind, 128, 224, device, workers=4) for kind in feeds.kinds(device)]))
"""
MACHINE = """
import json, torch
from ngd_fast.bench import _timing
print(json.dumps(_timing.machine(torch.device("cuda"))))
"""


class Check:
    def __init__(self, options):
        self.options = options
        self.started = time.monotonic()
        self.report = {"command": " ".join(["python", *sys.argv]), "tests": {}, "benches": {}, "problems": []}

    def left(self) -> float:
        return self.options.minutes * 60 - (time.monotonic() - self.started)

    def run(self, title: str, *command: str, limit: float, environment=None) -> subprocess.CompletedProcess | None:
        """Run a command, show its last lines where it fails; None where it ran out of time."""
        print(f"== {title}", flush=True)
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=max(10.0, min(limit, self.left())),
                env={**os.environ, **(environment or {})},
            )
        except subprocess.TimeoutExpired:
            self.report["problems"].append(f"{title}: ran out of time")
            print(self.report["problems"][-1])
            return None
        if done.returncode:
            print("\n".join((done.stdout + done.stderr).splitlines()[-25:]))
        return done

    def build(self, capability: str) -> bool:
        """Install in place, for this GPU's architecture alone."""
        environment = {
            "TORCH_CUDA_ARCH_LIST": capability,
            "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
            "NGD_FAST_CUDA": "1",
        }
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-q", "-e", "."]
        done = self.run(f"build for sm_{capability.replace('.', '')}", *command, limit=240, environment=environment)
        ok = done is not None and done.returncode == 0
        self.report["build"] = {"ok": ok, "seconds": round(time.monotonic() - self.started, 1)}
        return ok

    def tests(self) -> bool:
        """GPU tests, and the parity tests of the objective; False where one failed or none ran."""
        folders = [folder for folder in TESTS if (ROOT / folder).is_dir()]
        results = [self._pytest("gpu tests", [*folders, "-m", "gpu"], limit=200)]
        missing = self._missing()
        more = [folder for folder in MORE_TESTS if (ROOT / folder).is_dir()]
        if missing:
            print(f"== left out: gpu tests in {', '.join(more)} (not installed: {', '.join(missing)})")
            self.report["left_out"] = {"tests": more, "not_installed": missing}
        elif more:
            results.append(self._pytest("gpu tests of feeds and student", [*more, "-m", "gpu"], limit=120))
        quick = ["tests/objective", "-m", "not gpu", "-x"]
        results.append(self._pytest("parity of the C++ objective", quick, limit=90))
        return all(results)

    def _pytest(self, title: str, arguments: list[str], *, limit: float) -> bool:
        xml = self.options.out.with_suffix(".xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}", *arguments]
        done = self.run(title, *command, limit=limit)
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        if xml.exists():
            for suite in ElementTree.parse(xml).getroot().iter("testsuite"):
                for name in counts:
                    counts[name] += int(suite.get(name, 0))
            xml.unlink()
        passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
        ok = done is not None and done.returncode == 0 and passed > 0
        self.report["tests"][title] = {**counts, "passed": passed, "ok": ok}
        return ok

    @staticmethod
    def _missing() -> list[str]:
        from importlib.util import find_spec

        wanted = ("pydantic", "yaml", "click", "rich", "tqdm", "safetensors", "sklearn", "tensorboard", "PIL", "scipy")
        return [name for name in wanted if find_spec(name) is None]

    def sanitize(self) -> bool:
        """compute-sanitizer's memcheck over one case of every kernel; True where the tool is absent."""
        tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if tool is None:
            print("== compute-sanitizer: not found, left out")
            self.report["sanitizer"] = "not found"
            return True
        tests = [folder for folder in ("tests/cuda", "tests/kernels") if (ROOT / folder).is_dir()]
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x"]
        chosen = "odd or one or strided or broadcast or small"
        done = self.run("compute-sanitizer", *command, *tests, "-m", "gpu", "-k", chosen, limit=180)
        ok = done is not None and done.returncode == 0
        self.report["sanitizer"] = "clean" if ok else "errors"
        return ok

    def bench(self) -> None:
        """Benches, each shape in a process of its own so that one failure costs one row, while there is time."""
        jobs = [
            ("objective", f"{dtype} B={B:,}", MEASURE_OBJECTIVE, (str(B), dtype))
            for dtype, batches in OBJECTIVE.items()
            for B in batches
        ]
        if not self._missing():
            jobs += [("step", variant, MEASURE_STEP, (variant,)) for variant in ("B0", "B3")]
            jobs += [("feeds", "224 px", MEASURE_FEEDS, ())]
        for kind, name, code, arguments in jobs:
            if self.left() < 20:
                self.report["problems"].append(f"bench {kind} {name}: no time left")
                continue
            rows = self._json(f"bench {kind} {name}", code, *arguments, limit=90)
            self.report["benches"].setdefault(kind, []).extend(rows or [])

    def _json(self, title: str, code: str, *arguments: str, limit: float):
        done = self.run(title, sys.executable, "-c", code, *arguments, limit=limit)
        if done is None or done.returncode:
            self.report["problems"].append(f"{title}: failed")
            return None
        return json.loads(done.stdout.splitlines()[-1])

    def table(self) -> list[str]:
        """The short table that ends the output, in Markdown."""
        lines = ["| objective, forward + backward | B | eager us | graph us | graph, cold L2, us | GB/s | extra MB |"]
        lines.append("|---|---|---|---|---|---|---|")
        rows = [row for row in self.report["benches"].get("objective", []) if row["what"] == "both"]
        for plain in (row for row in rows if not row["graph"]):
            key = ("B", "dtype", "implementation")
            graph = next((row for row in rows if row["graph"] and all(row[k] == plain[k] for k in key)), {})
            cells = [f"{plain['us']:,.1f}"]
            for row, name in ((graph, "us"), (graph, "us cold"), (graph, "GB/s"), (plain, "extra MB")):
                cells.append(f"{row[name]:,.1f}" if row.get(name) is not None else "")
            lines.append(f"| {plain['implementation']} {plain['dtype']} | {plain['B']:,} | {' | '.join(cells)} |")
        for row in self.report["benches"].get("step", []):
            name = f"step {row['variant']}, {row['objective']}, {row['how']}"
            lines.append(f"| {name} | {row['batch']} | {row['images/s']:,.0f} images/s | | | | |")
        for row in self.report["benches"].get("feeds", []):
            lines.append(f"| feed {row['feed']} | {row['batch']} | {row['images/s']:,.0f} images/s | | | | |")
        for title, counts in self.report["tests"].items():
            failed = counts["failures"] + counts["errors"]
            passed = f"{counts['passed']} passed, {failed} failed, {counts['skipped']} skipped"
            lines.append(f"| {title} | | {passed} | | | | |")
        return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check.json", help="the JSON report")
    parser.add_argument("--minutes", type=float, default=7.5, help="time for everything; benches are left out first")
    parser.add_argument("--results", action="store_true", help="also write the table to bench/RESULTS.md")
    parser.add_argument("--sanitize", action="store_true", help="also run compute-sanitizer, where it is installed")
    parser.add_argument("--no-bench", action="store_true", help="build and test alone")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.parent.mkdir(parents=True, exist_ok=True)

    try:
        import torch
    except ImportError:
        print("gpu-check: needs PyTorch with CUDA, this Python has none")
        return 2
    if not torch.cuda.is_available():
        print(f"gpu-check: no CUDA device is visible to PyTorch {torch.__version__}; nothing was run")
        return 2
    check = Check(options)
    ok = check.build(".".join(map(str, torch.cuda.get_device_capability())))
    if ok:
        check.report["machine"] = check._json("machine", MACHINE, limit=60)
        ok = check.tests()
        if options.sanitize:
            ok = check.sanitize() and ok
        if not options.no_bench:
            check.bench()
    check.report["ok"] = ok
    check.report["seconds"] = round(time.monotonic() - check.started, 1)
    options.out.write_text(json.dumps(check.report, indent=2) + "\n")
    about = ", ".join(f"{name} {value}" for name, value in (check.report.get("machine") or {}).items())
    table = check.table()
    if options.results:
        text = f"# Measured\n\n{about}\n\n    {check.report['command']}\n\n" + "\n".join(table) + "\n"
        (ROOT / "bench" / "RESULTS.md").write_text(text)
    print("", about, *table, *check.report["problems"], sep="\n")
    print(f"gpu-check: {'passed' if ok else 'FAILED'} in {check.report['seconds']:.0f} s; {options.out}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
