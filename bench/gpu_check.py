"""make gpu-check: where a GPU is, build the extension, run every GPU test and the benches, print a table.

Needs torch with CUDA, its nvcc, triton, numpy, pytest, pip and setuptools; no network. Memory for a card of 78 GB: what
is measured is alone on the GPU. Parts (--parts, in this order): build, tests, objective, stem, step:B0, step:B3, feeds,
train; each well under nine minutes, so that each fits one call on a machine lent for minutes (FIRST_HALF_HOUR.md). A
build is used again by later calls.

One folder holds all results (--out): rows.jsonl, a line for each row as it comes; report.json, which has failing tests
with their last lines; table.md; logs.tar.gz. Later calls add to it. Exit status: 0 all tests passed; 1 a test failed,
or none ran, or the build failed; 2 no GPU is visible. A bench that fails is named above the verdict. What is left out
for want of packages or time is named. Without pydantic configurations are read unchecked (bench/standins).
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

# These lie beside this file; as ngd_fast.bench they are there only once the build is done.
from _parts import MEASURED, PARTS, STUDENT, Job, batches, jobs
from _processes import Process
from _summary import table

ROOT = Path(__file__).resolve().parents[1]
# Their tests import torch, triton, numpy and pytest alone.
CORE = ("objective", "kernels", "cuda")
MORE = {"faces": ("yaml", "tqdm", "PIL"), "student": STUDENT, "eeg": ("yaml", "tqdm", "scipy")}
STAND_INS = ("pydantic",)
# Parts that compile a hundred Triton kernels; pytest-xdist, where it is installed, shares each among four processes.
LONG = ("tests/objective/test_fused.py triton", "tests/kernels/test_objective.py")
AHEAD = 6  # benches that prepare side by side: a step with a teacher, or four students, holds 10 to 16 GB
SIDE_BY_SIDE = 8  # processes of tests, each with a CUDA context and its caches: 4 GB or so


def absent(packages: Iterable[str]) -> list[str]:
    """Those of ``packages`` that cannot be imported here."""
    found = []
    for name in packages:
        with contextlib.suppress(ModuleNotFoundError):  # of the package that holds it
            if find_spec(name) is not None:
                continue
        found.append(name)
    return found


class Check:
    def __init__(self, options):
        self.options = options
        self.device = "cpu" if options.rehearse else "cuda"
        self.started = time.monotonic()
        self.stopped = False
        self.folder = options.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = self.folder / "rows.jsonl"
        self.logs = ROOT / "build" / "gpu_check_logs"
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.missing = absent(STAND_INS)
        self.processes: set[Process] = set()
        self.lock = threading.RLock()  # the signal's handler may come while its own thread holds it
        with contextlib.suppress(OSError, ValueError):
            self.report = json.loads((self.folder / "report.json").read_text())
        if not hasattr(self, "report"):
            self.report = {"commands": [], "build": {}, "tests": {}, "failing": [], "left_out": [], "problems": []}
        self.report["commands"].append(" ".join(["python", *sys.argv]))
        self.report.update(ok=False, finished=False, stand_ins=self.missing)

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
            part = self.folder / "report.part"
            part.write_text(json.dumps(self.report, indent=2) + "\n")
            part.replace(self.folder / "report.json")

    def add_row(self, row: dict) -> None:
        with self.lock, open(self.rows, "a") as lines:
            lines.write(json.dumps(row) + "\n")

    def all_rows(self) -> list[dict]:
        """Of this call and those before it."""
        return [json.loads(line) for line in self.rows.read_text().splitlines()] if self.rows.exists() else []

    def start(self, title: str, command: list[str], **environment: str) -> Process:
        environment = {**os.environ, **environment}
        # Where this Python is not on the path, neither is its ninja, and the build takes one file after the other.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        if self.missing:
            path = [str(ROOT / "bench" / "standins"), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        process = Process(command, ROOT, self.logs / f"{plain(title)}.log", environment)
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
        if status not in accepted:
            print(*process.last_lines(25), sep="\n", flush=True)
        return status

    # -- the build ----------------------------------------------------------------------------------------------------

    def build(self, capability: str) -> bool:
        """Install in place, for this GPU's architecture alone; once for the same sources, PyTorch and architecture."""
        import torch

        files = [
            ROOT / "setup.py",
            ROOT / "pyproject.toml",
            *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()),
        ]
        state = hashlib.sha256(b"\0".join([sys.executable.encode(), *(file.read_bytes() for file in files)]))
        state.update(f"{torch.__version__} {capability}".encode())
        stamp = ROOT / "build" / "gpu_check.built"
        if stamp.exists() and stamp.read_text() == state.hexdigest() and not absent(["ngd_fast._C", "ngd_fast.bench"]):
            self.report["build"] = {"ok": True, "seconds": 0.0, "again": True}
            return True
        title = f"build for sm_{capability.replace('.', '')}"
        print(f"== {title}", flush=True)
        pip = [sys.executable, "-m", "pip", "install"]
        process = self.start(
            title,
            [*pip, "-v", "--no-index", "--no-deps", "--no-build-isolation", "-e", "."],
            TORCH_CUDA_ARCH_LIST=capability,
            MAX_JOBS=os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
            NGD_FAST_CUDA="0" if self.device == "cpu" else "1",
            PIP_DISABLE_PIP_VERSION_CHECK="1",
        )
        begin = time.monotonic()
        ok = self.finish(title, process, limit=400) == 0
        self.report["build"] = {"ok": ok, "seconds": round(time.monotonic() - begin, 1)}
        if ok:
            stamp.write_text(state.hexdigest())
        return ok

    # -- tests --------------------------------------------------------------------------------------------------------

    def test_parts(self) -> dict[str, list[str]]:
        """title -> pytest's arguments: each file with GPU tests, those for every backend halved; and the C++ parity."""
        parts, quick = {}, "" if self.options.sanitize else "not sanitizer"
        for file in (file for folder in (*CORE, *MORE) for file in sorted((ROOT / "tests" / folder).glob("test_*.py"))):
            if not re.search(r"mark\.gpu|\bBACKENDS\b", file.read_text()):
                continue
            name = file.relative_to(ROOT).as_posix()
            if missing := absent(MORE.get(file.parent.name, ())):
                self.note("left_out", f"{name} (not installed: {', '.join(missing)})")
                continue
            for half in ("triton", "not triton") if "BACKENDS" in file.read_text() else ("",):
                chosen = ["-k", " and ".join(filter(None, (half, quick)))] if half or quick else []
                parts[" ".join(filter(None, (name, half)))] = [name, "-m", "gpu", *chosen]
        # Three builds under sanitizers would take longer than all else.
        parts["parity of the C++ objective"] = ["tests/objective", "-m", "not gpu", *(["-k", quick] if quick else [])]
        return parts

    def tests(self) -> bool:
        """All parts side by side; False where a test failed, or where a core folder ran none."""
        parts = self.test_parts()
        print(f"== {len(parts)} parts of the tests, side by side", flush=True)
        with ThreadPoolExecutor(min(SIDE_BY_SIDE, max(2, os.cpu_count() or 1))) as pool:
            passed = list(pool.map(lambda part: self.pytest(*part), parts.items()))
        for folder in CORE:
            parts = [part for title, part in self.report["tests"].items() if title.startswith(f"tests/{folder}/")]
            if not sum(part["tests"] - part["skipped"] for part in parts):
                self.note("problems", f"tests/{folder}: none of its GPU tests ran")
                return False
        return all(passed)

    def pytest(self, title: str, arguments: list[str], limit: float = 420.0) -> bool:
        """Run one part and count its tests; False where one failed or time ran out."""
        xml = self.logs / f"{plain(title)}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}", *arguments]
        if title in LONG and not absent(["xdist"]):
            command += ["-n", "4"]
        begin = time.monotonic()
        # Many processes share the cores; 5: pytest found no test, for example of this half of a file.
        process = self.start(title, command, OMP_NUM_THREADS="2", TORCHINDUCTOR_COMPILE_THREADS="2")
        status = self.finish(title, process, limit, accepted=(0, 5))
        counts, reasons = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}, {}
        with contextlib.suppress(OSError, ElementTree.ParseError):
            tree = ElementTree.parse(xml).getroot()
            for suite in tree.iter("testsuite"):
                for name in counts:
                    counts[name] += int(suite.get(name, 0))
            for skipped in tree.iter("skipped"):
                reasons[skipped.get("message", "")] = reasons.get(skipped.get("message", ""), 0) + 1
            for case in tree.iter("testcase"):
                for failure in [*case.iter("failure"), *case.iter("error")]:
                    lines = (failure.text or "").splitlines()[-40:]
                    with self.lock:
                        self.report["failing"].append({"test": f"{title}: {case.get('name')}", "lines": lines})
        passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
        ok, seconds = status in (0, 5), round(time.monotonic() - begin, 1)
        row = {**counts, "passed": passed, "ok": ok, "seconds": seconds, "skipped because": reasons}
        with self.lock:
            self.report["tests"][title] = row
        self.add_row({"part": "tests", "title": title, **row})
        print(f"== {title}: {passed} of {counts['tests']} passed", flush=True)
        self.write()
        return ok

    # -- benches ------------------------------------------------------------------------------------------------------

    def measure(self, part: str) -> None:
        """One job after the other, while there is time; the rate of a copy first, where no call before measured it."""
        copies = [row for row in self.all_rows() if row.get("what") == "copy" and row.get("GB/s")]
        if not copies:
            self.run("device", Job("copy", [("device", {"megabytes": 4} if self.options.rehearse else {})], limit=60))
        wanted = list(filter(self.possible, jobs(part, tiny=self.options.rehearse)))[: self.options.most]
        for batch in batches(wanted, AHEAD):
            self.run(part, *batch)
            self.write()

    def possible(self, job: Job) -> bool:
        """Whether what the job needs is here; said where not."""
        missing = absent(job.needs)
        if job.under and shutil.which(job.under[0]) is None:
            missing.append(job.under[0])
        if missing:
            self.note("left_out", f"{job.title} (not installed: {', '.join(missing)})")
        return not missing

    def run(self, part: str, *batch: Job) -> None:
        """Prepare the jobs side by side (imports, compilation, capture), then let each measure alone."""
        if self.left() < 20:
            for job in batch:
                self.note("left_out", f"{job.title}: no time left")
            return
        copy = next((row["GB/s"] for row in self.all_rows() if row.get("what") == "copy"), None)
        started = []
        for job in batch:
            inductor = {key.partition(".")[2]: value == "1" for key, value in job.switches.items() if "." in key}
            about = {"part": part, "title": job.title, **({"switches": job.switches} if job.switches else {})}
            gate = None if job.alone else self.logs / f"{plain(job.title)}.gate"
            text = {"calls": job.calls, "device": self.device, "rows": str(self.rows), "about": about}
            text |= {"copy GB/s": copy, "inductor": inductor, "gate": gate and str(gate)}
            command = [*job.under, sys.executable, "-m", "ngd_fast.bench._job", json.dumps(text)]
            environment = {key: value for key, value in job.switches.items() if "." not in key}
            started.append((job, about, gate, self.start(job.title, command, **environment)))
        # A rehearsal is no measurement, and may share its machine.
        patience = 10 if self.options.rehearse else 1
        end = time.monotonic() + min(self.left(), patience * max(job.limit for job in batch))
        while time.monotonic() < end and any(
            gate and not gate.exists() and process.popen.poll() is None for _, _, gate, process in started
        ):
            time.sleep(0.05)
        for job, about, gate, process in started:
            print(f"== {job.title}", flush=True)
            before = len(self.all_rows())
            limit = job.limit * patience if not gate or gate.exists() else 2.0
            if gate:
                gate.unlink(missing_ok=True)
            self.finish(job.title, process, limit)
            if job.under:
                self.add_row({**about, "bench": "ncu", **ncu_row(process.log.read_text(errors="replace"))})
            for line in table({"rows": self.all_rows()[before:]})[2:]:
                print(line, flush=True)

    def everything(self, capability: str) -> bool:
        """The parts asked for, in their order; the verdict."""
        parts, ok = self.options.parts, True
        if "build" in parts and not self.build(capability):
            return False
        if "tests" in parts:
            ok = self.tests()
        for part in MEASURED:
            if part in parts:
                self.measure(part)
        self.report["finished"] = not self.stopped
        return ok and not self.stopped

    def close(self) -> None:
        """Report, table and logs into the folder of results."""
        self.stop()
        self.write()
        with tarfile.open(self.folder / "logs.tar.gz", "w:gz") as tar:
            tar.add(self.logs, "logs")


