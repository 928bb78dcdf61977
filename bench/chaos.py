"""Faults at random: every kind of job is killed, starved of memory or disk, raced against itself, and gone on with.

``python -m ngd_fast.bench.chaos --out DIR --kills 200``. After each fault no file may be half written, and the next run
must end with the same bits as an undisturbed one (weights, logs, metrics, sums), or say in a line why it does not.
Equal seeds give equal faults (kills by the clock hit where they hit). A run that is ended goes on where it was: what
has been tried stands in DIR/trials.jsonl. Exit status: 0 nothing lost, 1 otherwise.

Each job is a fork of this process, which has imported everything already; so hundreds of them take minutes. Root can
also fill a small tmpfs and make it read-only; without that right these two kinds are named as left out.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import mmap
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from ngd_fast.bench._chaos_jobs import Job, clear, contents, hidden, in_the_making, jobs, write_data

from ngd_fast.cli import main as ngd_fast
from ngd_fast.console import print_table, say

KINDS = ("kill", "kill at a write", "memory", "full disk", "read-only", "clock", "two at once")
DISK = ("full disk", "read-only")
_LIMIT = 300
"""Seconds after which a job counts as hung."""


class Child:
    """ngd-fast with ``arguments`` in a fork of this process; what it prints goes to ``log``."""

    def __init__(self, arguments: list[str], log: Path, fault: Callable[[], None] | None = None):
        self.log, self.status = log, None
        modules = set(sys.modules)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 70
        try:
            os.setpgid(0, 0)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if fault is not None:
                fault()
            ngd_fast(arguments)
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                if fault is None:
                    log.with_suffix(".modules").write_text("\n".join(set(sys.modules) - modules))
            os._exit(status)

    def wait(self, seconds: float = _LIMIT) -> bool:
        """Whether it ends by itself within ``seconds``; ``status`` is then set, below 0 for a signal."""
        end = time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= end:
                return False
            else:
                time.sleep(0.001)
        return True

    def kill(self) -> None:
        for end in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                end(self.pid, signal.SIGKILL)
        self.wait()

    def reason(self) -> str:
        """The line that says why, where there is one and no traceback; else empty."""
        text = self.log.read_text(errors="replace")
        found = re.search(r"^error: (.+)", text, re.MULTILINE)
        return found[1] if found and "Traceback" not in text and self.status == 2 else ""


@dataclass
class Reference:
    """What a job does undisturbed."""

    contents: dict[str, str]
    seconds: float
    writes: int
    size: int
    """Bytes of all its files."""


class Chaos:
    """Disturbs jobs that write ``folder``/place/out; the place is a small tmpfs where that can be."""

    def __init__(self, folder: Path):
        self.folder, self.place, self.data = folder, folder / "place", folder / "data"
        self.out, self.log = self.place / "out", folder / "log.txt"
        self.place.mkdir(parents=True, exist_ok=True)
        self.writes = mmap.mmap(-1, 8)
        self.mounted = False

    def import_too(self) -> None:
        """What the last child had to import, so that the next ones need not."""
        for name in self.log.with_suffix(".modules").read_text().split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    @contextlib.contextmanager
    def at_work(self, jobs: list[Job]) -> Iterator[None]:
        """Within: the place is mounted, where that can be, and the inputs of ``jobs`` are there."""
        if os.path.ismount(self.place):  # of a run that was killed
            subprocess.run(["umount", self.place], check=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=1g", "ngd-fast-chaos", self.place]
        self.mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        try:
            write_data(self.data, jobs, self.prepare)
            yield
        finally:
            if self.mounted:
                subprocess.run(["umount", self.place], check=True)

    def prepare(self, command: list[str]) -> None:
        self.finish(command)
        self.import_too()

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.place], check=True)

    def command(self, job: Job, *more: str) -> list[str]:
        return [part.format(out=self.out, data=self.data) for part in (*job.command, *more)]

    def finish(self, command: list[str], fault: Callable[[], None] | None = None) -> None:
        """Run a command that must come to its end."""
        child = Child(command, self.log, fault)
        if not child.wait():
            child.kill()
        if child.status != 0:
            raise RuntimeError(f"ngd-fast {' '.join(command)} ended with {child.status}:\n{self.log.read_text()}")

    def reference(self, job: Job) -> Reference:
        """Twice, so that what differs by itself is found before it is laid at a fault's door."""
        clear(self.out)
        self.finish(self.command(job))
        self.import_too()
        first = contents(self.out)
        clear(self.out)
        begin = time.monotonic()
        self.finish(self.command(job), lambda: self._at_write(None))
        seconds, writes = time.monotonic() - begin, int.from_bytes(self.writes[:8], "little")
        size = sum(path.stat().st_size for path in self.place.rglob("*") if path.is_file())
        reference = Reference(contents(self.out), seconds, writes, size)
        differing = [name for name, digest in first.items() if reference.contents.get(name) != digest]
        if differing or hidden(self.out):
            raise RuntimeError(f"{job.name}: two undisturbed runs differ in {differing}, left {hidden(self.out)}")
        return reference

    # -- faults, each in the child before it begins -------------------------------------------------------------------

    def _at_write(self, number: int | None) -> None:
        """Count what is done to files below the place; end without a word just before number ``number``."""
        place, kinds = str(self.place), {"open", "os.rename", "os.remove", "os.mkdir", "os.chmod"}
        done = 0

        def hook(event, arguments):
            nonlocal done
            if event in kinds and place in str(arguments[0]):
                done += 1
                self.writes[:8] = done.to_bytes(8, "little")
                if done == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    @staticmethod
    def _little_memory(spare: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare,) * 2)

    @staticmethod
    def _jumping_clock(rng: random.Random) -> None:
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + rng.uniform(-1e8, 1e8)
        time.time_ns = lambda: now_ns() + rng.randrange(-(10**17), 10**17)

    # -- one trial ----------------------------------------------------------------------------------------------------

    def trial(self, job: Job, kind: str, rng: random.Random, reference: Reference) -> dict:
        """{"hit": faults that met a running job, "said": what it said of them, "lost": what went wrong, or empty}."""
        clear(self.out)
        found = {"hit": 0, "said": "", "lost": ""}
        more: tuple[str, ...] = ()
        for _ in range(rng.randint(1, 4) if kind.startswith("kill") else 1):
            self._disturb(job, kind, rng, reference, more, found)
            found["lost"] = found["lost"] or self._half_written(reference)
            if job.afresh and self.out.exists() and any(self.out.iterdir()):
                self._refused(job, found)
            more = job.resume
        if not found["lost"]:
            self._continued(job, more, reference, found)
        return found

    def _disturb(self, job, kind, rng, reference, more, found) -> None:
        command, fault = self.command(job, *more), None
        if kind == "kill at a write":
            number = rng.randint(1, reference.writes)
            fault = lambda: self._at_write(number)  # noqa: E731
        elif kind == "memory":
            spare = int(2 ** rng.uniform(20, 29))
            fault = lambda: self._little_memory(spare)  # noqa: E731
        elif kind == "clock":
            fault = lambda: self._jumping_clock(rng)  # noqa: E731
        elif kind == "full disk":
            self.remount(f"size={max(4096, int(rng.random() * reference.size))}")
        elif kind == "read-only":
            self.remount("ro")
        other = None
        if kind == "two at once":
            other = Child(command, self.log.with_suffix(".other"))
            other.wait(rng.uniform(0, reference.seconds))
        child = Child(command, self.log, fault)
        if not child.wait(rng.uniform(0, reference.seconds) if kind == "kill" else _LIMIT):
            child.kill()
        if kind in DISK:
            self.remount("rw,size=1g")
        for each in filter(None, (child, other)):
            if not each.wait():
                each.kill()
                found["lost"] = "it hangs"
            self._judge(each, kind, found)

    def _judge(self, child: Child, kind: str, found: dict) -> None:
        if kind.startswith("kill"):
            found["hit"] += child.status == -signal.SIGKILL
        elif child.status == 0:
            found["hit"] += kind in ("clock", "two at once")
        else:
            found["hit"] += 1
            found["said"] = child.reason() or found["said"]
            # Libraries end a process that gets no memory (std::terminate, a failed thread): as good as a kill.
            if not child.reason() and not (kind == "memory" and child.status < 0):
                found["lost"] = f"exit status {child.status}: {child.log.read_text(errors='replace')[-3000:]}"

    def _half_written(self, reference: Reference) -> str:
        try:
            there = contents(self.out)
        except Exception as error:
            return f"not whole: {type(error).__name__}: {error}"
        odd = [name for name, digest in there.items()
               if not in_the_making(name) and reference.contents.get(name) != digest]  # fmt: skip
        return f"neither absent nor as undisturbed: {odd}" if odd else ""

    def _refused(self, job: Job, found: dict) -> None:
        child = Child(self.command(job), self.log)
        child.wait()
        if "is not empty; choose another folder" not in child.reason():
            found["lost"] = f"not refused: {self.log.read_text(errors='replace')[-2000:]}"
        found["said"] = child.reason() or found["said"]
        clear(self.out)

    def _continued(self, job: Job, more, reference: Reference, found: dict) -> None:
        try:
            self.finish(self.command(job, *more))
            after = contents(self.out)
        except Exception as error:
            found["lost"] = f"does not go on: {error}"
            return
        differing = sorted(n for n in after.keys() | reference.contents if after.get(n) != reference.contents.get(n))
        left = hidden(self.out)
        if differing or left:
            found["lost"] = f"other bits in {differing}" if differing else f"left behind: {left}"


