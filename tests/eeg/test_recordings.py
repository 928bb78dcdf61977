"""Recordings in every format, written here by MNE, through one table to maps."""

import pickle
import re

import numpy as np
import pytest

from ngd_fast.cli import main
from ngd_fast.eeg.channels import channel_positions
from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings
from ngd_fast.eeg.recordings import open_recordings
from ngd_fast.eeg.trials import Exclusions
from ngd_fast.errors import UserError
from ngd_fast.synthetic.recordings import write_bdf

mne = pytest.importorskip("mne")

CHANNELS = ("Fp1", "Fp2", "F3", "F4", "C3", "Cz", "C4", "P3", "P4", "O1", "O2", "T7")
RATE, SECONDS = 128, 24


def make_raw(channels=CHANNELS, rate=RATE, seconds=SECONDS, *, positions=True, seed=0, stim=()):
    """Noise of some 10 uV; ``stim`` are (seconds, code) on a stim channel."""
    rng = np.random.default_rng(seed)
    signals = np.round(10 * rng.normal(size=(len(channels), seconds * rate)).cumsum(axis=1) % 400) * 0.1
    names, kinds = list(channels), ["eeg"] * len(channels)
    if stim:
        line = np.zeros((1, signals.shape[1]))
        for second, code in stim:
            line[0, round(second * rate) : round(second * rate) + 8] = code
        signals, names, kinds = np.vstack([signals, line * 1e6]), [*names, "STI 014"], [*kinds, "stim"]
    raw = mne.io.RawArray(signals * 1e-6, mne.create_info(names, rate, kinds, verbose="error"), verbose="error")
    if positions:
        raw.set_montage("standard_1005", verbose="error")
    return raw


