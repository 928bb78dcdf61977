import numpy as np
import pytest
from scipy import signal

from ngd_fast.config import dump_config, load_config
from ngd_fast.eeg.bandpower import PowerConfig
from ngd_fast.eeg.cleaning import CleaningConfig
from ngd_fast.eeg.dreamer import EMOTIV_CHANNELS, open_dreamer
from ngd_fast.eeg.mahnob import open_mahnob
from ngd_fast.eeg.normalise import NormaliseConfig, z_score
from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings
from ngd_fast.eeg.topomap import TopomapConfig, make_operator
from ngd_fast.eeg.trials import Exclusions, Trial, TrialSource
from ngd_fast.errors import UserError

pytest.importorskip("mne")

SMALL = EegConfig(topomap=TopomapConfig(resolution=16), device="cpu")


def source_of(trials, channels=EMOTIV_CHANNELS):
    return TrialSource("made", tuple(channels), len(trials), lambda exclusions: iter(trials), {"dataset": "made"})


def make_trial(subject=1, trial=1, seconds=6, baseline=3, seed=0, **changes):
    rng = np.random.default_rng([seed, subject, trial])
    fields = {
        "subject": subject,
        "trial": trial,
        "stimulus": 4100 + rng.normal(scale=10, size=(14, round(seconds * 128))),
        "baseline": 4100 + rng.normal(scale=10, size=(14, round(baseline * 128))),
        "rate": 128.0,
        "valence": 0.5,
        "arousal": -0.5,
        "where": f"subject {subject}, clip {trial}",
    }
    return Trial(**{**fields, **changes})


def run(trials, config=SMALL, **changes):
    return topomaps_from_recordings(source_of(trials), config.model_copy(update=changes))


def test_dreamer_from_file_to_maps(dreamer_mat):
    topomaps = topomaps_from_recordings(open_dreamer(dreamer_mat), SMALL)
    assert topomaps.maps.shape == (3 * 4 * 4, 5, 16, 16)  # 9.5 s hold four windows of 2 s
    assert topomaps.labelled.all() and topomaps.window.max() == 3
    assert set(np.unique(topomaps.subject)) == {1, 2, 3} and set(np.unique(topomaps.trial)) == {1, 2, 3, 4}
    assert topomaps.meta["config"]["power"]["bands"]["delta"] == [0.5, 4.0]
    assert len(topomaps.meta["files"]["DREAMER.mat"]) == 64 and topomaps.meta["exclusions"] == {}
    for subject in (1, 2, 3):
        own = topomaps.maps[topomaps.subject == subject][..., topomaps.mask]
        np.testing.assert_array_equal(own.min(axis=(0, 2)), 0)
        np.testing.assert_array_equal(own.max(axis=(0, 2)), 1)
    assert not topomaps.maps[..., ~topomaps.mask].any()


def test_the_features_are_those_of_scipy(dreamer_mat):
    source = open_dreamer(dreamer_mat)
    trial = next(source.trials(Exclusions()))
    topomaps = topomaps_from_recordings(open_dreamer(dreamer_mat), SMALL)
    x = signal.detrend(trial.stimulus, type="constant")
    x = signal.sosfiltfilt(signal.butter(4, (0.3, 48), "bandpass", fs=128, output="sos"), x, padlen=384)
    x -= x.mean(axis=0)
    f, density = signal.welch(x[:, 256:512], 128, nperseg=128)
    for band, (low, high) in enumerate(SMALL.power.bands.values()):
        expected = 10 * np.log10(density[:, (f >= low) & (f < high)].sum(axis=1))
        np.testing.assert_allclose(topomaps.power[1, :, band], expected, rtol=1e-5)


def test_mahnob_labelled_and_as_support(mahnob_sessions):
    source = open_mahnob(mahnob_sessions)
    topomaps = topomaps_from_recordings(source, SMALL)
    assert topomaps.maps.shape[:2] == (8 * 3, 5) and len(topomaps.channels) == 32
    assert topomaps.meta["unlabelled_sessions"] * 3 == (~topomaps.labelled).sum() > 0
    support = topomaps_from_recordings(open_mahnob(mahnob_sessions), SMALL.model_copy(update={"use_ratings": False}))
    assert not support.labelled.any()
    np.testing.assert_array_equal(support.maps, topomaps.maps)


def test_other_subjects_never_change_a_subjects_maps():
    trials = [make_trial(s, t) for s in (1, 2, 3) for t in (1, 2)]
    everyone, one = run(trials), run(trials[2:4])
    np.testing.assert_array_equal(everyone.subset(everyone.subject == 2).maps, one.maps)


def test_ratings_never_change_maps():
    a = run([make_trial(1, t, valence=1.0, arousal=1.0) for t in (1, 2)])
    b = run([make_trial(1, t, valence=-1.0, arousal=0.0) for t in (1, 2)])
    np.testing.assert_array_equal(a.maps, b.maps)