def run(folder: Path, *, kills: int, others: int, seed: int, only: str = "") -> list[dict]:
    """At least ``kills`` kills and ``others`` faults of every other kind, shared among all jobs; one dict a trial."""
    torch.set_num_threads(1)
    chosen = [job for job in jobs() if re.search(only, job.name)]
    record = folder / "trials.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    trials = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    chaos = Chaos(folder)
    with chaos.at_work(chosen), open(record, "a", encoding="utf-8") as file:
        kinds = [kind for kind in KINDS if chaos.mounted or kind not in DISK]
        if not chaos.mounted:
            say(f"left out, as no tmpfs can be mounted here: {', '.join(DISK)}")
        references: dict[str, Reference] = {}
        wanted = {kind: kills / 2 if kind.startswith("kill") else others for kind in kinds}
        for number in itertools.count(len(trials)):
            left = [kind for kind in kinds if _hits(trials, kind) < wanted[kind]]
            if not left:
                break
            rng = random.Random(f"{seed} {number}")
            kind = rng.choices(left, [wanted[kind] - _hits(trials, kind) for kind in left])[0]
            job = rng.choices(chosen, [job.often for job in chosen])[0]
            if job.name not in references:
                references[job.name] = chaos.reference(job)
            found = chaos.trial(job, kind, rng, references[job.name])
            trials.append({"job": job.name, "kind": kind, **found})
            file.write(json.dumps(trials[-1]) + "\n")
            file.flush()
            # No bar: a fork would inherit it, and draw it into the job's output.
            verdict = f"LOST: {found['lost']}" if found["lost"] else found["said"] or "the same bits"
            say(f"{number + 1}: {job.name}, {kind} ({found['hit']}): {verdict}")
    return trials


