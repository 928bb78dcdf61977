"""make gpu-check: where a GPU is, build the extension, run every GPU test and the benches, print a table.

Needs torch with CUDA, its nvcc, triton, numpy, pytest, pip and setuptools; no network. Under 8 minutes on one H200
with 16 cores. A short table comes last, everything goes to --out as JSON, what each part printed to a file beside it.
Exit status: 0 all tests passed; 1 a test failed, or none ran, or the build failed; 2 no GPU is visible. A bench that
fails is named above the verdict. Tests and benches of training want more packages (PyYAML, tqdm, safetensors, ...);
what is left out for want of them is named. Without pydantic configurations are read unchecked (bench/standins).

Each part is a process of its own with a limit of time. Tests run side by side while the benches compile what they will
measure; then the benches are let go one after the other, each alone on the GPU.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# These lie beside this file; as ngd_fast.bench they are there only once the build is done.
from _processes import Process
from _summary import table

ROOT = Path(__file__).resolve().parents[1]
# Their tests import torch, triton, numpy and pytest alone.
CORE = ("objective", "kernels", "cuda")
MORE = {
    "faces": ("yaml", "tqdm", "PIL"),
    "student": ("yaml", "tqdm", "PIL", "safetensors", "sklearn", "tensorboard"),
    "eeg": ("yaml", "tqdm", "scipy"),
}
STAND_INS = ("pydantic",)
# Parts that compile a hundred Triton kernels; pytest-xdist, where it is installed, shares each among four processes.
LONG = ("tests/objective/test_fused.py triton", "tests/kernels/test_objective.py")

JOB = """
import importlib, json, pathlib, sys, torch
from ngd_fast.bench import _timing
module, arguments, device, out = sys.argv[1:]
out = pathlib.Path(out)
def wait_for_turn():
    out.with_suffix(".ready").touch()
    sys.stdin.readline()
