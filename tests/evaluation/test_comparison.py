import numpy as np
import pytest

from ngd_fast.errors import UserError
from ngd_fast.evaluation.comparison import paired_bootstrap, summarize


def test_summary_over_seeds():
    got = summarize([0.2, 0.4, 0.9])
    assert got == pytest.approx({"mean": 0.5, "min": 0.2, "max": 0.9, "n": 3, "std": np.std([0.2, 0.4, 0.9], ddof=1)})
    assert "std" not in summarize([0.5])
    with pytest.raises(ValueError, match="non-empty"):
        summarize([])


def test_a_clear_difference_is_found_and_none_is_not(make_predictions):
    weak, strong = make_predictions(signal=1.0, seed=1), make_predictions(signal=2.5, seed=2)
    found = paired_bootstrap(weak, strong, resamples=400)["accuracy"]
    measured = (strong.logits.argmax(1) == strong.labels).mean() - (weak.logits.argmax(1) == weak.labels).mean()
    assert found["difference"] == pytest.approx(measured)
    assert 0 < found["ci"][0] < found["difference"] < found["ci"][1]
    assert found["p"] < 0.01
    same = paired_bootstrap(weak, weak, resamples=100)["accuracy"]
    assert same == {"difference": 0.0, "ci": [0.0, 0.0], "p": 1.0}
    noise = paired_bootstrap(make_predictions(seed=3), make_predictions(seed=4), resamples=400)["accuracy"]
    assert noise["ci"][0] < 0 < noise["ci"][1]


def test_pairing_narrows_the_interval(make_predictions):
    """Nearly the same predictions differ by little on every resample, however much each resample varies."""
    a = make_predictions(signal=1.5, seed=1)
    b = type(a)(a.logits + 0.1 * make_predictions(seed=9).logits, a.labels, a.names, a.class_names, a.dataset)
    paired = paired_bootstrap(a, b, resamples=300)["accuracy"]["ci"]
    unrelated = paired_bootstrap(a, make_predictions(signal=1.5, seed=5), resamples=300)["accuracy"]["ci"]
    assert paired[1] - paired[0] < 0.6 * (unrelated[1] - unrelated[0])


def test_seeds_are_averaged(make_predictions):
    a = [make_predictions(signal=1.5, seed=s) for s in (1, 2)]
    b = [make_predictions(signal=2.0, seed=s) for s in (3, 4, 5)]
    accuracy = lambda p: (p.logits.argmax(1) == p.labels).mean()  # noqa: E731
    expected = np.mean([accuracy(p) for p in b]) - np.mean([accuracy(p) for p in a])
    assert paired_bootstrap(a, b, resamples=20)["accuracy"]["difference"] == pytest.approx(expected)


def test_different_rows_cannot_be_paired(make_predictions):
    a = make_predictions()
    other = type(a)(a.logits, a.labels[::-1], a.names, a.class_names, "other")
    with pytest.raises(UserError, match="cannot be paired"):
        paired_bootstrap(a, other, resamples=5)