def _hits(trials: list[dict], kind: str) -> int:
    return sum(trial["hit"] for trial in trials if trial["kind"] == kind)


def table(trials: list[dict]) -> tuple[list[str], list[list]]:
    """(columns, rows) for the terminal: faults by job and kind, and what was lost."""
    kinds = [kind for kind in KINDS if any(trial["kind"] == kind for trial in trials)]
    rows = []
    for name in [*dict.fromkeys(trial["job"] for trial in trials), "all"]:
        own = [trial for trial in trials if name in (trial["job"], "all")]
        said = sum(bool(trial["said"]) for trial in own)
        lost = sum(bool(trial["lost"]) for trial in own)
        rows.append([name, *(_hits(own, kind) for kind in kinds), said, lost])
    return ["job", *kinds, "said why", "lost"], rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to work in; an interrupted run goes on there")
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs that must meet a running job")
    parser.add_argument("--others", type=int, default=20, help="faults of every other kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="jobs whose name this regular expression finds")
    options = parser.parse_args(arguments)
    trials = run(options.out.resolve(), kills=options.kills, others=options.others, seed=options.seed,
                 only=options.only)  # fmt: skip
    columns, rows = table(trials)
    print_table(columns, rows, title="faults that met a running job")
    return int(any(trial["lost"] for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
