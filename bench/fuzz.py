"""Fuzzing of every reader: ``python -m ngd_fast.bench.fuzz --minutes 60``.

Each target of :mod:`ngd_fast.bench.fuzz_runs` runs in a child of its own with a limit on memory and on the time of
one input: guided by coverage where atheris is installed (pip install 'ngd-fast[fuzz]'), else by blind mutation. A
finding is any exception but UserError, more than 10 s of the processor, 400 MB more memory, a file written outside the
input's folder, a program started, a socket opened, NaN in a result, or the child's death; its input is kept under
``--out``.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

SECONDS, GROWTH_MB, ADDRESS_SPACE = 10, 400, 8 << 30
_TOKENS = (
    b"\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"NaN", b"inf", b"1e999", b"-1", b"9" * 40, b"../../x", b"/etc",
    b"<script>", b"\\input{x}", b'"', b"{", b"[" * 50, b"\n", b",", b"&a", b"*a", b"!!python/name:os.system",
)  # fmt: skip
_VALUES = (
    None, True, -1, 0, 1, 2**31, 2**70, 1e308, -0.5, float("nan"), float("inf"), "", "x" * 3000, "<script>",
    "../../../x", "/etc/passwd", "\\input{x}$^_%", "a\x00\x1b[2J\nb", "\ud800", "NaN", [], {}, [[]], {"a": {}},
    [1e9, -1e9], [0] * 70,
)  # fmt: skip


def mutate(data: bytes, rng: random.Random, size: int = 1 << 17) -> bytes:
    """``data`` with one to four changes: of a value where it is JSON, of bytes otherwise."""
    if data[:1] in b"{[" and rng.random() < 0.7:
        with contextlib.suppress(ValueError, RecursionError):
            tree = json.loads(data)
            for _ in range(rng.randint(1, 3)):
                tree = _change(tree, rng)
            return json.dumps(tree).encode()[:size]
    content = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 1, 2, 4, 8, 64)))
        kind = rng.randrange(5)
        if kind == 0:
            content[start:end] = rng.randbytes(end - start)
        elif kind == 1:
            content[start:end] = rng.choice(_TOKENS)
        elif kind == 2:
            del content[start:end]
        elif kind == 3:
            content[start:start] = content[start:end] * rng.choice((1, 2, 30))
        elif start < end:
            content[start] ^= 1 << rng.randrange(8)
    return bytes(content[:size])


def _change(tree, rng: random.Random):
    """A copy of ``tree`` in which one node is another value, is gone, or has another name."""
    if isinstance(tree, dict) and tree and rng.random() < 0.9:
        key = rng.choice(list(tree))
        kind = rng.random()
        if kind < 0.05:
            return {k: v for k, v in tree.items() if k != key}
        if kind < 0.1:
            return {**tree, rng.choice(("<script>", "..", "", "a/b", "\x1b")): tree[key]}
        return {**tree, key: _change(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.9:
        place = rng.randrange(len(tree))
        return [*tree[:place], _change(tree[place], rng), *tree[place + 1 :]]
    return rng.choice(_VALUES)


class Harness:
    """Runs one target's inputs and counts; what it finds is told once for each place in the code."""

    def __init__(self, name: str, out: Path | None = None):
        from ngd_fast.bench.fuzz_runs import TARGETS

        self.name, self.target, self.out = name, TARGETS[name], out
        self.counts: collections.Counter[str] = collections.Counter()
        self.findings: dict[str, str] = {}
        self.folder: Path | None = None
        self._outside: list[str] = []
        self._devnull = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)

    def watch(self) -> None:
        """From now on note files written outside the input's folder, programs started, sockets opened."""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
            self._outside.append(f"{event} {args!r:.200}")
        elif event in ("open", "os.remove", "os.rename", "os.mkdir", "os.symlink") and isinstance(args[0], str | bytes):
            writes = event != "open" or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            path = os.path.abspath(os.fsdecode(args[1 if event == "os.rename" else 0]))
            if writes and not path.startswith((str(self.folder), "/dev/null")):
                self._outside.append(f"{event} {path}")

    def run(self, data: bytes) -> None:
        from ngd_fast.errors import UserError

        self.counts["inputs"] += 1
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        folder = Path(tempfile.mkdtemp(prefix="fuzz"))
        self._outside.clear()
        fault = None
        signal.setitimer(signal.ITIMER_PROF, SECONDS if self.counts["inputs"] > 1 else 60 * SECONDS)
        try:
            self.folder = folder
            with contextlib.redirect_stdout(self._devnull), contextlib.redirect_stderr(self._devnull):
                self.target.run(folder, data)
            self.counts["accepted"] += 1
        except UserError as error:
            if "batch" in str(error) or len(str(error)) > 4000:
                fault = "message", str(error)[:300]
        except _Hang:
            fault = "hang", "".join(traceback.format_exc(limit=-4))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)
            own = [f for f in place if "ngd_fast" in f.filename and "fuzz" not in f.filename] or place
            fault = f"{type(error).__name__} {own[-1].filename}:{own[-1].lineno}", traceback.format_exc(limit=-6)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.folder = None
            shutil.rmtree(folder, ignore_errors=True)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if self.counts["inputs"] > 1 and grown > GROWTH_MB << 10:
            self._found("memory", f"{grown >> 10} MB more for {len(data)} bytes", data)
        if self._outside:
            self._found("outside", "\n".join(self._outside[:5]), data)
        if fault is not None:
            self._found(*fault, data)

    def _found(self, kind: str, text: str, data: bytes) -> None:
        self.counts["findings"] += 1
        if kind in self.findings:
            return
        self.findings[kind] = text
        if self.out is not None:
            name = self.out / f"{self.name}-{hashlib.sha256(kind.encode()).hexdigest()[:10]}"
            name.with_suffix(".bin").write_bytes(data)
            name.with_suffix(".txt").write_text(f"{kind}\n{text}\n", errors="backslashreplace")