def test_gain_of_an_amplifier_never_changes_maps():
    a, b = ([make_trial(1, t) for t in (1, 2)] for _ in range(2))
    for trial in b:
        trial.stimulus = trial.stimulus * 7.0
    np.testing.assert_allclose(run(a).maps, run(b).maps, atol=1e-5)


def test_rows_come_sorted_whatever_the_order_of_trials():
    trials = [make_trial(s, t) for s in (1, 2) for t in (1, 2)]
    a, b = run(trials), run(trials[::-1])
    np.testing.assert_array_equal(a.maps, b.maps)
    np.testing.assert_array_equal(a.trial, b.trial)


def test_z_score():
    rng = np.random.default_rng(0)
    subject = np.array([1, 1, 1, 2, 2])
    features = rng.normal(size=(5, 6, 2)) * [3, 50] + [10, -200]
    scores = z_score(features, subject, ["a", "b"], NormaliseConfig())
    for s in (1, 2):
        np.testing.assert_allclose(scores[subject == s].mean(axis=(0, 1)), 0, atol=1e-12)
        np.testing.assert_allclose(scores[subject == s].std(axis=(0, 1)), 1)
    assert np.abs(z_score(features, subject, ["a", "b"], NormaliseConfig(clip=1.0))).max() == 1.0
    np.testing.assert_array_equal(z_score(features, subject, ["a", "b"], NormaliseConfig(z_score=False)), features)
    with pytest.raises(UserError, match="b of subject 2 is the same"):
        z_score(
            np.where((subject == 2)[:, None, None] & [False, True], 4.0, features),
            subject,
            ["a", "b"],
            NormaliseConfig(),
        )


@pytest.mark.parametrize("border", ["mean", 1.5])
def test_each_band_is_drawn_from_0_to_1_inside_the_mask(border, monkeypatch):
    monkeypatch.setattr("ngd_fast.eeg.topomap._CHUNK_PIXELS", 3 * 2 * 256)  # three images at a time
    operator = make_operator(EMOTIV_CHANNELS, TopomapConfig(resolution=16, border=border))
    values = np.random.default_rng(0).normal(size=(7, 2, 14)) * [[3], [50]] + [[10], [-20]]
    maps = np.full((7, 2, 16, 16), np.nan, np.float32)
    operator.render_unit(values, maps)
    expected = operator.render(values)
    for band in (0, 1):
        inside = expected[:, band][:, operator.mask]
        wanted = (inside - inside.min()) / (inside.max() - inside.min())
        np.testing.assert_allclose(maps[:, band][:, operator.mask], wanted, atol=2e-6)
    assert not maps[..., ~operator.mask].any()


def test_maps_are_the_operators_of_the_z_scores():
    topomaps = run([make_trial(1, t) for t in (1, 2)])
    operator = make_operator(topomaps.channels, SMALL.topomap)
    raw = operator.render(topomaps.power.transpose(0, 2, 1))[:, 2][:, operator.mask]
    mine = topomaps.maps[:, 2][:, operator.mask]
    # z-scores and min-max are affine in a band: they leave only scale and offset to differ.
    np.testing.assert_allclose(mine, (raw - raw.min()) / (raw.max() - raw.min()), atol=1e-5)


@pytest.mark.parametrize("baseline", ["difference", "ratio", "log_ratio"])
def test_baseline_correction_takes_a_trials_gain_away(baseline):
    power = PowerConfig(baseline=baseline, log=baseline != "ratio", kind="absolute")
    trials = [make_trial(1, t) for t in (1, 2)]
    before = run(trials, power=power).power
    trials[1].stimulus, trials[1].baseline = trials[1].stimulus * 3, trials[1].baseline * 3
    np.testing.assert_allclose(run(trials, power=power).power, before, rtol=1e-4, atol=1e-4)


def test_windows_overlap_and_the_end_can_be_chosen():
    trials = [make_trial(1, 1, seconds=8)]
    assert len(run(trials)) == 4
    assert len(run(trials, window_overlap=0.5)) == 7
    # The whole trial is filtered before it is cut.
    np.testing.assert_allclose(run(trials, last_seconds=4.0).power, run(trials).power[2:], rtol=1e-6)
    with pytest.raises(ValueError, match="last_seconds must be at least window_seconds"):
        EegConfig(last_seconds=1.0)