def plain(title: str) -> str:
    """A file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", title)


def ncu_row(text: str) -> dict:
    """The metrics of ncu's table, the last lines of ``text``, by name with their units; "error" where it has none."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    row = {f"{cells['Metric Name']} [{cells['Metric Unit']}]": cells["Metric Value"] for cells in csv.DictReader(lines)}
    return row or {"error": next((line for line in text.splitlines() if "==ERROR==" in line), "ncu gave no table")}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)} (default: all)")
    parser.add_argument("--no-build", action="store_true", help="use the build that is there")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check", help="the folder of results")
    parser.add_argument("--minutes", type=float, help="time for this call (default: 8.5 for each part)")
    parser.add_argument("--most", type=int, help="jobs of each measured part, the first ones (default: all)")
    parser.add_argument("--sanitize", action="store_true", help="also run the tests under compute-sanitizer (minutes)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the same on the CPU, on tiny input")
    options = parser.parse_args(arguments)
    options.parts = [part for part in options.parts.split(",") if part]
    if wrong := [part for part in options.parts if part not in PARTS]:
        parser.error(f"--parts: no such part: {', '.join(wrong)}; there are {', '.join(PARTS)}")
    if options.no_build and "build" in options.parts:
        options.parts.remove("build")
    options.minutes = options.minutes or 8.5 * len(options.parts)
    options.out = options.out.resolve()
    return options


