import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from ngd_fast.errors import UserError
from ngd_fast.evaluation import bootstrap as boot
from ngd_fast.evaluation.metrics import PROTOCOLS, evaluate, prepare

NAMES = ("a", "b", "c", "d")


def random_case(seed, rows=400, classes=4, missing=(), ties=False):
    rng = np.random.default_rng(seed)
    labels = rng.choice([c for c in range(classes) if c not in missing], size=rows)
    logits = rng.normal(size=(rows, classes))
    logits[np.arange(rows), labels] += 1.0
    return labels, np.round(logits) if ties else logits


CASES = [{"seed": 1}, {"seed": 2, "missing": (0, 2)}, {"seed": 3, "ties": True}, {"seed": 4, "rows": 7}]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(c))
def test_agrees_with_scikit_learn(case, protocol):
    labels, logits = random_case(**case)
    got = evaluate(labels, logits, class_names=NAMES, protocol=protocol, bootstrap=0)
    present, logits_given = np.unique(labels), logits
    if protocol == "present_only":
        restricted = np.full_like(logits, -np.inf)
        restricted[:, present] = logits[:, present]
        logits = restricted
    predicted = logits.argmax(axis=1)
    # AUROC from our own probabilities: those that are equal only up to their last bits would not be ties in another's
    probabilities = prepare(labels, logits_given, protocol).probabilities
    np.testing.assert_allclose(probabilities, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), rtol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that are predicted but absent from the labels
        precision, recall, f1, support = sk.precision_recall_fscore_support(
            labels, predicted, labels=present, zero_division=0
        )
        expected = {
            "accuracy": sk.accuracy_score(labels, predicted),
            "macro_f1": sk.f1_score(labels, predicted, labels=present, average="macro"),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
            "auroc_macro": np.mean([sk.roc_auc_score(labels == c, probabilities[:, c]) for c in present]),
        }
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-9), name
    assert list(got["per_class"]) == [NAMES[c] for c in present]
    for k, values in enumerate(got["per_class"].values()):
        assert values["precision"] == pytest.approx(precision[k], abs=1e-9)
        assert values["recall"] == pytest.approx(recall[k], abs=1e-9)
        assert values["f1"] == pytest.approx(f1[k], abs=1e-9)
        assert values["support"] == support[k]
    assert np.array_equal(got["confusion"], sk.confusion_matrix(labels, predicted, labels=range(4)))


def test_ece_by_its_definition():
    labels, logits = random_case(5)
    scored = prepare(labels, logits, "eight_way")
    confidence, right = scored.probabilities.max(axis=1), scored.predicted == labels
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert evaluate(labels, logits, class_names=NAMES, bootstrap=0)["ece"] == pytest.approx(expected, abs=1e-12)


def test_absent_classes_have_no_metric():
    labels, logits = random_case(2, missing=(0, 2))
    eight = evaluate(labels, logits, class_names=NAMES, bootstrap=20)
    present = evaluate(labels, logits, class_names=NAMES, protocol="present_only", bootstrap=20)
    assert eight["absent"] == present["absent"] == ["a", "c"]
    assert set(eight["per_class"]) == set(present["per_class"]) == {"b", "d"}
    assert np.array(eight["confusion"])[:, 0].sum() > 0, "8-way may predict a class that is absent"
    assert np.array(present["confusion"])[:, [0, 2]].sum() == 0
    assert present["accuracy"] > eight["accuracy"]


def test_one_class_has_no_auroc():
    got = evaluate(np.zeros(5, int), np.random.default_rng(0).normal(size=(5, 4)), class_names=NAMES, bootstrap=10)
    assert "auroc_macro" not in got
    assert "auroc_macro" not in got["ci"]
    assert got["per_class"]["a"]["recall"] == got["accuracy"]


def test_protocols_agree_where_every_class_is_present():
    labels, logits = random_case(1)
    a, b = (evaluate(labels, logits, class_names=NAMES, protocol=p, bootstrap=10) for p in PROTOCOLS)
    assert {**a, "protocol": ""} == {**b, "protocol": ""}


