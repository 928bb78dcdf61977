"""The particle step of the study of coupled flows: 20,000 particles on S^7, carried into 16 features.

    pytest bench/bench_flows.py --benchmark-columns=median,iqr,rounds -s

Each test prints what the step is held against, measured in the same run: a plain Python loop over particles, and the
time in which the memory would move the bytes that the step must (counted; at the bandwidth of a large copy).
"""

import math
import random
import shutil
import statistics
import time

import pytest
import torch
from ngd_fast.bench import _timing

from ngd_fast.flows.manifolds import Wells, named_manifold, random_isometry
from ngd_fast.flows.moves import Walk

PARTICLES, DIMENSION, FEATURES = 20_000, 7, 16
HAS_COMPILER = shutil.which("c++") is not None


def make_walk(compiled):
    generator = torch.Generator().manual_seed(0)
    manifold = named_manifold("sphere", DIMENSION)
    wells = Wells.random(manifold, 3, 6.0, 0.0, generator)
    options = {"particles": PARTICLES, "beta": 1.0, "eps": 0.25, "rule": "barker", "generator": generator}
    return Walk(manifold, wells, compiled=compiled, **options), random_isometry(FEATURES, DIMENSION + 1, generator)


def python_loop(walk, frame, particles):
    """The same step for some particles, one after the other, in plain Python; returns the seconds a particle takes."""
    points = walk.x[:, :particles].T.tolist()
    energies = walk.energy[:particles].tolist()
    centers, rows, eps = walk.wells.centers.tolist(), frame.tolist(), 0.25
    start = time.perf_counter()
    for i, x in enumerate(points):
        noise = [random.gauss(0, 1) for _ in x]
        outward = sum(g * p for g, p in zip(noise, x))
        step = [eps * (g - outward * p) for g, p in zip(noise, x)]
        length = math.sqrt(sum(v * v for v in step))
        along, ahead = math.cos(length), math.sin(length) / length
        z = [along * p + ahead * v for p, v in zip(x, step)]
        after = -math.log(sum(math.exp(sum(c * p for c, p in zip(center, z))) for center in centers))
        if random.random() < 1 / (1 + math.exp(after - energies[i])):
            points[i], energies[i] = z, after
        [sum(a * p for a, p in zip(row, points[i])) for row in rows]
    return (time.perf_counter() - start) / particles


def copy_bandwidth(megabytes=256):
    """Bytes read and written in a second by a copy too large for the caches near the cores."""
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * 4 * source.numel() / statistics.median(times)


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler"))],
    ids=["eager", "compiled"],
)  # fmt: skip
def test_step(benchmark, compiled):
    walk, frame = make_walk(compiled)
    features = torch.empty(FEATURES, PARTICLES)

    def move():
        walk.move()
        torch.mm(frame, walk.x, out=features)

    walk.draw()
    parts = _timing.median_us({"move": walk.move, "features": lambda: torch.mm(frame, walk.x, out=features),
                               "move and features": move, "draw": walk.draw}, torch.device("cpu"))  # fmt: skip

    def step():
        walk.draw()
        move()

    benchmark.pedantic(step, rounds=200, warmup_rounds=10)
    loop = python_loop(walk, frame, 1000) * PARTICLES
    own = benchmark.stats.stats.median
    # a move's own bytes; what the features read again of x is not counted, they could be made while x is at hand
    counted = walk.bytes_moved() + 4 * PARTICLES * FEATURES
    bandwidth = copy_bandwidth()
    least = counted / bandwidth * 1e6
    machine = _timing.machine(torch.device("cpu"))
    benchmark.extra_info.update(machine=machine, counted_bytes=counted, bandwidth=bandwidth, loop_s=loop, **parts)
    print(f"\n{_timing.describe(machine)}, {torch.backends.cpu.get_cpu_capability()}")
    print(", ".join(f"{name} {us:.0f} us" for name, us in parts.items()), f"step {own * 1e6:.0f} us")
    print(f"Python loop {loop * 1e3:.0f} ms: {loop / own:.0f} times the step")
    print(
        f"{counted / 1e6:.2f} MB at {bandwidth / 1e9:.1f} GB/s take {least:.0f} us: move and features "
        f"{parts['move and features'] / least:.1f} times that, the step with its noise {own * 1e6 / least:.1f} times"
    )