_timing.wait_for_turn = wait_for_turn
rows = importlib.import_module(f"ngd_fast.bench.{module}").measure(device=torch.device(device), **json.loads(arguments))
out.write_text(json.dumps(rows))
"""


def absent(packages: Iterable[str]) -> list[str]:
    """Those of ``packages`` that cannot be imported here."""
    found = []
    for name in packages:
        with contextlib.suppress(ModuleNotFoundError):  # of the package that holds it
            if find_spec(name) is not None:
                continue
        found.append(name)
    return found


@dataclass
class Bench:
    module: str
    name: str
    arguments: dict
    early: bool = True
    """It waits for its turn between its warm-up and its timing; else it is started when its turn has come."""
    limit: float = 60.0
    """Seconds of its turn."""
    title: str = ""
    process: Process | None = None

    def __post_init__(self):
        self.title = f"bench {self.module} {self.name}"


def benches() -> list[Bench]:
    """In the order of their turns: what matters most comes first, should time run out."""
    ways = ("graph", "graph, stem by layers", "graph, kernels timed", "graph, 2 students", "graph, 4 students")
    ours = [f"ngd_fast {way}" for way in ways]
    plain = [f"PyTorch {how}" for how in ("eager", "compiled", "graph")]
    steps = {
        "B0": [*plain, "ngd_fast eager", "ngd_fast compiled", *ours],
        "B3": [*plain, *ours[:4]],
        "B3-cached": ["PyTorch graph", ours[0]],
        "B3-no-kd": [ours[0]],
    }
    shapes = [(128, "float32"), (16_384, "bfloat16"), (262_144, "bfloat16")]
    shapes += [(128, "bfloat16"), (1024, "bfloat16"), (16_384, "float32")]
    return [
        *(
            Bench("objective", f"B={B:,} {dtype}", {"B": B, "dtype_name": dtype, "whats": ["both"], "seconds": 0.15})
            for B, dtype in shapes
        ),
        *(
            Bench("step", variant, {"variant": variant, "batch": 128, "image_size": 224, "implementations": names})
            for variant, names in steps.items()
        ),
        Bench("stem", "224 px", {"batch": 128, "size": 224, "whats": ["both"], "seconds": 0.15}),
        *(
            Bench(
                "train",
                variant,
                {"variant": variant, "batch": 128, "image_size": 224, "epochs": 2, **options},
                early=False,
                limit=150,
            )
            for variant, options in {"B0": {}, "B3": {"kinds": ["resident"], "hows": ["graph"]}}.items()
        ),
        Bench("feeds", "224 px", {"batch": 128, "size": 224, "workers": 4}, early=False),
    ]


class Check:
    device = "cuda"

    def __init__(self, options):
        self.options = options
        self.started = time.monotonic()
        self.stopped = False
        self.folder = options.out.with_suffix("")  # of the parts' output
        self.folder.mkdir(parents=True, exist_ok=True)
        self.missing = absent(STAND_INS)
        self.processes: set[Process] = set()
        self.lock = threading.RLock()  # the signal's handler may come while its own thread holds it
        self.report = {
            "command": " ".join(["python", *sys.argv]),
            "ok": False,
            "finished": False,
            "tests": {},
            "benches": {},
            "left_out": [],
            "problems": [],
        }
        if self.missing:
            self.report["stand_ins"] = self.missing

    def left(self) -> float:
        """Seconds until everything must be over."""
        return 0.0 if self.stopped else self.options.minutes * 60 - (time.monotonic() - self.started)

    def stop(self, *_) -> None:
        """On SIGINT and SIGTERM: end what runs, start nothing more; the report is written as it is."""
        self.stopped = True
        with self.lock:
            running = list(self.processes)
        for process in running:
            process.end()

    def note(self, kind: str, text: str) -> None:
        """Say and keep a line of the report's ``problems`` or ``left_out``."""
        with self.lock:
            self.report[kind].append(text)
        print(f"== {'left out: ' if kind == 'left_out' else ''}{text}", flush=True)

    def write(self) -> None:
        """Write the report as it stands; whole at any moment."""
        with self.lock:
            self.report["seconds"] = round(time.monotonic() - self.started, 1)
            part = self.options.out.with_suffix(".part")
            part.write_text(json.dumps(self.report, indent=2) + "\n")
            part.replace(self.options.out)

    def start(self, title: str, command: list[str], **environment: str) -> Process:
        environment = {**os.environ, **environment}
        # Where this Python is not on the path, neither is its ninja, and the build takes one file after the other.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        if self.missing:
            path = [str(ROOT / "bench" / "standins"), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        log = self.folder / (re.sub(r"[^A-Za-z0-9.=-]+", "_", title) + ".log")
        process = Process(command, ROOT, log, environment)
        with self.lock:
            self.processes.add(process)
        return process

    def finish(self, title: str, process: Process, limit: float, accepted: tuple[int, ...] = (0,)) -> int | None:
        """Wait for a process, at most ``limit`` seconds; what it ended with, shown where that is not accepted."""
        begin = time.monotonic()
        status = process.wait(min(limit, self.left()))
        with self.lock:
            self.processes.discard(process)
        if status is None:
            self.note("problems", f"{title}: ended after {time.monotonic() - begin:.0f} s, out of time")
        elif status not in accepted:
            self.note("problems", f"{title}: failed (exit status {status})")
            print(process.last_lines(), flush=True)
        return status

    # -- the build ----------------------------------------------------------------------------------------------------

    def build(self, capability: str) -> bool:
        """Install in place, for this GPU's architecture alone."""
        title = f"build for sm_{capability.replace('.', '')}"
        print(f"== {title}", flush=True)
        pip = [sys.executable, "-m", "pip", "install"]
        process = self.start(
            title,
            [*pip, "-v", "--no-index", "--no-deps", "--no-build-isolation", "-e", "."],
            TORCH_CUDA_ARCH_LIST=capability,
            MAX_JOBS=os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
            NGD_FAST_CUDA="1",
            PIP_DISABLE_PIP_VERSION_CHECK="1",
        )
        ok = self.finish(title, process, limit=400) == 0
        self.report["build"] = {"ok": ok, "seconds": round(time.monotonic() - self.started, 1)}
        return ok

    # -- tests --------------------------------------------------------------------------------------------------------

    def test_parts(self) -> dict[str, list[str]]:
        """title -> pytest's arguments: each file with GPU tests, those for every backend halved; and the C++ parity."""
        parts = {}
        for file in (file for folder in (*CORE, *MORE) for file in sorted((ROOT / "tests" / folder).glob("test_*.py"))):
            if not re.search(r"mark\.gpu|\bBACKENDS\b", file.read_text()):
                continue
            name = file.relative_to(ROOT).as_posix()
            if missing := absent(MORE.get(file.parent.name, ())):
                self.note("left_out", f"{name} (not installed: {', '.join(missing)})")
                continue
            slow = "" if self.options.sanitize else " and not sanitizer"
            for half in ("triton", "not triton") if "BACKENDS" in file.read_text() else ("",):
                arguments = [name, "-m", "gpu", "-k", (half + slow).removeprefix(" and ")]
                parts[" ".join(filter(None, (name, half)))] = arguments if arguments[-1] else arguments[:-2]
        parts["parity of the C++ objective"] = ["tests/objective", "-m", "not gpu"]
        return parts

    def tests(self) -> bool:
        """All parts side by side; False where a test failed, or where a core folder ran none."""
        parts = self.test_parts()
        print(f"== {len(parts)} parts of the tests, side by side", flush=True)
        with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
            passed = list(pool.map(lambda part: self.pytest(*part), parts.items()))
        for folder in CORE:
            parts = [part for title, part in self.report["tests"].items() if title.startswith(f"tests/{folder}/")]
            if not sum(part["tests"] - part["skipped"] for part in parts):
                self.note("problems", f"tests/{folder}: none of its GPU tests ran")
                return False
        return all(passed)

    def pytest(self, title: str, arguments: list[str], limit: float = 270.0) -> bool:
        """Run one part and count its tests; False where one failed or time ran out."""
        xml = self.folder / (re.sub(r"\W+", "_", title) + ".xml")
        xml.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}", *arguments]
        if title in LONG and not absent(["xdist"]):
            command += ["-n", "4"]
        begin = time.monotonic()
        # Many processes share the cores; 5: pytest found no test, for example of this half of a file.
        process = self.start(title, command, OMP_NUM_THREADS="2", TORCHINDUCTOR_COMPILE_THREADS="2")
        status = self.finish(title, process, limit, accepted=(0, 5))
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        with contextlib.suppress(OSError, ElementTree.ParseError):
            for suite in ElementTree.parse(xml).getroot().iter("testsuite"):
                for name in counts:
                    counts[name] += int(suite.get(name, 0))
        passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
        ok, seconds = status in (0, 5), round(time.monotonic() - begin, 1)
        with self.lock:
            self.report["tests"][title] = {**counts, "passed": passed, "ok": ok, "seconds": seconds}
        print(f"== {title}: {passed} of {counts['tests']} passed", flush=True)
        self.write()
        return ok

    # -- benches ------------------------------------------------------------------------------------------------------

    def start_benches(self) -> list[Bench]:
        """Those that can run here; what can compile early is started and will wait for its turn."""
        chosen = []
        for bench in benches():
            if missing := absent(MORE["student"] if bench.module != "objective" else ()):
                self.note("left_out", f"{bench.title} (not installed: {', '.join(missing)})")
                continue
            chosen.append(bench)
            if bench.early:
                self._launch(bench, TORCHINDUCTOR_COMPILE_THREADS="4")
        if missing := absent(["nvidia.dali"]):
            self.note("left_out", f"the feed dali (not installed: {missing[0]})")
        return chosen

    def run_benches(self, chosen: list[Bench]) -> None:
        """Give each its turn, while there is time; all have warmed up before the first is timed."""
        deadline = time.monotonic() + 90
        for bench in chosen:
            while bench.early and not self._is_settled(bench) and time.monotonic() < deadline and self.left() > 0:
                time.sleep(0.1)
        for bench in chosen:
            if self.left() < 15:
                self.note("left_out", f"{bench.title}: no time left")
                continue
            print(f"== {bench.title}", flush=True)
            if not bench.early:
                self._launch(bench)
            bench.process.let_go()
            if self.finish(bench.title, bench.process, bench.limit) == 0:
                rows = json.loads(self._result(bench).read_text())
                self.report["benches"].setdefault(bench.module, []).extend(rows)
            self.write()

    def _result(self, bench: Bench) -> Path:
        return self.folder / (re.sub(r"\W+", "_", bench.title) + ".json")

    def _launch(self, bench: Bench, **environment: str) -> None:
        out = self._result(bench)
        for file in (out, out.with_suffix(".ready")):
            file.unlink(missing_ok=True)
        command = [sys.executable, "-c", JOB, bench.module, json.dumps(bench.arguments), self.device, str(out)]
        bench.process = self.start(bench.title, command, **environment)

    def _is_settled(self, bench: Bench) -> bool:
        return self._result(bench).with_suffix(".ready").exists() or bench.process.popen.poll() is not None

    def everything(self, capability: str) -> bool:
        """Build, tests, benches; the verdict."""
        if not self.build(capability):
            return False
        chosen = [] if self.options.no_bench else self.start_benches()
        ok = self.tests()
        self.run_benches(chosen)
        self.report["finished"] = not self.stopped
        return ok and not self.stopped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check.json", help="the JSON report")
    parser.add_argument("--minutes", type=float, default=7.5, help="time for everything; benches are left out first")
    parser.add_argument("--results", action="store_true", help="also write the table to bench/RESULTS.md")
    parser.add_argument("--sanitize", action="store_true", help="also run the tests under compute-sanitizer (minutes)")
    parser.add_argument("--no-bench", action="store_true", help="build and test alone")
    options = parser.parse_args()
    options.out = options.out.resolve()

    try:
        import torch
    except ImportError:
        print("gpu-check: needs PyTorch with CUDA, this Python has none")
        return 2
    if not torch.cuda.is_available():
        print(f"gpu-check: no CUDA device is visible to PyTorch {torch.__version__}; nothing was run")
        return 2
    import _timing

    check = Check(options)
    check.report["machine"] = _timing.machine(torch.device("cuda"))
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), check.stop)
    for package in check.missing:
        print(f"== {package} is not installed: configurations are read without being checked", flush=True)
    try:
        check.report["ok"] = check.everything(".".join(map(str, torch.cuda.get_device_capability())))
    finally:
        check.stop()
        check.write()
    about = _timing.describe(check.report["machine"])
    lines = table(check.report)
    if options.results:
        text = f"# Measured\n\n{about}\n\n    {check.report['command']}\n\n" + "\n".join(lines) + "\n"
        (ROOT / "bench" / "RESULTS.md").write_text(text)
    left_out = [f"left out: {text}" for text in check.report["left_out"]]
    print("", about, *lines, *left_out, *check.report["problems"], sep="\n")
    verdict = f"{'passed' if check.report['ok'] else 'FAILED'} in {check.report['seconds']:.0f} s"
    print(f"gpu-check: {verdict}; {options.out}, what each part said in {check.folder}")
    return 0 if check.report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
