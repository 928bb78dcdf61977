import numpy as np
import pytest
from scipy.io import loadmat, savemat

from ngd_fast.eeg.dreamer import EMOTIV_CHANNELS, open_dreamer
from ngd_fast.eeg.mat5 import Mat5Reader
from ngd_fast.eeg.trials import Exclusions, scale_rating
from ngd_fast.errors import UserError
from ngd_fast.synthetic.recordings import write_dreamer

h5py = pytest.importorskip("h5py")


def read_all(path):
    exclusions = Exclusions()
    source = open_dreamer(path)
    return source, list(source.trials(exclusions)), exclusions.counts


def rewrite(path, target, change):
    """Copy a v5 file with ``change(struct)`` applied to its DREAMER record."""
    content = loadmat(path)["DREAMER"]
    changed = change(content)
    savemat(target, {"DREAMER": content if changed is None else changed})
    return target


def test_files_have_the_real_ones_types_and_access_path(dreamer_mat):
    root = loadmat(dreamer_mat)["DREAMER"]
    assert root.shape == (1, 1) and root[0, 0]["Data"].shape == (1, 3)
    subject = root[0, 0]["Data"][0, 2]
    assert subject["EEG"][0, 0]["stimuli"][0, 0].shape == (4, 1)
    stimulus = subject["EEG"][0, 0]["stimuli"][0, 0][1, 0]
    assert stimulus.shape == (round(9.5 * 128), 14) and stimulus.dtype == np.float64
    assert 3500 < stimulus.mean() < 4700  # uV: the headset's offset
    assert subject["EEG"][0, 0]["baseline"][0, 0][0, 0].shape == (5 * 128, 14)
    scores = subject["ScoreValence"][0, 0]
    assert scores.shape == (4, 1) and scores.dtype == np.uint8 and 1 <= scores.min() <= scores.max() <= 5
    assert [str(name[0]) for name in root[0, 0]["EEG_Electrodes"].ravel()] == list(EMOTIV_CHANNELS)


def test_trials_are_those_of_the_file(dreamer_mat):
    source, trials, left_out = read_all(dreamer_mat)
    assert source.channels == EMOTIV_CHANNELS and source.count == len(trials) == 12 and not left_out
    assert [(t.subject, t.trial) for t in trials] == [(s, c) for s in (1, 2, 3) for c in (1, 2, 3, 4)]
    subject = loadmat(dreamer_mat)["DREAMER"][0, 0]["Data"][0, 1]
    trial = trials[6]
    np.testing.assert_array_equal(trial.stimulus, subject["EEG"][0, 0]["stimuli"][0, 0][2, 0].T)
    np.testing.assert_array_equal(trial.baseline, subject["EEG"][0, 0]["baseline"][0, 0][2, 0].T)
    assert trial.rate == 128.0
    # 1 and 2 are below the middle of 3: in uint8 arithmetic they would come out at 254 and 255.
    for t in trials:
        saved = loadmat(dreamer_mat)["DREAMER"][0, 0]["Data"][0, t.subject - 1]["ScoreValence"][0, 0][t.trial - 1, 0]
        assert t.valence == (float(saved) - 3) / 2
    assert min(t.valence for t in trials) < 0


def test_v73_holds_the_same(tmp_path):
    options = dict(subjects=2, clips=3, seconds=3, baseline_seconds=2, seed=4, with_ecg=True)
    a = read_all(write_dreamer(tmp_path / "a.mat", **options))
    b = read_all(write_dreamer(tmp_path / "b.mat", **options, version="v7.3"))
    assert a[0].channels == b[0].channels and len(a[1]) == len(b[1]) == 6
    for one, other in zip(a[1], b[1]):
        np.testing.assert_array_equal(one.stimulus, other.stimulus)
        np.testing.assert_array_equal(one.baseline, other.baseline)
        assert (one.subject, one.trial, one.valence, one.arousal) == (
            other.subject, other.trial, other.valence, other.arousal
        )  # fmt: skip


def test_ratings_of_both_ends_and_the_middle():
    assert [scale_rating(np.uint8(r), 1, 5, "") for r in (1, 2, 3, 4, 5)] == [-1, -0.5, 0, 0.5, 1]
    assert [scale_rating(r, 1, 9, "") for r in (1, 5, 9)] == [-1, 0, 1]
    for wrong in (0, 6, float("nan")):
        with pytest.raises(UserError, match=r"x: rating .* scale from 1 to 5"):
            scale_rating(wrong, 1, 5, "x")


