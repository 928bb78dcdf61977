"""pytest-benchmark of the feeds alone: ``pytest bench/bench_feeds.py``. As a table: ``ngd-fast bench feeds``."""

import pytest
import torch
from ngd_fast.bench import _timing, feeds

from ngd_fast.faces.feeds import make_feed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("size", [48, 224])
@pytest.mark.parametrize("kind", feeds.kinds(DEVICE))
def test_epoch(benchmark, kind, size):
    """One epoch of 4,096 faces at batch 128."""
    faces = feeds.make_faces(4096)
    feed = make_feed(faces, kind=kind, batch_size=128, image_size=size, train=True, seed=0, device=DEVICE)
    benchmark.extra_info.update(machine=_timing.machine(DEVICE), images=len(faces))

    def epoch():
        for _ in feed.epoch(0):
            pass
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    try:
        benchmark.pedantic(epoch, rounds=5, warmup_rounds=1)
    finally:
        feed.close()
