import gzip
import zipfile

import numpy as np
import pandas as pd
import pytest

from ngd_fast.eeg.pipeline import MapConfig
from ngd_fast.eeg.table import TableMapping, topomaps_from_table
from ngd_fast.eeg.topomap import TopomapConfig
from ngd_fast.errors import UserError

pytest.importorskip("mne")

CHANNELS = ("F3", "F4", "T7", "T8", "O1", "O2")
SMALL = MapConfig(topomap=TopomapConfig(resolution=12))


@pytest.fixture
def frame():
    """2 subjects x 2 trials x 3 windows, 6 channels x 2 bands, ratings 1 to 9 of their own."""
    rng = np.random.default_rng(0)
    index = [(s, t, w) for s in (1, 2) for t in (1, 2) for w in (0, 1, 2)]
    data = pd.DataFrame(index, columns=["subject", "trial", "window"])
    for channel in CHANNELS:
        for band in ("alpha", "beta"):
            data[f"{channel}_{band}"] = rng.lognormal(size=len(data))
    data["valence"] = 2.0 * data["trial"] + data["subject"]
    data["arousal"] = 9.0
    return data


def run(frame, tmp_path, config=SMALL, mapping=None, ratings=None, name="t.csv"):
    frame.to_csv(tmp_path / name, index=False)
    if ratings is not None:
        ratings.to_csv(tmp_path / "ratings.csv", index=False)
    return topomaps_from_table(tmp_path / name, config, mapping, None if ratings is None else tmp_path / "ratings.csv")


def test_gameemo_works_out_of_the_box(shared_data):
    folder = shared_data / "gameemo"
    topomaps = topomaps_from_table(folder / "bandpower_12s_2s.csv", MapConfig(), ratings=folder / "sam_scores.csv")
    assert topomaps.maps.shape == (3248, 4, 32, 32) and topomaps.labelled.all()
    assert topomaps.bands.tolist() == ["delta", "theta", "alpha", "beta"]
    table, scores = pd.read_csv(folder / "bandpower_12s_2s.csv"), pd.read_csv(folder / "sam_scores.csv")
    rng = np.random.default_rng(0)
    for i in rng.integers(len(topomaps), size=20):
        s, t = topomaps.subject[i], topomaps.trial[i]
        row = table.query(f"SUBJECT == {s} and GAME == {t} and WINDOW_INDEX == {topomaps.window[i]}").iloc[0]
        channel = topomaps.channels.tolist().index("T7")
        assert topomaps.power[i, channel, 2] == pytest.approx(10 * np.log10(row["T7_Alpha_Power"]), rel=1e-5)
        score = scores[(scores.Subject == f"S{s:02d}") & (scores.Path == f"G{t}.pdf")].iloc[0]
        assert topomaps.valence[i] == (score.Valence - 5) / 4 and topomaps.arousal[i] == (score.Arousal - 5) / 4


def test_own_ratings_and_log_power(frame, tmp_path):
    topomaps = run(frame.sample(frac=1, random_state=0), tmp_path)
    assert topomaps.bands.tolist() == ["alpha", "beta"] and topomaps.channels.tolist() == list(CHANNELS)
    np.testing.assert_array_equal(topomaps.subject, frame["subject"])  # sorted again
    np.testing.assert_allclose(topomaps.valence, (frame["valence"] - 5) / 4)
    np.testing.assert_allclose(topomaps.power[:, 3, 1], 10 * np.log10(frame["T8_beta"]), rtol=1e-5)


def test_mapping_file_names_everything(frame, tmp_path):
    other = frame.rename(columns={"subject": "who", "trial": "film", "window": "part", "valence": "v", "arousal": "a"})
    other.columns = [f"pow.{c.split('_')[1].upper()}.{c.split('_')[0]}" if "_" in c else c for c in other.columns]
    mapping = TableMapping(
        subject="who", trial="film", window="part", valence="v", arousal="a", features="pow.{band}.{channel}"
    )
    np.testing.assert_array_equal(run(other, tmp_path, mapping=mapping).maps, run(frame, tmp_path).maps)


