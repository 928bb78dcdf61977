import numpy as np
import pytest

from ngd_fast.errors import UserError
from ngd_fast.faces.detection import FaceBox
from ngd_fast.faces.tracks import Smoothing, Tracker, TrackSmoother


def box(x, y=0, side=10):
    return FaceBox(x, y, side, side, 0.9)


def smooth(values, text):
    """Values [N, C] through a smoother, in order."""
    smoother, made = TrackSmoother(Smoothing.parse(text)), []
    for i, value in enumerate(np.atleast_2d(np.asarray(values, float).T).T):
        made += smoother.push(i, value)
    made += smoother.close()
    assert [i for i, _ in made] == list(range(len(made))), "in order, none lost"
    return np.array([value for _, value in made])


@pytest.mark.parametrize("text", ["none", "window:1", "window:5", "window:99", "ema:0.8"])
def test_a_constant_is_unchanged(text):
    values = np.tile([0.1, 0.7, 0.2], (20, 1))
    np.testing.assert_allclose(smooth(values, text), values, atol=1e-15)


@pytest.mark.parametrize("n", [3, 5, 15])
def test_the_impulse_response_of_a_window(n):
    impulse = np.zeros(61)
    impulse[30] = 1
    want = np.zeros(61)
    want[30 - n // 2 : 31 + n // 2] = 1 / n
    np.testing.assert_allclose(smooth(impulse, f"window:{n}")[:, 0], want, atol=1e-15)


def test_a_window_is_the_mean_of_what_there_is_at_the_ends():
    values = np.random.default_rng(0).random((40, 3))
    for n in (3, 7, 101):
        want = [values[max(0, i - n // 2) : i + n // 2 + 1].mean(0) for i in range(40)]
        np.testing.assert_allclose(smooth(values, f"window:{n}"), want, atol=1e-14)


def test_a_flip_of_one_frame_disappears():
    values = np.tile([0.9, 0.1], (21, 1))
    values[10] = [0.2, 0.8]
    assert (smooth(values, "window:5").argmax(1) == 0).all()
    assert (smooth(values, "none").argmax(1) == 1).sum() == 1


def test_an_average_that_decays_sees_no_future():
    values = np.random.default_rng(1).random((30, 2))
    changed = values.copy()
    changed[20:] = 5
    one, other = smooth(values, "ema:0.8"), smooth(changed, "ema:0.8")
    np.testing.assert_array_equal(one[:20], other[:20])
    np.testing.assert_allclose(one[1], 0.8 * values[0] + 0.2 * values[1])
    smoother = TrackSmoother(Smoothing.parse("ema:0.8"))
    assert len(smoother.push(0, values[0])) == 1, "at once"


@pytest.mark.parametrize("text", ["window:4", "window:0", "window", "ema:1", "ema:-0.1", "ema:x", "mean:3", ""])
def test_smoothing_that_is_none(text):
    with pytest.raises(UserError, match="wanted none, window:N"):
        Smoothing.parse(text)


def test_two_faces_that_move_keep_their_numbers():
    tracker = Tracker()
    for k in range(10):
        numbers, ended = tracker(k / 25, [box(50 - 2 * k), box(2 * k)])
        assert (numbers, ended) == ([0, 1], [])
    # the other one first
    assert tracker(0.4, [box(20), box(30)])[0] == [1, 0]


def test_a_face_that_is_gone_for_more_than_a_second_is_another():
    tracker = Tracker()
    assert tracker(0, [box(0)]) == ([0], [])
    assert tracker(0.9, []) == ([], [])
    assert tracker(1.0, [box(1)]) == ([0], [])
    assert tracker(2.1, [box(1)]) == ([1], [0])


def test_a_jump_starts_a_track_and_one_box_continues_only_one():
    tracker = Tracker()
    assert tracker(0, [box(0)])[0] == [0]
    assert tracker(0.1, [box(100)])[0] == [1]
    assert tracker(0.2, [box(1), box(2)])[0] == [0, 2]
