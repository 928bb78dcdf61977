"""ngd-fast in a process of its own, disturbed from within: what the chaos bench starts.

``python -m ngd_fast.bench._chaos_child PLACE PIPE FAULT ARGUMENT...``: for whatever is done to a file below PLACE a
byte goes to the file descriptor PIPE; at the first one all is imported and the work begins. FAULT: ``none``,
``write=N`` (end without a word just before the N-th), ``memory=BYTES`` (no more than so many from the first on),
``hold=SECONDS`` (wait at the first), ``clock=SEED`` (a clock that jumps).
"""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.chmod"}


def _limit_memory(spare: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare,) * 2)


def _make_clock_jump(seed: str) -> None:
    rng, now, now_ns = random.Random(seed), time.time, time.time_ns
    time.time = lambda: now() + rng.uniform(-1e8, 1e8)
    time.time_ns = lambda: now_ns() + rng.randrange(-(10**17), 10**17)


def main(place: str, pipe: int, fault: str, arguments: list[str]) -> None:
    kind, _, value = fault.partition("=")
    done = 0

    def hook(event, details):
        nonlocal done
        if event not in _EVENTS or place not in str(details[0]):
            return
        done += 1
        os.write(pipe, b".")
        if kind == "write" and done == int(value):
            os.kill(os.getpid(), signal.SIGKILL)
        if done == 1 and kind == "memory":
            _limit_memory(int(value))
        if done == 1 and kind == "hold":
            time.sleep(float(value))

    if kind == "clock":
        _make_clock_jump(value)
    sys.addaudithook(hook)
    from ngd_fast.cli import main as ngd_fast

    ngd_fast(arguments)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