def test_names_as_devices_dress_them_and_channels_without_a_position(frame, tmp_path, capsys):
    plain = run(frame, tmp_path)
    dressed = frame.rename(columns=lambda c: f"EEG {c.replace('_', '-Ref_')}" if c.startswith("F3_") else c)
    dressed = dressed.rename(columns=lambda c: c.replace("O2_", "o2._")).assign(CB1_alpha=1.0, CB1_beta=1.0)
    maps = run(dressed, tmp_path)
    assert maps.channels.tolist() == ["o2" if c == "O2" else c for c in plain.channels]
    np.testing.assert_array_equal(maps.maps, plain.maps)
    assert "left out without a position: CB1" in capsys.readouterr().err


def test_a_column_that_the_mapping_names_must_be_there(frame, tmp_path):
    for role in ("subject", "window", "valence"):
        with pytest.raises(UserError, match=f"no {role} column .looked for zz."):
            run(frame, tmp_path, mapping=TableMapping(**{role: "zz"}))


@pytest.mark.parametrize(("sep", "decimal"), [(";", ","), (";", "."), ("\t", ".")])
def test_tables_as_spreadsheets_write_them(frame, tmp_path, sep, decimal):
    ratings = frame[["subject", "trial", "valence", "arousal"]].drop_duplicates() * [1, 1, 0.5, 1]
    bare = frame.drop(columns=["valence", "arousal"])
    expected = run(bare, tmp_path, ratings=ratings)
    for table, name in ((bare, "t.csv.gz"), (ratings, "ratings.csv")):
        text = table.to_csv(index=False, sep=sep, decimal=decimal) + 2 * (sep * (len(table.columns) - 1) + "\n")
        data = text.encode("utf-8-sig")
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = topomaps_from_table(tmp_path / "t.csv.gz", SMALL, None, tmp_path / "ratings.csv")
    np.testing.assert_array_equal(found.maps, expected.maps)
    np.testing.assert_array_equal(found.valence, expected.valence)


def test_cells_without_a_name_shift_no_column(frame, tmp_path):
    frame = frame[[*frame.columns[3:], "subject", "trial", "window"]]
    expected = run(frame, tmp_path)
    header, *rows = (tmp_path / "t.csv").read_text().splitlines()
    (tmp_path / "t.csv").write_text("\n".join([header, *(f"{row}," for row in rows)]))
    np.testing.assert_array_equal(topomaps_from_table(tmp_path / "t.csv", SMALL).maps, expected.maps)
    (tmp_path / "t.csv").write_text("\n".join([header, *(f"{row},1" for row in rows)]))
    with pytest.raises(UserError, match=r"t\.csv: its rows have more cells than its header has names"):
        topomaps_from_table(tmp_path / "t.csv", SMALL)


def test_windows_without_a_column_are_numbered(frame, tmp_path):
    topomaps = run(frame.drop(columns="window"), tmp_path)
    np.testing.assert_array_equal(topomaps.window, np.tile([0, 1, 2], 4))


def test_bands_can_be_chosen_and_ordered(frame, tmp_path):
    mapping = TableMapping(bands=("beta", "alpha"))
    np.testing.assert_array_equal(run(frame, tmp_path, mapping=mapping).power, run(frame, tmp_path).power[:, :, ::-1])
    with pytest.raises(UserError, match="no column of band gamma"):
        run(frame, tmp_path, mapping=TableMapping(bands=("alpha", "gamma")))


def test_logarithms_can_be_given(frame, tmp_path):
    features = [f"{c}_{b}" for c in CHANNELS for b in ("alpha", "beta")]
    logs = frame.copy()
    logs[features] = 10 * np.log10(frame[features])
    with pytest.raises(UserError, match=r"which has no logarithm; .* log: false"):
        run(logs, tmp_path)
    np.testing.assert_allclose(
        run(logs, tmp_path, mapping=TableMapping(log=False)).maps, run(frame, tmp_path).maps, atol=1e-5
    )


