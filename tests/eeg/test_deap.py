"""DEAP in both forms, written here in the owners' layout."""

import pickle

import numpy as np
import pytest
from scipy.io import savemat

from ngd_fast.cli import main
from ngd_fast.eeg.deap import open_deap
from ngd_fast.eeg.mahnob import CHANNELS
from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings
from ngd_fast.eeg.trials import Exclusions
from ngd_fast.errors import UserError
from ngd_fast.synthetic.recordings import write_bdf

pytest.importorskip("mne")


def read_all(folder, **options):
    exclusions = Exclusions()
    source = open_deap(folder, **options)
    return source, list(source.trials(exclusions)), exclusions.counts


def write_mat(path, videos=3, seed=0):
    rng = np.random.default_rng(seed)
    data, labels = 10 * rng.normal(size=(videos, 40, 8064)), rng.uniform(1, 9, (videos, 4))
    savemat(path, {"data": data, "labels": labels}, do_compression=True)
    return data, labels


def test_preprocessed(tmp_path):
    written = [write_mat(tmp_path / f"s0{s}.mat", seed=s) for s in (1, 2)]
    (tmp_path / "s03.dat").write_bytes(pickle.dumps({}))
    source, trials, left_out = read_all(tmp_path)
    assert source.channels == CHANNELS and [(t.subject, t.trial) for t in trials] == [
        (s, v) for s in (1, 2) for v in (1, 2, 3)
    ]
    data, labels = written[1]
    np.testing.assert_array_equal(trials[4].baseline, data[1, :32, :384])
    np.testing.assert_array_equal(trials[4].stimulus, data[1, :32, 384:])
    assert (trials[4].valence, trials[4].arousal) == (
        pytest.approx((labels[1, 0] - 5) / 4),
        pytest.approx((labels[1, 1] - 5) / 4),
    )
    assert not left_out and set(source.meta["files"]) == {"s01.mat", "s02.mat"}
    maps = topomaps_from_recordings(open_deap(tmp_path), EegConfig(power={"baseline": "log_ratio"}))
    assert len(maps) == 2 * 3 * 30 and maps.labelled.all()


@pytest.mark.parametrize("state", [1 << 20, 0x18FF00])  # as in Twente and in Geneva, where the channel has no name
def test_original(tmp_path, state):
    rate, seconds, starts = 128, 140, (5, 70)
    rng = np.random.default_rng(0)
    names = [*CHANNELS[16:], *CHANNELS[:16], "EXG1", "EXG2"]
    signals = 10 * rng.normal(size=(34, rate * seconds))
    status = np.full(rate * seconds, state)
    for start in starts:
        for code, second, length in ((3, start - 4, 4), (4, start, 1), (5, start + 60, 3)):
            status[second * rate : (second + length) * rate] |= code
    folder = tmp_path / "data_original"
    folder.mkdir()
    write_bdf(folder / "s01.bdf", names, signals, status, rate)
    if state == 0x18FF00:
        content = (folder / "s01.bdf").read_bytes()
        (folder / "s01.bdf").write_bytes(content.replace(b"Status  ", b"        ", 1))
    (tmp_path / "metadata_csv").mkdir()
    (tmp_path / "metadata_csv" / "participant_ratings.csv").write_text(
        "Participant_id,Trial,Experiment_id,Start_time,Valence,Arousal,Dominance,Liking,Familiarity\n"
        "1,1,33,1,9,1,5,5,5\n1,2,7,2,5,7,5,5,\n2,1,7,2,5,7,5,5,\n"
    )
    source, trials, left_out = read_all(folder)
    assert set(source.channels) == set(CHANNELS) and not left_out
    assert [(t.trial, t.valence, t.arousal) for t in trials] == [(33, 1, -1), (7, 0, 0.5)]
    order = [names.index(c) for c in source.channels]
    np.testing.assert_allclose(trials[1].stimulus, signals[order, 70 * rate : 130 * rate], atol=0.04)
    np.testing.assert_allclose(trials[1].baseline, signals[order, 67 * rate : 70 * rate], atol=0.04)
    (tmp_path / "metadata_csv" / "participant_ratings.csv").unlink()
    with pytest.raises(UserError, match=r"no participant_ratings.csv there or beside it; name it with --ratings"):
        open_deap(folder)


def test_pickles_and_other_folders_are_refused(tmp_path, capsys):
    with pytest.raises(UserError, match=r"holds no s\?\?.mat and no s\?\?.bdf"):
        open_deap(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        open_deap(tmp_path / "none")
    (tmp_path / "s01.dat").write_bytes(pickle.dumps({}))
    with pytest.raises(SystemExit) as end:
        main(["eeg", "deap", str(tmp_path), "--out", str(tmp_path / "o")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert "are Python pickles, which can run any code when they are read; data_preprocessed_matlab holds" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"data": np.zeros((2, 40, 100)), "labels": np.ones((2, 4))},
            r"must be videos x 40 channels x 8064, is \(2, 40",
        ),
        ({"data": np.zeros((2, 40, 8064)), "labels": np.ones((3, 4))}, r"labels must be 2 x 4, is \(3, 4\)"),
        ({"labels": np.ones((2, 4))}, "holds no variable named data"),
        (None, "not a readable MATLAB file"),
    ],
)
def test_files_that_are_not_deap(tmp_path, content, message):
    if content is None:
        (tmp_path / "s01.mat").write_bytes(b"MATLAB" * 30)
    else:
        savemat(tmp_path / "s01.mat", content)
    with pytest.raises(UserError, match=message):
        read_all(tmp_path)
