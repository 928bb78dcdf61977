import json
import sys

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from ngd_fast.artifacts.figure_style import render, save_figure
from ngd_fast.errors import UserError
from ngd_fast.evaluation.figures_classes import confusion_figure, per_class_figure, reliability_figure
from ngd_fast.evaluation.figures_features import (
    distance_figure,
    embed,
    embedding_figure,
    geometry_figure,
    sample_rows,
)
from ngd_fast.evaluation.figures_training import read_log, terms_figure, timeline_figure
from ngd_fast.evaluation.geometry import class_geometry
from ngd_fast.evaluation.metrics import evaluate_predictions
from ngd_fast.evaluation.predictions import Predictions

pytest.importorskip("matplotlib")


def texts(figure):
    from matplotlib.text import Text

    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


def test_confusion_shows_counts_and_shares(make_predictions):
    predictions = make_predictions((50, 40, 30, 20, 20, 0, 10, 0))
    blocks = evaluate_predictions(predictions, bootstrap=0)
    shown = texts(confusion_figure(blocks["eight_way"]))
    right = blocks["eight_way"]["confusion"][0][0]
    assert f"{100 * right / 50:.1f}" in shown
    assert str(right) in shown
    assert shown.count("no samples") == 2
    present = texts(confusion_figure(blocks["present_only"]))
    assert "disgust" not in present
    assert "no samples" not in present


def test_the_same_figure_gives_the_same_bytes(make_predictions, tmp_path):
    block = evaluate_predictions(make_predictions(), bootstrap=5)["eight_way"]
    draw = lambda: per_class_figure({"B0": block})  # noqa: E731
    for kind, start in (("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")):
        image = render(draw(), kind)
        assert image.startswith(start)
        assert image == render(draw(), kind), kind
    paths = save_figure(draw(), tmp_path / "f")
    assert [p.name for p in paths] == ["f.pdf", "f.svg", "f.png"]


def test_reliability_states_the_ece_of_the_metrics(make_predictions):
    predictions = make_predictions()
    expected = evaluate_predictions(predictions, bootstrap=0)["eight_way"]["ece"]
    assert f"B0\nECE {100 * expected:.1f} %" in texts(reliability_figure({"B0": predictions}))


def test_class_geometry_by_hand():
    features = np.array([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0], [5.0, 0.0]])
    geometry = class_geometry(features, np.array([0, 0, 2, -1]), 4)
    # class 0: unit vectors e1 and e2 around (1/2, 1/2); class 2: the one vector -e1
    np.testing.assert_allclose(geometry["variance"], [0.5, np.nan, 0.0, np.nan])
    assert geometry["distance"][0, 2] == pytest.approx(np.sqrt(1.5**2 + 0.5**2))
    np.testing.assert_allclose(geometry["nearest"][[0, 2]], geometry["distance"][0, 2])
    assert np.isnan(geometry["nearest"][[1, 3]]).all()


def test_rows_for_the_embedding_keep_rare_classes():
    labels = np.repeat([0, 1, 2, -1], [1000, 900, 12, 50])
    rows = sample_rows(labels, 200, seed=0)
    counts = np.bincount(labels[rows], minlength=3)
    assert (labels[rows] >= 0).all()
    assert counts[2] >= 10
    assert abs(counts[0] - 105) < 10
    assert np.array_equal(rows, sample_rows(labels, 200, seed=0))


@pytest.mark.parametrize("method", ["tsne", "umap"])
def test_embedding_separates_what_is_separate(method):
    if method == "umap":
        pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(30, 8)), rng.normal(size=(30, 8)) + 20])
    with threadpool_limits(2):
        points = embed(features, method=method, seed=1)
    with threadpool_limits(1):
        assert np.array_equal(points, embed(features, method=method, seed=1)), "whatever the number of threads"
    centers = points[:30].mean(axis=0), points[30:].mean(axis=0)
    spread = max(points[:30].std(), points[30:].std())
    assert np.linalg.norm(centers[0] - centers[1]) > 2 * spread


def test_an_unknown_embedding():
    with pytest.raises(ValueError, match="method must be"):
        embed(np.zeros((5, 2)), method="pca")


def test_feature_figures(make_predictions):
    both = {"B0": make_predictions(signal=1), "B3": make_predictions(signal=2)}
    assert {"B0", "B3", "fear"} <= set(texts(embedding_figure(both, most=80)))
    assert "cap 0.5" in texts(geometry_figure(both, var_cap=0.5, margin=0.7))
    assert "distance of class means" in texts(distance_figure(both))
    p = both["B0"]
    bare = Predictions(p.logits, p.labels, p.names, p.class_names, p.dataset)
    for draw in (embedding_figure, geometry_figure, distance_figure):
        with pytest.raises(UserError, match="saved without features"):
            draw({"B1": bare})


def ramp_of(figure):
    """The shaded epochs of a figure's first plot; None where nothing is shaded."""
    patches = [p for p in figure.axes[0].patches if p.get_label() == "D-Geo ramp"]
    return (patches[0].get_x(), patches[0].get_x() + patches[0].get_width()) if patches else None


def test_timeline_marks_the_ramp(suite):
    logs = {v: [read_log(suite / f"{v}_seed{s}" / "log.jsonl") for s in (1, 2)] for v in ("B0", "B3")}
    figure = timeline_figure(logs, (1, 3))
    assert ramp_of(figure) == (1, 3)
    assert "D-Geo ramp" in texts(figure)
    assert ramp_of(timeline_figure(logs, (3, 60))) == (3, 4), "as far as training went"
    for none in (None, (20, 60), (4, 4)):
        assert ramp_of(timeline_figure(logs, none)) is None
    lines = figure.axes[2].get_lines()
    assert max(line.get_ydata().max() for line in lines) == pytest.approx(0.6)
    assert "KD" not in texts(terms_figure(logs)), "terms that were not logged are not drawn"
    short = {"B0": [run[:2] for run in logs["B0"]]}
    assert all(tick == int(tick) for tick in timeline_figure(short).axes[0].get_xticks())


def test_a_log_that_is_none(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"event": "epoch", "epoch": 1}) + "\nnonsense\n")
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        read_log(log)
    with pytest.raises(UserError, match="no such"):
        read_log(tmp_path / "none.jsonl")


def test_umap_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match=r"ngd-fast\[umap\]"):
        embed(np.zeros((5, 2)), method="umap")
