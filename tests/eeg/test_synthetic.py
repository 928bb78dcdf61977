import numpy as np
import pytest

from ngd_fast.eeg.dreamer import EMOTIV_CHANNELS, open_dreamer
from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings
from ngd_fast.eeg.topomap import TopomapConfig
from ngd_fast.synthetic.recordings import write_dreamer
from ngd_fast.synthetic.signals import BIOSEMI_CHANNELS, Subject, draw_ratings


def mean_log_power(valence, arousal, low, high, seed=0):
    """Log power [channels] in [low, high) Hz, averaged over several heads."""
    total = 0
    for number in range(12):
        head = Subject(EMOTIV_CHANNELS, np.random.default_rng([seed, number]))
        x = head.record(24, 128, valence, arousal)
        spectrum = np.abs(np.fft.rfft(x)) ** 2
        f = np.fft.rfftfreq(x.shape[1], 1 / 128)
        total = total + np.log(spectrum[:, (f >= low) & (f < high)].mean(axis=1)) / 12
    return dict(zip(EMOTIV_CHANNELS, total))


def test_pleasant_means_less_alpha_on_the_left_than_on_the_right():
    pleasant, unpleasant = (mean_log_power(v, 0, 8, 13) for v in (1, -1))
    asymmetry = [p["F4"] - p["F3"] + p["F8"] - p["F7"] for p in (pleasant, unpleasant)]
    assert asymmetry[0] > 0.5 > -0.5 > asymmetry[1]


def test_excited_means_more_beta_and_gamma_and_less_alpha_at_the_back():
    excited, calm = (mean_log_power(0, a, 20, 45) for a in (1, -1))
    assert min(excited[c] - calm[c] for c in EMOTIV_CHANNELS) > 0.1
    assert excited["T7"] - calm["T7"] > excited["O1"] - calm["O1"]
    excited, calm = (mean_log_power(0, a, 8, 13) for a in (1, -1))
    assert calm["O1"] - excited["O1"] > 0.3


def test_signals_have_the_size_of_eeg():
    x = Subject(BIOSEMI_CHANNELS, np.random.default_rng(0)).record(10, 256, 0.3, 0.1)
    assert x.shape == (32, 2560) and 3 < x.std() < 60  # uV
    assert np.abs(x.mean(axis=1)).max() < 3


@pytest.mark.parametrize(("subjects", "clips"), [(8, 10), (23, 18)])
def test_ratings_fill_most_of_the_plane(subjects, clips):
    valence, arousal = draw_ratings(np.random.default_rng(0), subjects, clips)
    assert valence.shape == (subjects, clips) and np.abs([valence, arousal]).max() <= 1
    bins = {(v, a) for v, a in zip(np.round(2 * valence).ravel(), np.round(2 * arousal).ravel())}
    assert 19 <= len(bins) <= 25
    assert abs(np.corrcoef(valence.ravel(), arousal.ravel())[0, 1]) < 0.4


def ccc(a, b):
    return 2 * np.cov(a, b, bias=True)[0, 1] / (a.var() + b.var() + (a.mean() - b.mean()) ** 2)


def test_valence_and_arousal_are_found_across_subjects_but_not_perfectly(tmp_path):
    pytest.importorskip("mne")
    from sklearn.linear_model import Ridge

    path = write_dreamer(tmp_path / "D.mat", subjects=6, clips=10, seconds=12, baseline_seconds=2)
    topomaps = topomaps_from_recordings(open_dreamer(path), EegConfig(topomap=TopomapConfig(resolution=12)))
    held_out = topomaps.subject > 4
    felt = np.stack([topomaps.valence, topomaps.arousal], axis=1)
    x = topomaps.maps[..., topomaps.mask].reshape(len(topomaps), -1)
    guess = Ridge(30.0).fit(x[~held_out], felt[~held_out]).predict(x[held_out])
    scores = [ccc(felt[held_out, k], guess[:, k]) for k in (0, 1)]
    assert min(scores) > 0.2 and max(scores) < 0.97