def test_a_subject_with_fewer_clips_is_counted(dreamer_mat, tmp_path, capsys):
    def shorten(root):
        subject = root[0, 0]["Data"][0, 1]
        subject["EEG"][0, 0]["stimuli"][0, 0] = subject["EEG"][0, 0]["stimuli"][0, 0][:2]
        subject["EEG"][0, 0]["baseline"][0, 0] = subject["EEG"][0, 0]["baseline"][0, 0][:2]

    source, trials, left_out = read_all(rewrite(dreamer_mat, tmp_path / "short.mat", shorten))
    assert source.count >= len(trials) == 10
    assert left_out == {"clips that a subject lacks": 2}
    assert "subject 2 has 2 of 4 clips" in capsys.readouterr().err


def test_unusable_trials_are_left_out_and_named(dreamer_mat, tmp_path, capsys):
    def spoil(root):
        subject = root[0, 0]["Data"][0, 0]
        subject["ScoreArousal"][0, 0][1, 0] = 9
        subject["EEG"][0, 0]["stimuli"][0, 0][2, 0] = np.zeros((300, 13))
        subject["EEG"][0, 0]["stimuli"][0, 0][3, 0] = np.zeros((0, 0))

    _, trials, left_out = read_all(rewrite(dreamer_mat, tmp_path / "spoilt.mat", spoil))
    assert len(trials) == 9 and left_out == {"unusable trials": 3}
    said = capsys.readouterr().err
    assert "subject 1, clip 2: rating 9 is not on the scale from 1 to 5" in said
    assert "clip 3, stimulus: must be a matrix of samples x 14 channels, has shape (300, 13)" in said


def test_missing_scores_are_counted(dreamer_mat, tmp_path):
    def shorten(root):
        root[0, 0]["Data"][0, 0]["ScoreArousal"][0, 0] = np.array([[3], [3]], np.uint8)

    assert read_all(rewrite(dreamer_mat, tmp_path / "few.mat", shorten))[2] == {"trials without ratings": 2}


@pytest.mark.parametrize("field", ["Data", "EEG_SamplingRate", "EEG_Electrodes"])
def test_a_missing_field_is_named(dreamer_mat, tmp_path, field):
    def drop(root):
        return {name: root[0, 0][name] for name in root.dtype.names if name != field}

    with pytest.raises(UserError, match=f"not DREAMER: DREAMER has no field {field}"):
        open_dreamer(rewrite(dreamer_mat, tmp_path / "lacks.mat", drop))


