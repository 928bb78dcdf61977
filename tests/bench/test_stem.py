"""The bench of the stem measures what it says."""

import torch
from ngd_fast.bench import stem


def test_counted_bytes():
    """One image of 16 px: 512 bytes read, 16 pooled pixels of 64 channels at 2 bytes and one for the place."""
    assert stem.counted_bytes(1, 16, "forward") == 512 + 16 * 64 * 3
    assert stem.counted_bytes(1, 16, "both") == 2 * (512 + 16 * 64 * 3)


def test_rows_have_every_column():
    rows = stem.measure(2, 16, torch.device("cpu"), ["eager"], seconds=0.02)
    assert [row["what"] for row in rows] == ["forward", "both"]
    assert all(len(cells) == len(stem.COLUMNS) for cells in stem.table(rows))


def test_a_call_gives_output_or_gradients():
    out = stem.make_call("eager", 2, 16, torch.device("cpu"), "forward")()
    assert out.shape == (2, 64, 4, 4) and out.dtype == torch.bfloat16
    grads = stem.make_call("eager", 2, 16, torch.device("cpu"), "both")()
    assert [grad.shape for grad in grads] == [(64, 3, 7, 7), (64,), (64,)]
