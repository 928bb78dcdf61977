"""Faults at random: every kind of job is killed, starved of memory or disk, raced against itself, and gone on with.

``python -m ngd_fast.bench.chaos --out DIR --kills 200``. After each fault no file may be half written, and the next run
must end with the same bits as an undisturbed one (weights, logs, metrics, sums), or say in a line why it does not.
Equal seeds give equal faults (kills by the clock hit where they hit). A run that is ended goes on where it was: what
has been tried stands in DIR/trials.jsonl. Exit status: 0 nothing lost, 1 otherwise.

Each job is a process of its own, and a kill by the clock falls between its first touch of its files and its end. Root
can also fill a small tmpfs and make it read-only; without that right these two kinds are named as left out.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ngd_fast.bench._chaos_jobs import Job, clear, contents, hidden, in_the_making, jobs, write_data

from ngd_fast.console import print_table, say

KINDS = ("kill", "kill at a write", "memory", "full disk", "read-only", "clock", "two at once")
DISK = ("full disk", "read-only")
_LIMIT = 300
"""Seconds after which a job counts as hung."""


class Child:
    """ngd-fast in a process of its own, disturbed as :mod:`_chaos_child` says; what it prints goes to ``log``."""

    def __init__(self, place: Path, arguments: list[str], log: Path, fault: str = "none"):
        self.log, self.status = log, None
        self.events, self.began = 0, None  # what it did to files of the place, and when it did the first
        self._pipe, pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        command = [sys.executable, "-m", "ngd_fast.bench._chaos_child", str(place), str(pipe), fault, *arguments]
        with open(log, "w") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, pass_fds=[pipe],
                start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        os.close(pipe)

    def _look(self) -> None:
        status = self._process.poll()
        with contextlib.suppress(BlockingIOError):
            while found := os.read(self._pipe, 65536):
                self.events += len(found)
        if self.events and self.began is None:
            self.began = time.monotonic()
        if status is not None and self.status is None:
            self.status = status
            os.close(self._pipe)

    def wait(self, seconds: float = _LIMIT, *, of_work: bool = False) -> bool:
        """Whether it ends by itself within ``seconds``, of its work alone or of all; ``status``, then, is below 0 for a
        signal."""
        begin = time.monotonic()
        while self.status is None:
            self._look()
            spent = time.monotonic() - (self.began or begin if of_work else begin)
            if self.status is None and spent >= (_LIMIT if of_work and self.began is None else seconds):
                return False
            time.sleep(0.001)
        return True

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
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
        self.out = self.place / "out"
        self.place.mkdir(parents=True, exist_ok=True)
        self.mounted = False

    @contextlib.contextmanager
    def at_work(self, jobs: list[Job]) -> Iterator[None]:
        """Within: the place is mounted, where that can be, and the inputs of ``jobs`` are there."""
        if os.path.ismount(self.place):  # of a run that was killed
            subprocess.run(["umount", self.place], check=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=1g", "ngd-fast-chaos", self.place]
        self.mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        try:
            write_data(self.data, jobs, self.finish)
            yield
        finally:
            if self.mounted:
                subprocess.run(["umount", self.place], check=True)

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.place], check=True)

    def command(self, job: Job, *more: str) -> list[str]:
        return [part.format(out=self.out, data=self.data) for part in (*job.command, *more)]

    def start(self, command: list[str], fault: str = "none", log: str = "log.txt") -> Child:
        return Child(self.place, command, self.folder / log, fault)

    def finish(self, command: list[str]) -> Child:
        """Run a command that must come to its end."""
        child = self.start(command)
        if not child.wait():
            child.kill()
        if child.status != 0:
            raise RuntimeError(f"ngd-fast {' '.join(command)} ended with {child.status}:\n{child.log.read_text()}")
        return child

    def reference(self, job: Job) -> Reference:
        """Twice, so that what differs by itself is found before it is laid at a fault's door."""
        clear(self.out)
        self.finish(self.command(job))
        first = contents(self.out)
        clear(self.out)
        child = self.finish(self.command(job))
        seconds = time.monotonic() - child.began
        size = sum(path.stat().st_size for path in self.place.rglob("*") if path.is_file())
        reference = Reference(contents(self.out), seconds, child.events, size)
        differing = [name for name, digest in first.items() if reference.contents.get(name) != digest]
        if differing or hidden(self.out):
            raise RuntimeError(f"{job.name}: two undisturbed runs differ in {differing}, left {hidden(self.out)}")
        return reference

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
        command, fault = self.command(job, *more), "none"
        if kind == "kill at a write":
            fault = f"write={rng.randint(1, reference.writes)}"
        elif kind == "memory":
            fault = f"memory={int(2 ** rng.uniform(14, 25))}"
        elif kind == "clock":
            fault = f"clock={rng.random()}"
        elif kind == "two at once":
            fault = f"hold={rng.uniform(0, reference.seconds)}"
        elif kind == "full disk":
            self.remount(f"size={max(4096, int(rng.random() * reference.size))}")
        elif kind == "read-only":
            self.remount("ro")
        other = self.start(command, log="other.txt") if kind == "two at once" else None
        child = self.start(command, fault)
        if kind == "kill" and not child.wait(rng.uniform(0, reference.seconds), of_work=True):
            child.kill()
        for each in filter(None, (child, other)):
            if not each.wait():
                each.kill()
                found["lost"] = "it hangs"
        if kind in DISK:
            self.remount("rw,size=1g")
        for each in filter(None, (child, other)):
            self._judge(each, kind, found)

    def _judge(self, child: Child, kind: str, found: dict) -> None:
        if kind.startswith("kill"):
            found["hit"] += child.status == -signal.SIGKILL
        elif child.status == 0:
            found["hit"] += kind in ("clock", "two at once")
        else:
            found["hit"] += 1
            found["said"] = child.reason() or found["said"]
            text = child.log.read_text(errors="replace")
            # Without memory libraries end a process (std::terminate, a failed thread), and CPython has none left to
            # make an exception of: as good as a kill.
            ended = kind == "memory" and (child.status < 0 or "SystemError: error return without exception" in text)
            if not child.reason() and not ended:
                found["lost"] = f"exit status {child.status}: {text[-3000:]}"

    def _half_written(self, reference: Reference) -> str:
        try:
            there = contents(self.out)
        except Exception as error:
            return f"not whole: {type(error).__name__}: {error}"
        odd = [name for name, digest in there.items()
               if not in_the_making(name) and reference.contents.get(name) != digest]  # fmt: skip
        return f"neither absent nor as undisturbed: {odd}" if odd else ""

    def _refused(self, job: Job, found: dict) -> None:
        child = self.start(self.command(job))
        child.wait()
        if "is not empty; choose another folder" not in child.reason():
            found["lost"] = f"not refused: {child.log.read_text(errors='replace')[-2000:]}"
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
            # A kind that hardly ever meets these jobs is given up.
            tried = {kind: sum(trial["kind"] == kind for trial in trials) for kind in kinds}
            left = [kind for kind in kinds if _hits(trials, kind) < wanted[kind] and tried[kind] < 10 * wanted[kind]]
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
