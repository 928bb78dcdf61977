"""A BIDS dataset written by MNE-BIDS itself."""

import numpy as np
import pytest

from ngd_fast.cli import main
from ngd_fast.eeg.bids import open_bids
from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.eeg.trials import Exclusions
from ngd_fast.errors import UserError

mne = pytest.importorskip("mne")
mne_bids = pytest.importorskip("mne_bids")
pytest.importorskip("pybv")
RATE = 128
CHANNELS = ("Fp1", "Fp2", "F3", "F4", "C3", "Cz", "C4", "P3", "P4", "O1", "O2")


def signals(seed):
    return 1e-5 * np.random.default_rng(seed).normal(size=(len(CHANNELS), 30 * RATE))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two subjects, two films and a pause each; ratings in the first one's events.tsv."""
    root = tmp_path_factory.mktemp("bids") / "lab"
    for seed, subject in enumerate(("01", "02")):
        info = mne.create_info(list(CHANNELS), RATE, "eeg", verbose="error")
        raw = mne.io.RawArray(signals(seed), info, verbose="error")
        raw.set_montage("standard_1005", verbose="error")
        raw.info["bads"], raw.info["line_freq"] = ["C3"], 50
        raw.set_annotations(mne.Annotations([2, 12, 20], [8, 2, 8], ["film", "pause", "film"]))
        path = mne_bids.BIDSPath(subject=subject, task="affect", root=root, datatype="eeg")
        mne_bids.write_raw_bids(raw, path, allow_preload=True, format="BrainVision", overwrite=True, verbose="error")
    events = root / "sub-01" / "eeg" / "sub-01_task-affect_events.tsv"
    lines = events.read_text().splitlines()
    cells = ["valence\tarousal", "9\t1", "n/a\tn/a", "5\t7"]
    events.write_text("\n".join(f"{line}\t{cell}" for line, cell in zip(lines, cells)) + "\n")
    return root


def read_all(*args, **options):
    exclusions = Exclusions()
    source = open_bids(*args, **options)
    return source, list(source.trials(exclusions)), exclusions.counts


def test_rated_events_are_the_trials(dataset):
    source, trials, _ = read_all(dataset, "affect", rating_range=(1, 9), baseline=1)
    assert [(t.subject, t.trial, t.valence, t.arousal) for t in trials] == [(1, 1, 1, -1), (1, 2, 0, 0.5)]
    rows = [CHANNELS.index(name) for name in source.channels]
    expected = signals(0)[rows, 20 * RATE : 28 * RATE] * 1e6
    good = [i for i, name in enumerate(source.channels) if name != "C3"]
    np.testing.assert_allclose(trials[1].stimulus[good], expected[good], atol=0.06)
    assert np.isnan(trials[1].stimulus[source.channels.index("C3")]).all()
    assert trials[1].baseline.shape == (11, RATE)
    assert any(name.startswith("sub-01/eeg/") for name in source.meta["files"])


def test_ratings_of_a_phenotype_table(dataset, tmp_path):
    table = tmp_path / "sam.tsv"
    table.write_text("participant_id\ttrial\tvalence\tarousal\nsub-01\t1\t1\t1\nsub-02\t2\t5\t3\n")
    _, trials, _ = read_all(dataset, "affect", events=["film"], ratings=table, rating_range=(1, 5))
    assert [(t.subject, t.trial) for t in trials] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    np.testing.assert_array_equal([t.valence for t in trials], [-1, np.nan, np.nan, 1])
    table.write_text("participant_id\ttrial_type\tvalence\tarousal\n2\tfilm\t5\t3\n")
    _, trials, _ = read_all(dataset, "affect", events=["film"], ratings=table, rating_range=(1, 5))
    np.testing.assert_array_equal([t.arousal for t in trials], [np.nan, np.nan, 0, 0])


def test_the_command(dataset, tmp_path, capsys):
    arguments = [
        "bids",
        str(dataset),
        "--task",
        "affect",
        "--event",
        "film",
        "--stop",
        "+4",
        "--rating-range",
        "1",
        "9",
    ]
    with pytest.raises(SystemExit) as end:
        main(["eeg", *arguments, "--out", str(tmp_path)])
    assert end.value.code == 0, capsys.readouterr().err
    maps = Topomaps.load(tmp_path / "lab_topomaps_all.npz")
    assert len(maps) == 8 and maps.labelled.tolist() == [True] * 4 + [False] * 4
    assert maps.meta["rebuilt_channels"] == {"C3": 4} and maps.meta["subjects"] == {"01": 1, "02": 2}


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("rest", {}, "no EEG of task rest; there are the tasks affect"),
        ("affect", {}, "on which scale are the ratings given"),
        ("affect", {"events": ["clip"]}, "no event of trial_type clip in the events.tsv of task affect"),
        (
            "affect",
            {"events": ["film"], "stop": "clap", "rating_range": (1, 9)},
            r"no event clap in .*; there are film \(2\), pause \(1\)",
        ),
        ("affect", {"events": ["film"], "stop": "+60", "rating_range": (1, 9)}, "does not lie in"),
    ],
)
def test_the_users_faults(dataset, task, options, message):
    with pytest.raises(UserError, match=message):
        open_bids(dataset, task, **options)
    with pytest.raises(UserError, match="no such folder"):
        open_bids(dataset / "none", task)


def test_ratings_of_nobody(dataset, tmp_path):
    (tmp_path / "sam.tsv").write_text("participant_id\ttrial\tvalence\tarousal\nsub-09\t1\t1\t1\n")
    with pytest.raises(UserError, match="rates none of the 4 trials"):
        open_bids(dataset, "affect", events=["film"], ratings=tmp_path / "sam.tsv", rating_range=(1, 9))