def test_files_that_are_not_dreamer(dreamer_mat, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_dreamer(tmp_path / "none.mat")
    savemat(tmp_path / "other.mat", {"x": np.zeros(3)})
    with pytest.raises(UserError, match="no variable named DREAMER"):
        open_dreamer(tmp_path / "other.mat")
    savemat(tmp_path / "matrix.mat", {"DREAMER": np.zeros(3)})
    with pytest.raises(UserError, match="no field EEG_SamplingRate"):
        open_dreamer(tmp_path / "matrix.mat")
    (tmp_path / "text.mat").write_text("subject,clip\n1,2\n" * 100)
    with pytest.raises(UserError, match="MATLAB file"):
        open_dreamer(tmp_path / "text.mat")
    (tmp_path / "empty.mat").touch()
    with pytest.raises(UserError, match="MATLAB file"):
        open_dreamer(tmp_path / "empty.mat")
    with h5py.File(tmp_path / "other73.mat", "w") as file:
        file["x"] = 1
    with pytest.raises(UserError, match="no variable named DREAMER"):
        open_dreamer(tmp_path / "other73.mat")


@pytest.mark.parametrize("field", ["EEG_SamplingRate", "EEG_Electrodes", "ScoreValence"])
@pytest.mark.parametrize("wrong", ["group", "text"])
def test_a_field_of_another_kind_is_named(tmp_path, field, wrong):
    path = write_dreamer(tmp_path / "D.mat", subjects=1, clips=1, seconds=2, baseline_seconds=2, version="v7.3")
    with h5py.File(path, "r+") as file:
        root = file["DREAMER"]
        parent = root if field in root else file[root["Data"][()].ravel()[0]]
        del parent[field]
        parent.create_group(field) if wrong == "group" else parent.create_dataset(field, data=np.array([b"text"]))
    with pytest.raises(UserError, match=rf"{field}\b.*: (cannot be read|must hold numbers)"):
        read_all(path)


def test_what_stands_behind_the_data_is_checked_when_it_is_reached(dreamer_mat, tmp_path):
    def other_rate(root):
        root["EEG_SamplingRate"][0, 0] = np.array([[200]])  # a new array: scipy's own of one byte is Python's own byte

    path = rewrite(dreamer_mat, tmp_path / "rate.mat", other_rate)
    with pytest.raises(UserError, match=r"EEG_SamplingRate is 200.0, DREAMER's 128.0; save it with -v7.3"):
        read_all(path)

    def before(root):
        other_rate(root)
        return {name: root[0, 0][name] for name in ("EEG_SamplingRate", "EEG_Electrodes", "Data")}

    assert read_all(rewrite(dreamer_mat, tmp_path / "first.mat", before))[1][0].rate == 200


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("big_endian", [True, False])
def test_the_reader_of_v5_reads_what_scipy_does(tmp_path, compress, big_endian):
    rng = np.random.default_rng(0)
    cells = np.empty((2, 1), object)
    cells[0, 0], cells[1, 0] = rng.normal(size=(7, 3)), "text"
    value = {
        "a": np.arange(5, dtype=np.uint8),
        "cells": cells,
        "b": np.float32(2.5),
        "skipped": rng.normal(size=(9, 9)),
    }
    path = tmp_path / "x.mat"
    savemat(path, {"other": np.ones(3), "X": value}, do_compression=compress)
    if big_endian:  # not written by scipy: one matrix by hand
        flags = np.array([6, 8, 6, 0, 5, 8, 2, 3, 1, 1], ">u4").tobytes() + b"X" + bytes(7)
        body = flags + np.array([9, 48], ">u4").tobytes() + np.arange(6, dtype=">f8").tobytes()
        head = b"MATLAB 5.0".ljust(124) + b"\x01\x00MI"
        path.write_bytes(head + np.array([14, len(body)], ">u4").tobytes() + body)
        np.testing.assert_array_equal(Mat5Reader(path, "X").value(), np.arange(6).reshape(3, 2).T)
        return
    reader = Mat5Reader(path, "X")
    read = reader.value(skip=frozenset(["skipped"]))
    reader.finish()
    reader.close()
    assert list(read) == ["a", "cells", "b"] and read["cells"][1] == "text"
    np.testing.assert_array_equal(read["a"], [[0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(read["cells"][0], cells[0, 0])
    with pytest.raises(UserError, match="holds no variable named Y"):
        Mat5Reader(path, "Y")


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.01])
@pytest.mark.parametrize("version", ["v5", "v7.3"])
def test_truncated_files(tmp_path, keep, version):
    path = write_dreamer(tmp_path / "D.mat", subjects=1, clips=1, seconds=2, baseline_seconds=2, version=version)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=r"MATLAB|DREAMER"):
        list(open_dreamer(path).trials(Exclusions()))


def test_a_flipped_byte_never_ends_in_a_traceback(tmp_path):
    whole = write_dreamer(tmp_path / "D.mat", subjects=1, clips=1, seconds=2, baseline_seconds=2)
    rng = np.random.default_rng(0)
    for _ in range(10):
        broken = bytearray(whole.read_bytes())
        broken[rng.integers(130, len(broken))] ^= 0xFF
        (tmp_path / "broken.mat").write_bytes(broken)
        with pytest.raises(UserError):
            read_all(tmp_path / "broken.mat")


def test_equal_seeds_give_equal_signals(tmp_path):
    options = dict(subjects=1, clips=2, seconds=2, baseline_seconds=2)
    first, again, other = (write_dreamer(tmp_path / f"{n}.mat", **options, seed=s) for n, s in enumerate((1, 1, 2)))
    a, b, c = (read_all(p)[1][1].stimulus for p in (first, again, other))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_unknown_versions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="version"):
        write_dreamer(tmp_path / "x.mat", version="v6")
    assert not list(tmp_path.iterdir())
