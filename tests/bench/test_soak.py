"""Nothing grows; ``python -m ngd_fast.bench.soak`` looks for longer."""

import json
import os
import subprocess
import sys

import pytest
from ngd_fast.bench import soak

# Growth over 100 iterations that is none: allocators settle for longer than a test lasts. A batch of faces or a figure
# kept each time would be 100 to 1000 of them.
AT_MOST = {"RSS, KiB": 30_000, "open files": 5, "threads": 5, "children": 1, "temporary files": 5}


def test_slopes_find_what_grows():
    samples = [[1000 + 30 * i, 7, 3, 0, i % 2] for i in range(50)]
    found = soak.slopes(samples)
    assert found["RSS, KiB"] == pytest.approx((3000, 0), abs=1e-6)
    assert found["open files"] == found["children"] == (0, 0)
    slope, error = found["temporary files"]
    assert abs(slope) < error * 2 and error > 0


def test_a_look_counts_what_is_open(tmp_path):
    before = soak.look()
    with open(tmp_path / "a", "w"), subprocess.Popen(["sleep", "60"]) as child:
        now = soak.look()
        child.kill()
    assert now[1] == before[1] + 1 and now[3] == before[3] + 1


@pytest.mark.parametrize("part", ["epochs", "predictions"])
def test_nothing_grows(part, tmp_path):
    counts = {"epochs": 60, "evaluations": 0, "predictions": 20}
    options = [f"--{name}={counts[name] if name == part else 0}" for name in counts]
    command = [sys.executable, "-m", "ngd_fast.bench.soak", *options, "--json", str(tmp_path / "soak.json")]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=290)
    (result,) = json.loads((tmp_path / "soak.json").read_text()).values()
    assert result["count"] == counts[part]
    grown = {name: slope for name, (slope, _) in result["slopes"].items() if slope > AT_MOST[name]}
    assert grown == {}
    if part == "epochs":
        sizes = result["bytes an epoch"]
        assert 0 < sizes["log.jsonl"] <= 1024 and 0 < sizes["tb"] <= 2048, "as runlog's documentation says"
