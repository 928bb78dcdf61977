"""Every reader on mutated files, the same in each run: what ``python -m ngd_fast.bench.fuzz`` does for an hour."""

import random
import signal

import pytest
from ngd_fast.bench import fuzz
from ngd_fast.bench.fuzz_runs import TARGETS
from ngd_fast.bench.fuzz_targets import Target

from ngd_fast.errors import UserError

# Inputs each; those that compute or draw take fewer.
COUNTS = dict.fromkeys(TARGETS, 60) | dict.fromkeys(("run", "eeg_yaml", "mat_v5", "mat_v73", "bdf", "eeg_table"), 12)
NEEDS = {"mat_v73": "h5py", "bdf": "mne", "session_xml": "mne", "eeg_table": "mne", "eeg_yaml": "mne", "mat_v5": "mne",
         "run": "matplotlib", "log": "matplotlib"}  # fmt: skip


@pytest.fixture
def ring():
    before = signal.signal(signal.SIGPROF, fuzz._ring)
    yield
    signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_a_line_and_no_crash(name, ring):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    harness, rng = fuzz.Harness(name), random.Random(0)
    seeds = harness.target.seeds()
    for seed in seeds:
        harness.run(seed)
    assert harness.counts["accepted"], "accepts none of its own seeds"
    for _ in range(COUNTS[name]):
        harness.run(fuzz.mutate(rng.choice(seeds), rng))
    assert harness.findings == {}


@pytest.mark.parametrize(("run", "kind"), [(lambda *_: [][0], "IndexError"), (lambda *_: fuzz._ring(), "hang")])
def test_the_harness_tells_what_a_reader_must_not_do(run, kind, ring, monkeypatch, tmp_path):
    monkeypatch.setitem(TARGETS, "bad", Target(run, lambda: [b""]))
    harness = fuzz.Harness("bad", tmp_path)
    harness.run(b"")
    harness.run(b"again")
    assert [found.split()[0] for found in harness.findings] == [kind] and harness.counts["findings"] == 2
    assert [path.read_bytes() for path in tmp_path.glob("bad-*.bin")] == [b""]


def test_what_is_written_outside_or_run_is_noted(tmp_path):
    """The hook itself stays for the life of a process, so that it is called here."""
    harness = fuzz.Harness("log")
    harness.folder = tmp_path / "input"
    harness._audit("open", (str(tmp_path / "input" / "a"), "w", 1))
    harness._audit("open", ("/etc/passwd", "r", 0))
    assert harness._outside == []
    harness._audit("open", (str(tmp_path / "input" / ".." / "a"), "w", 1))
    harness._audit("subprocess.Popen", ("gs",))
    assert len(harness._outside) == 2


def test_a_users_fault_is_no_finding(ring, monkeypatch):
    def refuse(folder, data):
        raise UserError("no such thing")

    monkeypatch.setitem(TARGETS, "good", Target(refuse, lambda: [b""]))
    harness = fuzz.Harness("good")
    harness.run(b"x")
    assert harness.counts == {"inputs": 1} and not harness.findings