def write_table(path, rows, header="file,start,stop,subject,trial,valence,arousal"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def read_all(table, **options):
    exclusions = Exclusions()
    source = open_recordings(table, rating_range=(1, 9), **options)
    return source, list(source.trials(exclusions)), exclusions.counts


def write_as(raw, folder, kind):
    """The file of a Raw in a format."""
    if kind == "fif":
        raw.save(folder / "a_raw.fif", verbose="error")
        return folder / "a_raw.fif"
    if kind == "epochs":
        data = raw.get_data(picks="eeg")[None]
        mne.EpochsArray(data, raw.copy().pick("eeg").info, verbose="error").save(folder / "a-epo.fif", verbose="error")
        return folder / "a-epo.fif"
    if kind == "bdf":
        signals = raw.get_data(picks="eeg") * 1e6
        status = np.zeros(signals.shape[1], np.int64)
        write_bdf(folder / "a.bdf", list(CHANNELS), signals, status, RATE)
        return folder / "a.bdf"
    pytest.importorskip({"edf": "edfio", "vhdr": "pybv", "set": "eeglabio"}[kind])
    path = folder / f"a.{kind}"
    try:
        mne.export.export_raw(path, raw, verbose="error")
    except RuntimeError as error:  # older ones want other packages
        pytest.skip(f"MNE {mne.__version__}: {error}")
    if not path.exists():
        pytest.skip(f"MNE {mne.__version__} writes a .{kind} file of another name")
    return path


# uV: half a step of 16 bits over the signal's span of 40 uV; of BDF's 24 bits over 524 mV; float32 elsewhere.
RESOLUTION = {"fif": 1e-5, "epochs": 1e-5, "edf": 1e-2, "bdf": 2e-2, "vhdr": 1e-4, "set": 1e-4}


@pytest.mark.parametrize("kind", RESOLUTION)
def test_one_signal_gives_the_same_maps_from_every_format(kind, tmp_path):
    raw = make_raw()
    path = write_as(raw, tmp_path, kind)
    table = write_table(tmp_path / "t.csv", [f"{path.name},2,10,S1,1,9,1", f"{path.name},12,20,S1,2,5,5"])
    source, trials, left_out = read_all(table)
    assert source.channels == CHANNELS and not left_out
    wanted = raw.get_data() * 1e6
    for trial, start in zip(trials, (2, 12)):
        part = wanted[:, start * RATE : (start + 8) * RATE]
        np.testing.assert_allclose(trial.stimulus, part, atol=RESOLUTION[kind])
    assert [(t.subject, t.trial, t.valence, t.arousal) for t in trials] == [(1, 1, 1.0, -1.0), (1, 2, 0.0, 0.0)]
    maps = topomaps_from_recordings(open_recordings(table, rating_range=(1, 9)), EegConfig())
    raw.save(tmp_path / "wanted_raw.fif", verbose="error")
    other = write_table(tmp_path / "u.csv", ["wanted_raw.fif,2,10,1,1,9,1", "wanted_raw.fif,12,20,1,2,5,5"])
    expected = topomaps_from_recordings(open_recordings(other, rating_range=(1, 9)), EegConfig())
    assert np.abs(maps.maps - expected.maps).max() < 0.02
    assert {path.name, "t.csv"} <= set(maps.meta["files"]) and maps.meta["sampling_rates"] == [128.0]


def test_moments_may_be_events(tmp_path):
    raw = make_raw(stim=((3, 7), (9, 8), (13, 7), (19, 8)))
    raw.set_annotations(mne.Annotations([4, 14, 17], [5, 6, 1], ["clip", "clip", "BAD_move"]))
    raw.save(tmp_path / "a_raw.fif", verbose="error")
    header = "file,start,stop,baseline_start,baseline_stop,subject,trial"
    rows = ["a_raw.fif,event:7@1,event:8,-2,,1,1", "a_raw.fif,clip@2,,12.5,13.5,1,2"]
    _, trials, _ = read_all(write_table(tmp_path / "t.csv", rows, header))
    signal = raw.get_data(picks="eeg") * 1e6
    np.testing.assert_allclose(trials[0].stimulus, signal[:, 3 * RATE : 9 * RATE], atol=1e-5)
    np.testing.assert_allclose(trials[0].baseline, signal[:, 1 * RATE : 3 * RATE], atol=1e-5)
    np.testing.assert_allclose(trials[1].stimulus, signal[:, 14 * RATE : 20 * RATE], atol=1e-5)
    assert trials[1].baseline.shape[1] == RATE and np.isnan(trials[1].valence)
    assert trials[1].bad == ((3 * RATE, 4 * RATE),) and trials[0].bad == ()
    # The window from 2 to 4 s of the second trial touches the bad second; its place in the trial stays free.
    maps = topomaps_from_recordings(open_recordings(tmp_path / "t.csv"), EegConfig())
    assert maps.window[maps.trial == 2].tolist() == [0, 2]
    assert maps.meta["exclusions"] == {"windows in bad spans": 1}


def test_events_tsv_beside_the_file_and_named_in_the_table(tmp_path):
    raw = make_raw()
    raw.save(tmp_path / "sub-1_task-x_eeg.fif", verbose="error")
    events = "onset\tduration\ttrial_type\tvalue\n2\t6\tfilm\t3\n10\tn/a\tfilm\t4\n16\t0\tend\t5\n"
    (tmp_path / "sub-1_task-x_events.tsv").write_text(events)
    (tmp_path / "mine.tsv").write_text(events.replace("film", "clip"))
    rows = ["sub-1_task-x_eeg.fif,film@1,,,1,1", "sub-1_task-x_eeg.fif,event:4,end,,1,2"]
    _, trials, _ = read_all(write_table(tmp_path / "t.csv", rows, "file,start,stop,events,subject,trial"))
    assert [t.stimulus.shape[1] / RATE for t in trials] == [6, 6]
    rows = ["sub-1_task-x_eeg.fif,clip@1,+4,mine.tsv,1,1"]
    _, trials, _ = read_all(write_table(tmp_path / "t.csv", rows, "file,start,stop,events,subject,trial"))
    assert trials[0].stimulus.shape[1] == 4 * RATE


def test_epochs_by_number_and_name(tmp_path):
    raw = make_raw()
    events = np.array([[256 * i + 128, 0, 1 + i % 2] for i in range(4)])
    epochs = mne.Epochs(raw, events, {"calm": 1, "fear": 2}, -0.5, 1.5, baseline=None, preload=True, verbose="error")
    epochs.save(tmp_path / "a-epo.fif", verbose="error")
    rows = ["a-epo.fif,fear@2,,-0.5,1,1", "a-epo.fif,epoch@1,+1,,1,2"]
    _, trials, _ = read_all(write_table(tmp_path / "t.csv", rows, "file,start,stop,baseline_start,subject,trial"))
    data = epochs.get_data() * 1e6
    np.testing.assert_allclose(trials[1].stimulus, data[3][:, 64:], atol=1e-5)
    np.testing.assert_allclose(trials[1].baseline, data[3][:, :64], atol=1e-5)
    np.testing.assert_allclose(trials[0].stimulus, data[0][:, 64:192], atol=1e-5)
    write_table(tmp_path / "t.csv", ["a-epo.fif,calm@1,+3,1,1"], "file,start,stop,subject,trial")
    with pytest.raises(UserError, match=r"row 2: the trial from 0.5 to 3.5 s reaches over the end of an epoch"):
        open_recordings(tmp_path / "t.csv")


def test_dressed_names_rates_and_channel_sets_are_reconciled(tmp_path, capsys):
    names = ["EEG Fp1-Ref", "Fp2", "f3.", "F4", "C3", "Cz", "C4", "P3", "P4", "O1", "O2", "T3", "CB1", "EOG1", "A1"]
    make_raw(names, positions=False).save(tmp_path / "a_raw.fif", verbose="error")
    make_raw(CHANNELS[1:], 256).save(tmp_path / "b_raw.fif", verbose="error")
    table = write_table(tmp_path / "t.csv", ["a_raw.fif,2,10,1,1,9,1", "b_raw.fif,2,10,2,1,5,5"])
    source, trials, _ = read_all(table)
    said = capsys.readouterr().err
    assert "a_raw.fif: left out without a position: CB1, A1" in said
    assert "11 channels are common to all 2 files; left out, not in every file: Fp1" in said
    assert "files differ in sampling rate (1 at 128 Hz, 1 at 256 Hz)" in said
    assert source.channels == CHANNELS[1:] and [t.rate for t in trials] == [128, 256]
    source, trials, _ = read_all(table, channels="all")
    assert source.channels == CHANNELS and np.isnan(trials[1].stimulus[0]).all()
    maps = topomaps_from_recordings(open_recordings(table, rating_range=(1, 9), channels="all"), EegConfig())
    assert maps.meta["rebuilt_channels"] == {"Fp1": 1} and len(maps) == 8


def test_bad_channels_are_rebuilt_or_dropped(tmp_path):
    raw = make_raw()
    raw.info["bads"] = ["C3"]
    raw.save(tmp_path / "a_raw.fif", verbose="error")
    table = write_table(tmp_path / "t.csv", ["a_raw.fif,2,10,1,1,9,1"])
    maps = topomaps_from_recordings(open_recordings(table, rating_range=(1, 9)), EegConfig())
    assert maps.meta["rebuilt_channels"] == {"C3": 1} and len(maps.channels) == 12
    source, (trial,), _ = read_all(table, bads="drop")
    assert "C3" not in source.channels and trial.stimulus.shape[0] == 11


def test_positions_of_the_file_count(tmp_path):
    raw = make_raw(["E1", "E2", "E3", "E4", "E5"], positions=False)
    places = {"E1": "F3", "E2": "F4", "E3": "Cz", "E4": "O1", "E5": "O2"}
    known = mne.channels.make_standard_montage("standard_1005").get_positions()
    positions = {name: known["ch_pos"][place] for name, place in places.items()}
    fiducials = {k: known[k] for k in ("nasion", "lpa", "rpa")}
    raw.set_montage(mne.channels.make_dig_montage(positions, **fiducials, coord_frame="mri"), verbose="error")
    raw.save(tmp_path / "a_raw.fif", verbose="error")
    table = write_table(tmp_path / "t.csv", ["a_raw.fif,2,10,1,1,9,1"])
    source = open_recordings(table, rating_range=(1, 9))
    np.testing.assert_allclose(source.positions, channel_positions(list(places.values()), "standard_1005"), atol=1e-6)
    assert len(topomaps_from_recordings(source, EegConfig())) == 4
    with pytest.raises(UserError, match="no electrode in common"):
        open_recordings(table, rating_range=(1, 9), montage="standard_1020")


def test_wrong_units_are_named(tmp_path, capsys):
    raw = make_raw()
    for factor, advice in ((1e6, "1e-06"), (1e-6, "1e+06"), (1e3, "0.001")):
        wrong = mne.io.RawArray(raw.get_data() * factor, raw.info, verbose="error")
        wrong.save(tmp_path / "a_raw.fif", overwrite=True, verbose="error")
        table = write_table(tmp_path / "t.csv", ["a_raw.fif,2,10,1,1,9,1"])
        with pytest.raises(UserError, match=rf"the file's unit is wrong .*--scale {advice.replace('+', '.')} "):
            read_all(table)
    source, (trial,), _ = read_all(table, scale=1e-3)
    np.testing.assert_allclose(trial.stimulus, raw.get_data(start=256, stop=1280) * 1e6, atol=1e-3)


def test_memory_stays_that_of_one_trial(tmp_path, monkeypatch):
    make_raw(seconds=60).save(tmp_path / "a_raw.fif", verbose="error")
    table = write_table(tmp_path / "t.csv", [f"a_raw.fif,{s},{s + 4},1,{s},9,1" for s in range(0, 56, 5)])
    asked = []
    original = mne.io.BaseRaw.get_data

    def spy(self, *args, start=0, stop=None, **options):
        asked.append(stop - start)
        return original(self, *args, start=start, stop=stop, **options)

    monkeypatch.setattr(mne.io.BaseRaw, "get_data", spy)
    opened = []
    reader = mne.io.read_raw
    monkeypatch.setattr(mne.io, "read_raw", lambda *a, **k: opened.append(a) or reader(*a, **k))
    assert len(read_all(table)[1]) == 12
    assert max(asked) == 4 * RATE and len(opened) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a_raw.fif,20,30,1,1,9,1", "row 2: the trial from 20 to 30 s does not lie in"),
        ("a_raw.fif,20,19,1,1,9,1", "row 2: the trial from 20 to 19 s does not lie in"),
        ("a_raw.fif,2,6,1,1,9,1\na_raw.fif,5,9,1,2,9,1", "row 2 and .*row 3 overlap in"),
        ("a_raw.fif,2,6,1,1,9,1\na_raw.fif,7,9,1,1,9,1", "are both subject 1, trial 1"),
        ("a_raw.fif,clap,6,1,1,9,1", r"row 2: start: no event clap in .*; there are clip \(2\)"),
        ("a_raw.fif,clip,6,1,1,9,1", r"has 2 events clip; say which, from clip@1 to clip@2"),
        ("a_raw.fif,clip@3,6,1,1,9,1", r"has 2 events clip, not 3"),
        ("a_raw.fif,12,clip,1,1,9,1", r"no event clip after 12 s"),
        ("a_raw.fif,2,,1,1,9,1", r"row 2: has no stop"),
        ("a_raw.fif,2,6,1,1,9,10", "row 2, arousal: rating 10 is not on the scale from 1 to 9"),
        ("none.edf,2,6,1,1,9,1", "none.edf: no such file"),
        ("t.csv,2,6,1,1,9,1", "t.csv: MNE cannot read it as a recording"),
        ("half_raw.fif,2,6,1,1,9,1", "half_raw.fif"),
        ("s.dat,2,6,1,1,9,1", "s.dat: is a Python pickle, which can run any code when read"),
        ("eyes_raw.fif,2,6,1,1,9,1", "no electrode in common"),
        ("a_raw.fif,2,6,1,1,9,1\neyes_raw.fif,7,9,1,2,9,1", "no electrode in common"),
        ("twins_raw.fif,2,6,1,1,9,1", "T3 and T7 are both T7"),
    ],
)
def test_the_users_faults_are_one_line(row, message, tmp_path, capsys):
    raw = make_raw()
    raw.set_annotations(mne.Annotations([4, 10], [0, 0], ["clip", "clip"]))
    raw.save(tmp_path / "a_raw.fif", verbose="error")
    make_raw(["EOG1", "EOG2"], positions=False).save(tmp_path / "eyes_raw.fif", verbose="error")
    make_raw(["T3", "T7", "Cz", "Fz"], positions=False).save(tmp_path / "twins_raw.fif", verbose="error")
    content = (tmp_path / "a_raw.fif").read_bytes()
    (tmp_path / "half_raw.fif").write_bytes(content[: len(content) // 8])
    (tmp_path / "s.dat").write_bytes(pickle.dumps({"data": [1]}))
    table = write_table(tmp_path / "t.csv", [row])
    with pytest.raises(SystemExit) as end:
        main(["eeg", "recordings", str(table), "--rating-range", "1", "9", "--out", str(tmp_path / "o")])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(said) == 1 and re.search(message, said[0]), said
    assert not (tmp_path / "o").exists()


def test_subjects_without_a_number_are_numbered(tmp_path, capsys):
    make_raw().save(tmp_path / "a_raw.fif", verbose="error")
    rows = ["a_raw.fif,2,6,zoe,fear,9,1", "a_raw.fif,8,12,anna,joy,9,1", "a_raw.fif,14,18,zoe,joy,9,1"]
    _, trials, _ = read_all(write_table(tmp_path / "t.csv", rows))
    assert [(t.subject, t.trial) for t in trials] == [(2, 1), (1, 2), (2, 2)]
    assert "column subject numbered: anna 1, zoe 2" in capsys.readouterr().err
    rows[1] = rows[1].replace("anna", "S7")
    with pytest.raises(UserError, match="column subject must hold a number, is 'zoe'"):
        open_recordings(write_table(tmp_path / "t.csv", rows), rating_range=(1, 9))


def test_the_scale_of_ratings_must_be_said(tmp_path):
    table = write_table(tmp_path / "t.csv", ["a_raw.fif,2,6,1,1,9,1"])
    with pytest.raises(UserError, match="on which scale are valence and arousal given"):
        open_recordings(table)