def test_no_ratings_means_unlabelled(frame, tmp_path, capsys):
    topomaps = run(frame.drop(columns=["valence", "arousal"]), tmp_path)
    assert not topomaps.labelled.any() and "--ratings" in capsys.readouterr().err


def test_ratings_are_joined_by_the_number_in_a_name(frame, tmp_path, capsys):
    ratings = pd.DataFrame({
        "Participant": ["S01", "S01", "S02"], "Video": ["clip_1.avi", "clip_2.avi", "clip_1.avi"],
        "Valence": [1, 5, 9], "Arousal": [9, 5, 3],
    })  # fmt: skip
    topomaps = run(frame.drop(columns=["valence", "arousal"]), tmp_path, ratings=ratings)
    felt = {(s, t): v for s, t, v in zip(topomaps.subject.tolist(), topomaps.trial.tolist(), topomaps.valence.tolist())}
    assert felt[1, 1] == -1 and felt[1, 2] == 0 and felt[2, 1] == 1 and np.isnan(felt[2, 2])
    assert "no rating for 1 trials, first subject 2, trial 2" in capsys.readouterr().err


def test_nan_is_mended_or_its_row_left_out_by_choice(frame, tmp_path, capsys):
    frame.loc[4, "T7_beta"] = np.nan
    mended = run(frame, tmp_path)
    assert len(mended) == 12 and mended.meta["rebuilt_channels"] == {"T7": 1}
    left = run(frame, tmp_path, SMALL.model_copy(update={"bad_channels": "exclude"}))
    assert len(left) == 11 and left.meta["exclusions"] == {"rows with bad channels": 1}
    assert "row 6: NaN or flat in T7" in capsys.readouterr().err
    with pytest.raises(UserError, match="row 6: NaN or flat in T7"):
        run(frame, tmp_path, SMALL.model_copy(update={"bad_channels": "error"}))
    frame.loc[5, ["F3_beta", "F4_beta", "O1_alpha"]] = np.nan
    left = run(frame, tmp_path)
    assert len(left) == 11 and left.meta["exclusions"] == {"rows with too many bad channels": 1}


def test_a_channel_without_any_value(frame, tmp_path):
    frame["T7_alpha"] = np.nan
    assert run(frame, tmp_path).meta["rebuilt_channels"] == {"T7": 12}
    with pytest.raises(UserError, match="no usable row; left out: 12 rows with bad channels"):
        run(frame, tmp_path, SMALL.model_copy(update={"bad_channels": "exclude"}))
    left = run(frame, tmp_path, SMALL.model_copy(update={"exclude_channels": ("t7",)}))
    assert left.channels.tolist() == [c for c in CHANNELS if c != "T7"] and not left.meta["rebuilt_channels"]