class _Hang(BaseException):
    """No Exception, so that no reader takes it for a damaged file."""


def _ring(*_) -> None:
    raise _Hang


def _child(name: str, seconds: float, corpus: Path, out: Path) -> None:
    signal.signal(signal.SIGPROF, _ring)  # time of the processor: others may need it too
    try:
        import atheris
    except ImportError:
        atheris = None
    kept = sys.stdout
    if atheris is not None:
        # the loaders that are made of Python; the others are libraries in C
        with atheris.instrument_imports(include=["ngd_fast", "yaml", "zipfile", "mne.io.edf"]):
            harness = Harness(name, out)
            _warm_up(harness)
    else:
        harness = Harness(name, out)
        _warm_up(harness)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    harness.watch()
    end, told = time.monotonic() + seconds, time.monotonic()

    def one(data: bytes) -> None:
        nonlocal told
        harness.run(data)
        if time.monotonic() - told > 2:
            told = time.monotonic()
            _tell(harness, out, kept)
        if time.monotonic() > end:
            _tell(harness, out, kept)
            os._exit(0)

    rng = random.Random(time.time_ns())
    if atheris is None:
        pool = [path.read_bytes() for path in corpus.iterdir()]
        while True:
            one(mutate(rng.choice(pool), rng))

    def custom(data: bytes, size: int, seed: int) -> bytes:
        local = random.Random(seed)
        return atheris.Mutate(data, size) if local.random() < 0.5 else mutate(data, local, size)

    options = ["-max_len=131072", f"-timeout={12 * SECONDS}", "-rss_limit_mb=6000"]
    options.append(f"-artifact_prefix={out}/{name}-died-")
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=custom)
    atheris.Fuzz()


def _warm_up(harness: Harness) -> None:
    """The first input pays for the imports; all seeds are accepted, or the harness itself is wrong."""
    seeds = harness.target.seeds()
    for seed in seeds:
        harness.run(seed)
    if not harness.counts["accepted"]:
        raise SystemExit(f"{harness.name}: accepts none of its own seeds: {harness.findings}")
    harness.counts.clear()


def _tell(harness: Harness, out: Path, file) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    counts = {**harness.counts, "peak_mb": peak, "kinds": len(harness.findings)}
    (out / f"{harness.name}.{os.getpid()}.json").write_text(json.dumps(counts))


def _turn(name: str, seconds: float, out: Path) -> None:
    """Fuzz one target for a while; a child that dies is a finding, and is started again."""
    corpus = out / "corpus" / name
    if not corpus.is_dir():
        from ngd_fast.bench.fuzz_runs import TARGETS

        corpus.mkdir(parents=True)
        for number, seed in enumerate(TARGETS[name].seeds()):
            (corpus / f"seed{number}").write_bytes(seed)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 1:
        command = [sys.executable, "-m", "ngd_fast.bench.fuzz", "--child", name]
        command += ["--seconds", str(left), "--out", str(out)]
        with open(out / f"{name}.log", "ab") as log:
            done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            with open(out / f"{name}-deaths.txt", "a") as file:
                file.write(f"exit {done.returncode}\n")


def summary(out: Path, names) -> list[tuple]:
    """(target, inputs, accepted, findings, kinds, deaths, peak MB) of what lies in ``out``."""
    rows = []
    for name in names:
        told = [json.loads(path.read_text()) for path in out.glob(f"{name}.*.json")]
        total = {key: sum(t.get(key, 0) for t in told) for key in ("inputs", "accepted", "findings")}
        deaths = out / f"{name}-deaths.txt"
        rows.append((name, *total.values(), len(list(out.glob(f"{name}-*.bin"))),
                     len(deaths.read_text().splitlines()) if deaths.exists() else 0,
                     max((t["peak_mb"] for t in told), default=0)))  # fmt: skip
    return rows


def main() -> None:
    from ngd_fast.bench.fuzz_runs import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="over all targets")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--out", type=Path, default=Path("fuzz"), help="corpus, findings and counts")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each target gets")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    if options.child:
        _child(options.child, options.seconds, out / "corpus" / options.child, out)
    out.mkdir(parents=True, exist_ok=True)
    for _ in range(options.rounds):
        for name in options.targets:
            _turn(name, options.minutes * 60 / options.rounds / len(options.targets), out)
    print(f"{'target':16}{'inputs':>10}{'accepted':>10}{'findings':>10}{'kinds':>7}{'deaths':>8}{'peak MB':>9}")
    for name, *numbers in summary(out, options.targets):
        print(f"{name:16}{numbers[0]:>10}{numbers[1]:>10}{numbers[2]:>10}{numbers[3]:>7}{numbers[4]:>8}{numbers[5]:>9}")


if __name__ == "__main__":
    main()
