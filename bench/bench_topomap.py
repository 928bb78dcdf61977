"""Topomaps and the DREAMER-sized pipeline, on the CPU.

    pytest bench/bench_topomap.py --benchmark-columns=median,iqr,rounds -s

The first two print how many times faster the operator is than MNE's loop with everything set up once (positions,
triangulation, grid; what is left for MNE is one interpolation a map). The last one prints the process's peak memory,
its samples (592 MB of float32) included.
"""

import resource
import statistics
import time

import numpy as np
import pytest

from ngd_fast.eeg.dreamer import EMOTIV_CHANNELS
from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings
from ngd_fast.eeg.topomap import TopomapConfig, make_operator
from ngd_fast.eeg.trials import Trial, TrialSource

pytest.importorskip("mne")


def mne_loop(resolution):
    """A function that interpolates one map by MNE's own interpolator, set up beforehand."""
    from mne.viz.topomap import _make_head_outlines, _setup_interp

    sphere = np.array(TopomapConfig().sphere)
    positions = make_operator(EMOTIV_CHANNELS).positions
    outlines = _make_head_outlines(sphere, positions, "head", (0.0, 0.0))
    _, x, y, interpolator = _setup_interp(positions, resolution, "cubic", "head", outlines, "mean")
    interpolator.set_locations(x, y)
    return lambda values: interpolator.set_values(values)()


def median_seconds(function, rounds):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.mark.parametrize("resolution", [32, 64])
def test_operator_against_mnes_loop(benchmark, resolution):
    values = np.random.default_rng(0).normal(scale=10, size=(5000, 14)).astype(np.float32)
    operator = make_operator(EMOTIV_CHANNELS, TopomapConfig(resolution=resolution))
    out = np.empty((len(values), resolution, resolution), np.float32)
    benchmark.pedantic(operator.render, args=(values,), kwargs={"out": out}, rounds=30, warmup_rounds=3)
    draw = mne_loop(resolution)
    mne = median_seconds(lambda: [draw(v) for v in values[:50].astype(float)], rounds=9) / 50
    own = benchmark.stats.stats.median / len(values)
    benchmark.extra_info.update(us_per_map=own * 1e6, mne_us_per_map=mne * 1e6, times_faster=mne / own)
    print(
        f"\n{resolution}x{resolution}: {own * 1e6:.2f} us a map, MNE {mne * 1e6:.0f} us: {mne / own:.0f} times faster"
    )


def test_dreamer_from_samples_to_maps(benchmark):
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((23 * 18, 14, 199 * 128), dtype=np.float32)
    samples *= 20
    samples += 4100

    def trials(exclusions):
        for i, stimulus in enumerate(samples):
            yield Trial(i // 18 + 1, i % 18 + 1, stimulus, None, 128.0, 0.0, 0.0, f"trial {i}")

    source = TrialSource("dreamer", EMOTIV_CHANNELS, len(samples), trials)
    topomaps = benchmark.pedantic(topomaps_from_recordings, args=(source, EegConfig(device="cpu")), rounds=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    benchmark.extra_info.update(windows=len(topomaps), peak_gb=peak)
    print(f"\n{len(topomaps)} windows in {benchmark.stats.stats.median:.1f} s, peak memory {peak:.2f} GB")