def test_a_dead_channel_is_named(frame, tmp_path, capsys):
    frame.loc[frame["subject"] == 2, ["T7_alpha", "T7_beta"]] = 0.0
    assert run(frame, tmp_path).meta["rebuilt_channels"] == {"T7": 6}
    assert "rebuilt from their neighbours: T7 6 times" in capsys.readouterr().err
    with pytest.raises(UserError, match="row 8: NaN or flat in T7"):
        run(frame, tmp_path, SMALL.model_copy(update={"bad_channels": "error"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="arousal"), "no arousal column"),
        (lambda f: f.drop(columns="subject"), r"no subject column .*it has trial, window"),
        (lambda f: f.drop(columns="O2_beta"), "no column for O2 beta"),
        (lambda f: f[["subject", "trial", "window"]], "no column looks like"),
        (lambda f: f.iloc[:0], "no rows"),
        (lambda f: pd.concat([f, f.iloc[[7]]]), "subject 2, trial 1, window 1 stands in rows"),
        (lambda f: f.assign(valence=10), "row 2, valence: rating 10 is not on the scale from 1 to 9"),
        (lambda f: f.assign(F3_alpha=["x"] * len(f)), "row 2, column F3_alpha must be a number, is 'x'"),
        (lambda f: f.assign(subject="anna"), "column subject must hold a number, is 'anna'"),
        (lambda f: f.assign(subject=["a1", "b1"] * 6), "'a1' and 'b1', which are both number 1"),
        (
            lambda f: f.assign(subject="S" + "7" * 25),
            "column subject holds numbers of more than 18 digits, such as 'S777",
        ),
        (lambda f: f.assign(F3_alpha=0.0), "F3 alpha is 0, which has no logarithm"),
        (lambda f: f.rename(columns=lambda c: f"X{c}" if "_" in c else c), "no position for XF"),
        (lambda f: f.assign(**{"F3_alpha_power": 1.0}), "both F3 alpha"),
    ],
)
def test_tables_that_cannot_be_used(frame, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(change(frame), tmp_path)


def test_constant_power_is_said(frame, tmp_path):
    for channel in CHANNELS:
        frame[f"{channel}_beta"] = 2.0
    with pytest.raises(UserError, match="beta of subject 1 is the same in every window and channel"):
        run(frame, tmp_path)


def test_ratings_that_cannot_be_used(frame, tmp_path):
    bare = frame.drop(columns=["valence", "arousal"])
    ratings = pd.DataFrame({"subject": [1, 2], "trial": [1, 1], "valence": [3, 3], "arousal": [3, 3]})
    with pytest.raises(UserError, match="rates none of the subjects and trials"):
        run(bare, tmp_path, ratings=ratings.assign(subject=[8, 9]))
    with pytest.raises(UserError, match="subject 1, trial 1 is rated twice, in rows"):
        run(bare, tmp_path, ratings=ratings.assign(subject=1))
    with pytest.raises(UserError, match="row 3, arousal: rating 11"):
        run(bare, tmp_path, ratings=ratings.assign(arousal=[1, 11]))
    with pytest.raises(UserError, match="no arousal column"):
        run(bare, tmp_path, ratings=ratings.drop(columns="arousal"))
    with pytest.raises(UserError, match="no such file"):
        topomaps_from_table(tmp_path / "t.csv", SMALL, None, tmp_path / "none.csv")


def test_files_that_are_no_tables(tmp_path):
    for name, content in (("empty.csv", b""), ("binary.csv", bytes(range(256)) * 4)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: "):
            topomaps_from_table(tmp_path / name, SMALL)


def test_damaged_compressed_tables(frame, tmp_path):
    frame.to_csv(tmp_path / "whole.csv.gz", index=False)
    whole = (tmp_path / "whole.csv.gz").read_bytes()
    damaged = whole[:40] + bytes([whole[40] ^ 255]) + whole[41:]
    with zipfile.ZipFile(tmp_path / "two.csv.zip", "w") as archive:
        for name in ("a.csv", "b.csv"):
            archive.writestr(name, "subject,trial\n1,1\n")
    for name, content in (("cut.csv.gz", whole[:-12]), ("wrong.csv.gz", damaged), ("no.csv.zip", b"PK")):
        (tmp_path / name).write_bytes(content)
    for name in ("cut.csv.gz", "wrong.csv.gz", "no.csv.zip", "two.csv.zip"):
        with pytest.raises(UserError, match=f"{name}: not a readable CSV "):
            topomaps_from_table(tmp_path / name, SMALL)


@pytest.mark.parametrize(
    "changes",
    [{"features": "{channel}"}, {"features": "{channel}_{band}_{band}"}, {"rating_range": (9, 1)}, {"feature": "x"}],
)
def test_mappings_that_are_never_right(changes):
    with pytest.raises(ValueError):
        TableMapping(**changes)