def test_bad_channels_are_rebuilt_left_out_or_an_error(capsys):
    def trials():
        flat, dead = make_trial(1, 2), make_trial(1, 3)
        flat.stimulus[3] = 4100.0
        dead.stimulus[[3, 7]] = np.nan
        return [make_trial(1, 1), flat, dead]

    rebuilt = run(trials())
    assert len(rebuilt) == 9 and rebuilt.meta["rebuilt_channels"] == {"FC5": 2, "O2": 1}
    left = run(trials(), bad_channels="exclude")
    assert len(left) == 3 and left.meta["exclusions"] == {"bad channels": 2}
    assert "subject 1, clip 2, stimulus: NaN or flat in FC5" in capsys.readouterr().err
    with pytest.raises(UserError, match="subject 1, clip 2, stimulus: NaN or flat in FC5"):
        run(trials(), bad_channels="error")
    dropped = run(trials(), bad_channels="error", exclude_channels=("FC5", "o2"))
    assert len(dropped) == 9 and len(dropped.channels) == 12


def test_a_rebuilt_channel_resembles_the_lost_one():
    # Neighbours share a smooth field, so that there is something to rebuild from.
    from ngd_fast.eeg.topomap import channel_positions

    positions = channel_positions(EMOTIV_CHANNELS)
    rng = np.random.default_rng(0)
    field = np.stack([positions @ rng.normal(size=(3, 768)) * 200]).reshape(14, -1)
    whole, holed = (make_trial(1, 1, stimulus=field + 4100) for _ in range(2))
    holed.stimulus = holed.stimulus.copy()
    holed.stimulus[2, 100:] = np.nan
    np.testing.assert_allclose(run([holed]).power[:, 2], run([whole]).power[:, 2], atol=2.0)  # dB


def test_too_many_bad_channels_leave_the_trial_out():
    trial = make_trial(1, 2)
    trial.stimulus[:5] = np.nan
    topomaps = run([make_trial(1, 1), trial])
    assert len(topomaps) == 3 and topomaps.meta["exclusions"] == {"too many bad channels": 1}


def test_trials_too_short_or_without_a_baseline_are_counted():
    trials = [make_trial(1, 1), make_trial(1, 2, seconds=1.5), make_trial(1, 3)]
    assert run([trials[0], trials[1]]).meta["exclusions"] == {"stimulus shorter than a window": 1}
    trials[2].baseline = None
    topomaps = run([trials[0], trials[2]], power=PowerConfig(baseline="log_ratio"))
    assert topomaps.meta["exclusions"] == {"trials without a baseline": 1}
    with pytest.raises(UserError, match="no usable window; left out: 1 stimulus shorter than a window"):
        run([trials[1]])


def test_a_baseline_shorter_than_a_window_is_counted():
    with pytest.raises(UserError, match="baseline shorter than a window"):
        run([make_trial(1, 1, baseline=1)], power=PowerConfig(baseline="ratio"))


def test_windows_of_silence_are_counted(capsys):
    trial = make_trial(1, 1, seconds=8)
    trial.stimulus[:, 256:512] = 4100.0
    quiet = CleaningConfig(detrend=None, band_pass=None, reference=None)
    topomaps = run([trial], cleaning=quiet)
    assert topomaps.window.tolist() == [0, 2, 3] and topomaps.meta["exclusions"] == {"windows without power": 1}
    assert "1 windows hold a band without power" in capsys.readouterr().err


def test_many_exclusions_are_printed_in_part_and_counted_in_full(capsys):
    exclusions = Exclusions()
    for i in range(50):
        exclusions.add("bad", f"trial {i}")
    assert exclusions.counts == {"bad": 50} and str(exclusions) == "50 bad"
    assert len(capsys.readouterr().err.splitlines()) == 21


def test_settings_that_do_not_fit():
    for changes, message in (
        ({"exclude_channels": ("XX",)}, "no channel xx; there are AF3"),
        ({"exclude_channels": EMOTIV_CHANNELS[:11]}, "3 channels cannot be interpolated"),
        ({"device": "cuda:99"}, "device cuda:99: PyTorch sees"),
        ({"power": PowerConfig(bands={"high": (70, 90)})}, "band high"),
        ({"power": PowerConfig(segment_seconds=4)}, "two samples and a window of 2 s"),
        ({"cleaning": CleaningConfig(band_pass=(1, 70))}, "not below half the sampling rate"),
    ):
        with pytest.raises(UserError, match=message):
            run([make_trial()], **changes)


def test_config_goes_through_yaml(tmp_path):
    config = load_config(EegConfig, None, ["power.bands={low: [1, 8]}", "cleaning.notch=[50]", "topomap.border=0"])
    assert config.power.bands == {"low": (1, 8)} and config.topomap.border == 0
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(EegConfig, tmp_path / "c.yaml") == config
    with pytest.raises(UserError, match=r"did you mean power\.segment_seconds"):
        load_config(EegConfig, None, ["power.segment_second=2"])
    with pytest.raises(UserError, match=r"topomap\.sphere"):
        load_config(EegConfig, None, ["topomap.sphere=[0, 0, 0, -1]"])


def test_equal_input_gives_equal_bits(dreamer_mat):
    a, b = (topomaps_from_recordings(open_dreamer(dreamer_mat), SMALL) for _ in range(2))
    np.testing.assert_array_equal(a.maps, b.maps)
