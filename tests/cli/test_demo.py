"""The demo in its smallest form: every stage of the main job, in one process, from recordings to verified tables."""

import json
import sys

import numpy as np
import pytest

from ngd_fast import cli
from ngd_fast.cli.demo import _run
from ngd_fast.errors import UserError
from ngd_fast.prototypes.bank import PrototypeBank

pytest.importorskip("mne")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--small", "--out", str(out), "--device", "cpu"])
    assert stop.value.code == 0
    return out


def test_every_variant_has_metrics_over_both_protocols(demo):
    for variant in ("B0", "B1", "B2", "B3"):
        metrics = json.loads((demo / "runs" / f"{variant}_seed1" / "metrics.json").read_text())
        assert metrics["variant"] == variant and metrics["seed"] == 1
        for protocol in ("eight_way", "present_only"):
            block = metrics["valid"][protocol]
            low, high = block["ci"]["accuracy"]
            assert block["n"] == 80 and 0 <= low <= block["accuracy"] <= high <= 1


def test_the_terms_are_on_where_the_variant_says_so(demo):
    """A variant that silently trained another objective would show here."""
    wanted = {"B0": (False, False, False), "B1": (True, False, False), "B2": (True, True, False), "B3": (True,) * 3}
    for variant, switches in wanted.items():
        lines = (demo / "runs" / f"{variant}_seed1" / "log.jsonl").read_text().splitlines()
        epochs = [entry for entry in map(json.loads, lines) if entry["event"] == "epoch"]
        found = tuple(any(epoch.get(key, 0) > 0 for epoch in epochs) for key in ("kd", "proto", "geo_weight"))
        assert found == switches, variant


def test_the_bank_is_the_teachers(demo):
    bank = PrototypeBank.load(demo / "prototypes_5x5.npz", embedding_dim=256)
    assert bank.prototypes.shape == (25, 256)
    assert np.isclose(float(bank.prior.sum()), 1)
    assert bank.counts.sum() > 0


def test_tables_figures_and_report_are_there(demo):
    for name in ("runs/viz/ablation_lite.tex", "viz/xval_main.tex", "viz/topomaps.png", "report.html", "overview.png"):
        assert (demo / name).stat().st_size > 200, name
    assert "Traceback" not in (demo / "report.html").read_text()


def test_verify_notices_a_touched_run(demo, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify", str(demo / "xval" / "B3_CK-like")])
    assert stop.value.code == 0
    path = demo / "xval" / "B3_CK-like" / "metrics.json"
    path.write_text(path.read_text().replace('"B3"', '"B4"'))
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify", str(demo / "xval" / "B3_CK-like")])
    assert stop.value.code == 2
    assert "metrics.json" in capsys.readouterr().out


def test_a_folder_of_another_demo_is_refused_before_anything_is_made(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--small", "--out", str(tmp_path), "--device", "cpu"])
    assert stop.value.code == 2 and not list((tmp_path / "data").iterdir())
    assert capsys.readouterr().err == f"error: --out {tmp_path}: is not empty; choose another folder\n"


@pytest.mark.parametrize("package", ["mne", "matplotlib"])
def test_a_package_that_is_absent_is_named_before_anything_is_made(tmp_path, monkeypatch, capsys, package):
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--small", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert "pip install 'ngd-fast[" in capsys.readouterr().err


def test_a_training_that_was_stopped_ends_the_demo(tmp_path, monkeypatch):
    """SIGTERM lets a training end well, with a checkpoint: what follows must not go on with half a teacher."""
    monkeypatch.setattr(cli.group, "main", lambda *arguments, **options: None)
    with pytest.raises(UserError, match=r"student train was stopped before it wrote .*metrics\.json"):
        _run("student", "train", makes=tmp_path / "metrics.json")
    (tmp_path / "metrics.json").write_text("{}")
    _run("student", "train", makes=tmp_path / "metrics.json")
