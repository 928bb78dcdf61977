import shutil

import numpy as np
import pytest

from ngd_fast.eeg import mahnob
from ngd_fast.eeg.mahnob import CHANNELS, open_mahnob
from ngd_fast.eeg.trials import Exclusions, TrialFault
from ngd_fast.errors import UserError
from ngd_fast.synthetic.recordings import write_mahnob

mne = pytest.importorskip("mne")


def read_all(folder, **options):
    exclusions = Exclusions()
    source = open_mahnob(folder, **options)
    return source, list(source.trials(exclusions)), exclusions.counts


@pytest.fixture
def one_session(tmp_path):
    """A writable folder with one rated session; returns (Sessions, session folder, BDF)."""
    sessions = write_mahnob(
        tmp_path / "Sessions", subjects=1, sessions=1, seconds=4, around_seconds=2, unrated=0, seed=3
    )
    (session,) = sessions.iterdir()
    return sessions, session, next(session.glob("*.bdf"))


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_mne_reads_the_made_up_bdf_like_a_real_one(one_session):
    raw = mne.io.read_raw_bdf(one_session[2], preload=True, verbose="error")
    assert raw.info["sfreq"] == 256 and len(raw.ch_names) == 47 and raw.ch_names[-1] == "Status"
    assert raw.ch_names[:32] != list(CHANNELS) and set(raw.ch_names[:32]) == set(CHANNELS)
    events = mne.find_events(raw, "Status", verbose="error")
    assert events[:, 0].tolist() == [2 * 256, 6 * 256]


def test_stimulus_and_baseline_by_name_and_between_events(one_session):
    sessions, session, bdf = one_session
    source, (trial,), left_out = read_all(sessions)
    assert source.channels == CHANNELS and not left_out
    raw = mne.io.read_raw_bdf(bdf, preload=True, verbose="error")
    assert trial.rate == 256
    for i, name in enumerate(CHANNELS):
        signal = raw.get_data(picks=[name])[0] * 1e6
        np.testing.assert_allclose(trial.stimulus[i], signal[512:1536], rtol=1e-12)
        np.testing.assert_allclose(trial.baseline[i], signal[:512], rtol=1e-12)
    assert (trial.subject, trial.trial) == (1, int(session.name))
    assert source.meta["sampling_rates"] == [256.0] and list(source.meta["files"]) == [f"{session.name}/{bdf.name}"]


def test_channel_names_match_in_any_case(one_session):
    sessions, _, bdf = one_session
    expected = read_all(sessions)[1][0].stimulus
    content = bytearray(bdf.read_bytes())
    content[256 : 256 + 16 * 47] = content[256 : 256 + 16 * 47].upper().replace(b"STATUS", b"Status")
    bdf.write_bytes(content)
    np.testing.assert_array_equal(read_all(sessions)[1][0].stimulus, expected)


def test_hidden_files_of_macos_are_no_recordings(one_session):
    sessions, session, bdf = one_session
    for file in (bdf, session / "session.xml"):
        file.with_name(f"._{file.name}").write_bytes(b"Mac OS X")
    source, trials, left_out = read_all(sessions)
    assert len(trials) == 1 and not left_out
    assert list(source.meta["files"]) == [f"{session.name}/{bdf.name}"]


def test_other_sampling_rates_come_from_the_header(tmp_path):
    sessions = write_mahnob(tmp_path / "S", subjects=1, sessions=1, seconds=3, around_seconds=1, rate=512)
    (trial,) = read_all(sessions)[1]
    assert trial.rate == 512 and trial.stimulus.shape == (32, 3 * 512)


def test_ratings_are_mapped_and_unrated_sessions_kept(one_session, tmp_path, capsys):
    sessions, session, _ = one_session
    xml = session / "session.xml"
    original = xml.read_text()
    number = original.split('feltVlnc="')[1][0]
    trial = read_all(sessions)[1][0]
    assert trial.valence == (int(number) - 5) / 4
    for change in (('feltVlnc="', 'other="'), (f'feltVlnc="{number}"', 'feltVlnc="not-reported"')):
        xml.write_text(original)
        edit(xml, *change)
        source, (trial,), left_out = read_all(sessions)
        assert np.isnan(trial.valence) and np.isnan(trial.arousal) and not left_out
        assert source.meta["unlabelled_sessions"] == 1
        assert "1 sessions have no ratings" in capsys.readouterr().err
    for wrong in ("0", "10"):
        xml.write_text(original)
        edit(xml, f'feltVlnc="{number}"', f'feltVlnc="{wrong}"')
        source, (trial,), _ = read_all(sessions)
        assert np.isnan(trial.valence) and source.meta["unlabelled_sessions"] == 1
        assert f"rating {wrong} is not on the scale from 1 to 9; the session stays" in capsys.readouterr().err