def main() -> int:
    options = parse()
    try:
        import torch
    except ImportError:
        print("gpu-check: needs PyTorch with CUDA, this Python has none")
        return 2
    if not options.rehearse and not torch.cuda.is_available():
        print(f"gpu-check: no CUDA device is visible to PyTorch {torch.__version__}; nothing was run")
        return 2
    import _timing

    check = Check(options)
    check.report["machine"] = _timing.machine(torch.device(check.device))
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), check.stop)
    for package in check.missing:
        print(f"== {package} is not installed: configurations are read without being checked", flush=True)
    try:
        capability = "9.0" if options.rehearse else ".".join(map(str, torch.cuda.get_device_capability()))
        check.report["ok"] = check.everything(capability)
    finally:
        check.close()
    about = _timing.describe(check.report["machine"])
    lines = table({**check.report, "rows": check.all_rows()})
    commands = [f"    {command}" for command in check.report["commands"]]
    (check.folder / "table.md").write_text("\n".join(["# Measured", "", about, "", *commands, "", *lines]) + "\n")
    left_out = [f"left out: {text}" for text in check.report["left_out"]]
    print("", about, *lines, *left_out, *check.report["problems"], sep="\n")
    verdict = f"{'passed' if check.report['ok'] else 'FAILED'} in {check.report['seconds']:.0f} s"
    print(f"gpu-check: {verdict}; {check.folder}")
    return 0 if check.report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
