"""Faults at random, a few of each kind; ``python -m ngd_fast.bench.chaos`` has many, on every kind of job."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from ngd_fast.bench import chaos

pytestmark = pytest.mark.slow  # a minute on two quiet cores

# Two that end in a second; a student that is killed stands in tests/student/test_resume.py.
JOBS = "data ckplus|data folder"
HOW_OFTEN = ["--kills", "12", "--others", "1"]
# atomic_path as it must not be: the file itself is written, so that a kill leaves half of it.
IN_PLACE = """
import contextlib
from ngd_fast.artifacts import files
@contextlib.contextmanager
def in_place(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(9):
        path.write_text("half")
    yield path
files.atomic_path = in_place
"""


def run(folder, *options, **environment):
    command = [sys.executable, "-m", "ngd_fast.bench.chaos", "--out", str(folder), *options]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=290)
    return done, [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    return folder, *run(folder, *HOW_OFTEN, "--only", JOBS)


@pytest.mark.parametrize("kind", chaos.KINDS)
def test_nothing_is_lost(disturbed, kind):
    _, done, trials = disturbed
    own = [trial for trial in trials if trial["kind"] == kind]
    if kind in chaos.DISK and not own:
        pytest.skip(f"{kind}: no tmpfs can be mounted here")
    least = 6 if kind.startswith("kill") else 0 if kind == "memory" else 1  # memory: so small a job may have enough
    assert own
    assert sum(trial["hit"] for trial in own) >= least, done.stderr
    assert [trial for trial in own if trial["lost"]] == []
    if kind in chaos.DISK:
        assert all(trial["said"] for trial in own), "a disk that cannot be written is said in a line"


def test_it_ends_with_0_and_goes_on_where_it_was(disturbed):
    folder, done, trials = disturbed
    assert done.returncode == 0, done.stderr
    assert "two at once" in done.stdout and "lost" in done.stdout
    again, more = run(folder, *HOW_OFTEN, "--only", JOBS)
    assert again.returncode == 0 and more == trials


def test_files_written_in_place_are_found(disturbed, tmp_path):
    shutil.copytree(disturbed[0] / "data", tmp_path / "chaos" / "data")
    (tmp_path / "sitecustomize.py").write_text(IN_PLACE)  # Python imports it at each start
    options = ["--kills", "4", "--others", "0", "--only", "data ckplus"]
    done, trials = run(tmp_path / "chaos", *options, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert any("as undisturbed" in trial["lost"] or "not whole" in trial["lost"] for trial in trials), done.stderr