def test_unlabelled_rows_are_left_out():
    labels, logits = random_case(1)
    more = np.concatenate([labels, [-1, -1]]), np.concatenate([logits, [[9, 0, 0, 0], [np.nan] * 4]])
    assert evaluate(*more, class_names=NAMES, bootstrap=5) == evaluate(labels, logits, class_names=NAMES, bootstrap=5)


def test_bootstrap_resamples_are_the_metrics_of_their_rows():
    """Each column of weights gives what scikit-learn gives for the rows repeated that often."""
    labels, logits = random_case(6, rows=120, ties=True)
    scored = prepare(labels, logits, "eight_way")
    (weights,) = boot.stratified_weights(labels, 4, seed=11)
    got = boot.score(scored, weights)
    for r in range(4):
        rows = np.repeat(np.arange(len(labels)), weights[:, r].astype(int))
        assert np.array_equal(np.bincount(labels[rows]), np.bincount(labels)), "class counts are kept"
        y, p, q = labels[rows], scored.predicted[rows], scored.probabilities[rows]
        assert got["accuracy"][r] == pytest.approx(sk.accuracy_score(y, p), abs=1e-9)
        assert got["macro_f1"][r] == pytest.approx(sk.f1_score(y, p, average="macro"), abs=1e-9)
        assert got["auroc_macro"][r] == pytest.approx(sk.roc_auc_score(y, q, multi_class="ovr"), abs=1e-9)
        again = boot.ece(boot.Scored(y, p, q, scored.present), np.ones((len(y), 1)))[0]
        assert got["ece"][r] == pytest.approx(again, abs=1e-9)
    assert len({tuple(column) for column in weights.T}) == 4


def test_interval_of_accuracy_has_the_binomial_width():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 500)
    logits = np.eye(4)[np.where(rng.random(2000) < 0.8, labels, (labels + 1) % 4)]
    low, high = evaluate(labels, logits, class_names=NAMES, bootstrap=2000)["ci"]["accuracy"]
    accuracy = (logits.argmax(axis=1) == labels).mean()
    expected = 2 * 1.96 * np.sqrt(accuracy * (1 - accuracy) / 2000)
    assert low < accuracy < high
    assert high - low == pytest.approx(expected, rel=0.1)


def test_same_seed_same_interval_in_any_blocks(monkeypatch):
    labels, logits = random_case(1)
    one = evaluate(labels, logits, class_names=NAMES, bootstrap=30, seed=5)
    assert one == evaluate(labels, logits, class_names=NAMES, bootstrap=30, seed=5)
    assert one["ci"] != evaluate(labels, logits, class_names=NAMES, bootstrap=30, seed=6)["ci"]
    monkeypatch.setattr(boot, "_CHUNK", 400 * 7)
    blocks = list(boot.stratified_weights(labels, 30, 5))
    assert [block.shape[1] for block in blocks] == [7, 7, 7, 7, 2]


@pytest.mark.parametrize(
    ("labels", "logits", "message"),
    [
        ([0, 9], np.zeros((2, 4)), "row 1 has label 9"),
        ([0, -2], np.zeros((2, 4)), "row 1 has label -2"),
        ([-1, -1], np.zeros((2, 4)), "no row has a label"),
        ([0, 1], np.array([[0, 0, 0, np.nan], [0, 0, 0, 0]]), "1 of 2 labelled rows have NaN"),
    ],
)
def test_faults_of_the_data(labels, logits, message):
    with pytest.raises(UserError, match=message):
        evaluate(np.array(labels), logits, class_names=NAMES)


def test_faults_of_the_caller():
    with pytest.raises(ValueError, match="protocol must be one of"):
        evaluate(np.array([0]), np.zeros((1, 4)), class_names=NAMES, protocol="7-way")
    with pytest.raises(ValueError, match="class_names must name 4"):
        evaluate(np.array([0]), np.zeros((1, 4)), class_names=("a",))
    with pytest.raises(TypeError, match="integers"):
        evaluate(np.array([0.0]), np.zeros((1, 4)), class_names=NAMES)
