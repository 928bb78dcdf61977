"""``ngd-fast evaluate --corruptions``, and what the report makes of it."""

import pytest

from ngd_fast.artifacts.files import read_json
from ngd_fast.artifacts.verify import verify

from .conftest import call, error_of


@pytest.fixture(scope="module")
def evaluated(ckpt, faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("e") / "xval_toy"
    common = ["evaluate", "--ckpt", ckpt, "--npz", faces / "toy.npz", "--bootstrap", 0]
    assert call(*common, "--corruptions", "--out", out) == 0
    return out


def test_against_itself_it_is_a_hundred(ckpt, faces, evaluated, tmp_path, capsys):
    scores = read_json(evaluated / "corruptions.json")
    assert scores["n"] == 12
    assert scores["clean"]["accuracy"] == read_json(evaluated / "metrics.json")["eight_way"]["accuracy"]
    assert len(scores["corruptions"]) == 9
    assert (evaluated / "corruptions.png").exists()
    assert verify(evaluated)[0].problems == []
    common = ["evaluate", "--ckpt", ckpt, "--npz", faces / "toy.npz", "--bootstrap", 0, "--corruptions"]
    assert call(*common, "--versus", evaluated, "--out", tmp_path / "again") == 0
    assert "mean corruption error over" in capsys.readouterr().out
    again = read_json(tmp_path / "again" / "corruptions.json")
    assert again["corruptions"] == scores["corruptions"]
    assert again["versus"]["mce"] == pytest.approx(100)


def test_the_report_shows_it(suite, evaluated, tmp_path):
    out = tmp_path / "report.html"
    assert call("report", suite / "B0_seed1", suite / "B3_seed1", evaluated, "--out", out, "--embedding", "none") == 0
    page = out.read_text()
    assert "Robustness and groups" in page
    assert (tmp_path / "viz" / "corruptions.svg").exists()
    assert (tmp_path / "viz" / "feature_geometry.svg").exists()


def test_what_does_not_go_together(ckpt, faces, evaluated, tmp_path, capsys):
    common = ["evaluate", "--ckpt", ckpt, "--out", tmp_path / "e", "--bootstrap", 0]
    assert call(*common, "--npz", faces / "toy.npz", "--versus", evaluated) == 2
    assert "give --corruptions with it" in error_of(capsys)
    assert call(*common, "--npz", faces / "toy.npz", "--corruptions", "--versus", tmp_path) == 2
    assert "holds no corruptions.json" in error_of(capsys)
    assert call(*common, "--folder", faces / "tree", "--corruptions", "--versus", evaluated) == 2
    assert "other faces" in error_of(capsys)
    assert call("evaluate", "--predictions", evaluated / "predictions.npz", "--corruptions") == 2
    assert "--corruptions: says how faces are predicted" in error_of(capsys)
    assert not (tmp_path / "e").exists()
