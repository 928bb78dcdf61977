import numpy as np
import pytest

from ngd_fast.artifacts.files import read_json
from ngd_fast.artifacts.verify import verify
from ngd_fast.evaluation.metrics import evaluate
from ngd_fast.evaluation.slices import SLICE_METRICS, evaluate_slices

from .conftest import call, draw, error_of


@pytest.fixture
def predictions():
    return draw(signal=3.0)


def test_each_group_is_evaluated_by_itself(predictions):
    groups = {n: "left" if i % 3 else "right" for i, n in enumerate(predictions.names)}
    made = evaluate_slices(predictions, {"side": groups}, bootstrap=200)["side"]
    rows = np.array([groups[n] == "right" for n in predictions.names])
    alone = evaluate(
        predictions.labels[rows], predictions.logits[rows], class_names=predictions.class_names, bootstrap=0
    )
    for name in SLICE_METRICS:
        assert made["groups"]["right"][name] == alone[name]
        low, high = made["groups"]["right"]["ci"][name]
        assert low <= alone[name] <= high
    assert made["unlisted"] == 0


def test_a_gap_that_is_there_is_found_and_one_that_is_not_is_not(predictions):
    rng = np.random.default_rng(0)
    half = rng.random(len(predictions)) < 0.5
    logits = predictions.logits.copy()
    logits[half] = rng.normal(size=(half.sum(), 8)) + 1.0 * np.eye(8)[predictions.labels[half]]
    spoiled = type(predictions)(logits, predictions.labels, predictions.names, predictions.class_names, "d")
    columns = {
        "spoiled": {n: "yes" if h else "no" for n, h in zip(predictions.names, half)},
        "chance": {n: "yes" if h else "no" for n, h in zip(predictions.names, rng.random(len(half)) < 0.5)},
    }
    made = evaluate_slices(spoiled, columns, bootstrap=400)
    gap = made["spoiled"]["gaps"]["accuracy"]
    assert (gap["worst"], gap["best"]) == ("yes", "no")
    assert gap["ci"][0] > 0
    assert gap["p"] < 0.01
    assert made["chance"]["gaps"]["accuracy"]["p"] > 0.05


def test_small_groups_are_marked_and_make_no_gap(predictions):
    groups = dict.fromkeys(predictions.names, "many") | dict.fromkeys(predictions.names[:29], "few")
    made = evaluate_slices(predictions, {"g": groups}, bootstrap=20)["g"]
    assert made["groups"]["few"]["small"]
    assert not made["groups"]["many"]["small"]
    assert made["gaps"] == {}


def test_the_command(ckpt, faces, tmp_path, capsys):
    lines = ["filename;age;source", *(f"{i}.png;{('young', 'old')[i % 2]};{'a' * (i < 3)}" for i in range(12))]
    (tmp_path / "groups.csv").write_text("\n".join(lines) + "\n")
    common = ["evaluate", "--ckpt", ckpt, "--npz", faces / "toy.npz", "--bootstrap", 20]
    assert call(*common, "--slices", tmp_path / "groups.csv", "--out", tmp_path / "e") == 0
    assert "by age" in capsys.readouterr().out
    made = read_json(tmp_path / "e" / "slices.json")
    assert {g: e["n"] for g, e in made["age"]["groups"].items()} == {"old": 6, "young": 6}
    assert made["source"]["unlisted"] == 9
    assert (tmp_path / "e" / "slices.png").exists()
    assert verify(tmp_path / "e")[0].problems == []
    # saved predictions take them too
    saved = ["evaluate", "--predictions", tmp_path / "e" / "predictions.npz", "--bootstrap", 20]
    assert call(*saved, "--out", tmp_path / "f", "--slices", tmp_path / "groups.csv") == 0
    assert read_json(tmp_path / "f" / "slices.json") == made


@pytest.mark.parametrize(
    ("text", "said"),
    [("name,age\nx.png,1\n", "none of the 12 labelled faces is named"), ("age\n1\n", "no column of faces"),
     ("name,label\n0.png,1\n", "no column of groups"), ("name,age\n0.png,1\n0.png,2\n", "0.png is 2 here and 1 above")],
)  # fmt: skip
def test_lists_that_do_not_fit(ckpt, faces, tmp_path, capsys, text, said):
    (tmp_path / "g.csv").write_text(text)
    common = ["evaluate", "--ckpt", ckpt, "--npz", faces / "toy.npz", "--bootstrap", 0, "--out", tmp_path / "e"]
    assert call(*common, "--slices", tmp_path / "g.csv") == 2
    assert said in error_of(capsys)
    assert not (tmp_path / "e").exists()


def test_too_many_groups(predictions):
    with pytest.raises(ValueError, match="bin its values"):
        evaluate_slices(predictions, {"age": {n: str(i % 60) for i, n in enumerate(predictions.names)}})
