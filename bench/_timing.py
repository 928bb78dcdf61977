"""How times are taken, and on what machine."""

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

Call = Callable[[], object]
_ROUNDS = 15  # at least
_TURN = 0.02  # seconds, at most, where a call takes no longer

gate: Path | None = None
"""Where processes prepare side by side (gpu-check): a file that this one makes when it is ready; it measures once that
file is gone."""


def await_gate() -> None:
    """Wait, prepared, until nobody else uses the machine; at once where nobody prepares beside us."""
    global gate
    if gate is not None:
        mine, gate = gate, None
        mine.touch()
        while mine.exists():
            time.sleep(0.01)


def median_us(calls: dict[str, Call], device: torch.device, *, seconds: float = 0.3) -> dict[str, float]:
    """Median microseconds of a call of each, taken in turns, so that a change of clock or load meets all alike.

    The slowest takes about ``seconds``. A turn is so many calls that it takes some milliseconds; on a GPU it ends with
    one synchronisation, so the time is the larger of the host's and the device's for each call.
    """
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    turn, repeats, slowest = min(_TURN, seconds / _ROUNDS), {}, 0.0
    for call in calls.values():
        for _ in range(3):
            call()
    synchronise()
    await_gate()
    for name, call in calls.items():
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        once = max(time.perf_counter() - start, 1e-7)
        repeats[name] = max(1, round(turn / once))
        slowest = max(slowest, repeats[name] * once)
    times = {name: [] for name in calls}
    for _ in range(max(_ROUNDS, round(seconds / slowest))):
        for name, call in calls.items():
            synchronise()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            synchronise()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def cold_us(calls: dict[str, Call], device: torch.device, *, rounds: int = 25) -> dict[str, float]:
    """Median microseconds of one call that finds nothing of its own in the GPU's L2.

    Before each call a buffer of four times the L2 is read (not written: dirty lines would have to be evicted during the
    call). Meant for graph replays: the device is still busy with the buffer when the replay is enqueued.
    """
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    other = torch.ones(l2, dtype=torch.float32, device=device)
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.sum()
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def in_graph(call: Call, times: int = 1) -> Call:
    """Capture ``times`` calls into a CUDA graph (their inputs are static) and return the replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            result = call()

    def replay():
        graph.replay()
        return result  # what the graph writes to must live as long as the graph

    return replay


def peak_extra_bytes(call: Call, device: torch.device) -> int | None:
    """Device memory that a call holds at its peak beyond what was there before; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def machine(device: torch.device) -> dict[str, str]:
    """What a table must say beside its numbers: date, commit, processor, GPU, versions, threads."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
        about["cuda"] = str(torch.version.cuda)
    return about


def describe(about: dict[str, str]) -> str:
    """One line of ``machine()``."""
    return ", ".join(f"{name} {value}" for name, value in about.items())


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
