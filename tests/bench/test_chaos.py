"""Faults at random, a few of each kind; ``python -m ngd_fast.bench.chaos`` has many, on every kind of job."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from ngd_fast.bench import chaos

pytestmark = pytest.mark.slow  # a minute on two quiet cores

JOBS = "vision teacher|data ckplus|predict"
# atomic_path as it must not be: the file itself is written, so that a kill leaves half of it.
IN_PLACE = """
import contextlib, sys
from ngd_fast.artifacts import files
@contextlib.contextmanager
def in_place(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(9):
        path.write_text("half")
    yield path
files.atomic_path = in_place
from ngd_fast.bench import chaos
sys.exit(chaos.main(sys.argv[1:]))
"""


def run(folder, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--out", str(folder)], env=environment, capture_output=True, text=True, timeout=290
    )
    return done, [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    return folder, *run(folder, "-m", "ngd_fast.bench.chaos", "--kills", "12", "--others", "1", "--only", JOBS)


@pytest.mark.parametrize("kind", chaos.KINDS)
def test_nothing_is_lost(disturbed, kind):
    _, done, trials = disturbed
    own = [trial for trial in trials if trial["kind"] == kind]
    if kind in chaos.DISK and not own:
        pytest.skip(f"{kind}: no tmpfs can be mounted here")
    assert sum(trial["hit"] for trial in own) >= (6 if kind.startswith("kill") else 1), done.stderr
    assert [trial for trial in own if trial["lost"]] == []
    if kind in chaos.DISK:
        assert all(trial["said"] for trial in own), "a disk that cannot be written is said in a line"


def test_it_ends_with_0_and_goes_on_where_it_was(disturbed):
    folder, done, trials = disturbed
    assert done.returncode == 0, done.stderr
    assert "two at once" in done.stdout and "lost" in done.stdout
    again, more = run(folder, "-m", "ngd_fast.bench.chaos", "--kills", "12", "--others", "1", "--only", JOBS)
    assert again.returncode == 0 and more == trials


def test_files_written_in_place_are_found(disturbed, tmp_path):
    shutil.copytree(disturbed[0] / "data", tmp_path / "data")
    done, trials = run(tmp_path, "-c", IN_PLACE, "--kills", "6", "--others", "0", "--only", "data ckplus")
    assert done.returncode == 1
    assert any("as undisturbed" in trial["lost"] or "not whole" in trial["lost"] for trial in trials), done.stderr