def test_sessions_that_cannot_be_used_are_counted_and_the_others_kept(mahnob_sessions, tmp_path):
    sessions = shutil.copytree(mahnob_sessions, tmp_path / "Sessions")
    folders = sorted(sessions.iterdir(), key=lambda p: int(p.name))
    next(folders[0].glob("*.bdf")).unlink()
    (folders[1] / "session.xml").write_text("<session")
    edit(folders[2] / "session.xml", "<subject", "<observer")
    bdf = next(folders[3].glob("*.bdf"))
    bdf.write_bytes(bdf.read_bytes()[:300])
    source, trials, left_out = read_all(sessions)
    assert source.count == 8 and len(trials) == 4
    assert left_out == {
        "sessions without a BDF": 1,
        "sessions with an unreadable session.xml": 1,
        "sessions without a subject or id": 1,
        "unreadable BDFs": 1,
    }


def without_status(bdf, change):
    """Rewrite the last signal's samples (Status) of every record by ``change(int array)``."""
    content = np.frombuffer(bdf.read_bytes(), np.uint8).copy()
    records = content[256 * 48 :].reshape(-1, 47, 256, 3)
    status = records[:, -1].astype(np.int64) @ [1, 1 << 8, 1 << 16]
    status = change(status.ravel()).reshape(status.shape)
    for byte in range(3):
        records[:, -1, :, byte] = (status >> (8 * byte)) & 0xFF
    bdf.write_bytes(content.tobytes())


def test_bdf_without_events_is_left_out(one_session):
    sessions, _, bdf = one_session
    without_status(bdf, lambda s: s & ~0xFFFF)
    _, trials, left_out = read_all(sessions)
    assert not trials and left_out == {"BDFs without Status events": 1}


def test_after_a_single_event_the_length_of_the_clip_counts(one_session):
    sessions, session, bdf = one_session
    expected = read_all(sessions)[1][0].stimulus
    without_status(bdf, lambda s: np.where(np.arange(len(s)) > 1000, s & ~0xFFFF, s))
    np.testing.assert_array_equal(read_all(sessions)[1][0].stimulus, expected)
    edit(session / "session.xml", 'cutLenSec="4" ', "")
    assert read_all(sessions)[2] == {"BDFs without Status events": 1}


def test_a_truncated_bdf_is_left_out(one_session):
    sessions, _, bdf = one_session
    content = bdf.read_bytes()
    header, record = 256 * 48, 47 * 256 * 3
    for records in (4, 4.5):  # of 8: the stimulus starts with the third
        bdf.write_bytes(content[: header + int(records * record)])
        _, trials, left_out = read_all(sessions)
        assert not trials and sum(left_out.values()) == 1


def test_bdf_without_status_channel_or_without_a_channel(one_session):
    sessions, _, bdf = one_session
    content = bdf.read_bytes()
    bdf.write_bytes(content.replace(b"Status          ", b"Trigger         "))
    assert read_all(sessions)[2] == {"BDFs without a Status channel": 1}
    bdf.write_bytes(content.replace(b"Oz              ", b"XX              "))
    assert read_all(sessions)[2] == {"BDFs that lack channels": 1}
    assert len(read_all(sessions, channels=[c for c in CHANNELS if c != "Oz"])[1]) == 1


def test_baseline_is_at_most_thirty_seconds(one_session, monkeypatch):
    monkeypatch.setattr(mahnob, "_BASELINE_SECONDS", 1.0)
    assert read_all(one_session[0])[1][0].baseline.shape == (32, 256)


def test_folders_without_sessions(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_mahnob(tmp_path / "none")
    with pytest.raises(UserError, match="holds no session"):
        open_mahnob(tmp_path)


def test_writer_wants_whole_seconds(tmp_path):
    with pytest.raises(ValueError, match="whole"):
        write_mahnob(tmp_path, seconds=2.5)


def test_a_session_in_an_encoding_that_nobody_knows_is_a_fault_of_its_own(tmp_path):
    (tmp_path / "session.xml").write_bytes(b'<?xml version="1.0" encoding="none-such"?><session/>')
    with pytest.raises(TrialFault, match="none-such"):
        mahnob._read_session(tmp_path, (), {})
