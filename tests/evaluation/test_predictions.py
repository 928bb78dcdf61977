import numpy as np
import pytest

from ngd_fast.errors import UserError
from ngd_fast.evaluation.predictions import Predictions


def test_comes_back_as_it_was_saved(tmp_path, make_predictions):
    predictions = make_predictions()
    predictions.save(tmp_path / "p.npz")
    again = Predictions.load(tmp_path / "p.npz")
    for name in ("logits", "labels", "features"):
        assert np.array_equal(getattr(again, name), getattr(predictions, name)), name
    assert again.names == predictions.names
    assert again.class_names == predictions.class_names
    assert again.dataset == predictions.dataset
    assert again.label_dist is None
    again.save(tmp_path / "q.npz")
    assert (tmp_path / "p.npz").read_bytes() == (tmp_path / "q.npz").read_bytes()


def test_probabilities_are_a_softmax_at_any_scale():
    predictions = Predictions([[1e4, 0.0], [0.0, 0.0]], [0, 1], ["x", "y"], ("a", "b"), "d")
    assert np.array_equal(predictions.probabilities(), [[1, 0], [0.5, 0.5]])
    assert predictions.probabilities(1e4)[0, 0] == pytest.approx(1 / (1 + np.exp(-1)))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        predictions.probabilities(0)


GOOD = {
    "logits": np.zeros((3, 2)),
    "labels": [0, 1, -1],
    "names": list("xyz"),
    "class_names": ("a", "b"),
    "dataset": "d",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros((3, 5))}, r"logits must be \[N, 2\]"),
        ({"labels": [0, 1]}, r"labels must be \[3\]"),
        ({"labels": [0, 1, 2]}, "row 2 has label 2"),
        ({"labels": [0.0, 0.9, 1.0]}, "labels must be integers, are float64"),
        ({"class_names": ("a", "a")}, "a class name stands twice"),
        ({"names": ["x"]}, "1 names for 3 rows"),
        ({"features": np.zeros((2, 4))}, r"features must be \[3, D\]"),
        ({"logits": [[0, 0], [0, np.inf], [0, 0]]}, r"the first is row 1 \(y\)"),
    ],
)
def test_refuses_what_does_not_fit(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Predictions(**{**GOOD, **change})


def test_names_the_file_that_is_wrong(tmp_path):
    path = tmp_path / "p.npz"
    np.savez(path, logits=np.zeros((1, 2)), labels=np.array([5]), names=["x"], class_names=["a", "b"], dataset="d")
    with pytest.raises(UserError, match=r"p\.npz: predictions: row 0 has label 5"):
        Predictions.load(path)
    np.savez(path, logits=np.zeros((1, 2)))
    with pytest.raises(UserError, match="lacks labels"):
        Predictions.load(path)
