import shutil
import subprocess

import numpy as np
import pytest

from ngd_fast.artifacts.files import read_json, write_json, write_sums
from ngd_fast.artifacts.fingerprint import make_fingerprint
from ngd_fast.artifacts.verify import verify
from ngd_fast.errors import UserError
from ngd_fast.evaluation.predictions import Predictions
from ngd_fast.evaluation.results import load_results
from ngd_fast.evaluation.tables import write_tables

from .conftest import call


def problems(folder):
    return [line for found in verify(folder) for line in found.problems]


def test_an_untouched_run_holds(run, capsys):
    (found,) = verify(run)
    assert found.problems == []
    assert found.checked == ["5 checksums", "fingerprint", "metrics.json valid from predictions_valid.npz"]
    assert call("verify", run) == 0
    assert "as written" in capsys.readouterr().out
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS.txt"], cwd=run).returncode == 0


def test_a_number_typed_by_hand_is_found_even_with_new_checksums(run, capsys):
    metrics = read_json(run / "metrics.json")
    metrics["valid"]["eight_way"]["accuracy"] = 0.99
    write_json(run / "metrics.json", metrics)
    write_sums(run)
    (line,) = problems(run)
    assert line.startswith("metrics.json valid: eight_way.accuracy: says 0.99, is 0.")
    assert call("verify", run) == 2
    assert line in capsys.readouterr().out


def test_a_run_that_is_called_another_is_found_even_with_new_checksums(run):
    write_json(run / "metrics.json", {**read_json(run / "metrics.json"), "variant": "B2", "seed": 9})
    write_sums(run)
    made = read_json(run / "ablation_fingerprint.json")
    assert problems(run) == [
        f"ablation_fingerprint.json: variant is {made['variant']}, but metrics.json says B2",
        f"ablation_fingerprint.json: seed is {made['seed']}, but metrics.json says 9",
    ]


def test_every_kind_of_touch_is_named(run):
    (run / "log.jsonl").unlink()
    (run / "config.yaml").write_text("variant: B9\n")
    found = problems(run)
    assert "log.jsonl: missing" in found
    assert "config.yaml: changed" in found
    assert any("config: config.yaml is not the file that the run was made from" in line for line in found)
    (run / "extra.txt").write_text("x")
    assert any("extra.txt: not in SHA256SUMS.txt" in line for line in verify(run)[0].notes)


def test_changed_predictions_change_the_metrics(run):
    predictions = Predictions.load(run / "predictions_valid.npz")
    logits = predictions.logits.copy()
    logits[:20] = np.roll(logits[:20], 1, axis=1)
    Predictions(logits, predictions.labels, predictions.names, predictions.class_names, predictions.dataset).save(
        run / "predictions_valid.npz"
    )
    found = problems(run)
    assert "predictions_valid.npz: changed" in found
    assert any("eight_way.accuracy" in line for line in found)


def test_a_file_cut_short_is_a_finding_not_a_crash(run):
    whole = (run / "predictions_valid.npz").read_bytes()
    (run / "predictions_valid.npz").write_bytes(whole[: len(whole) // 2])
    assert any("is it truncated?" in line for line in problems(run))


def test_data_that_changed_or_went_away(run, tmp_path):
    data = tmp_path / "faces.npz"
    data.write_bytes(b"faces")
    make_fingerprint(run, variant="B3", seed=1, switches={}, weights={}, files={"data": data})
    write_sums(run)
    assert problems(run) == []
    data.write_bytes(b"other faces")
    assert any("data:" in line and "is not the file" in line for line in problems(run))
    data.unlink()
    (found,) = verify(run)
    assert found.problems == []
    assert any("so it was not checked" in line for line in found.notes)


def test_tables_are_made_again(suite, tmp_path):
    root = tmp_path / "outs"
    shutil.copytree(suite, root)
    write_tables([root], root / "viz")
    assert problems(root) == []
    tex = root / "viz" / "ablation_lite.tex"
    tex.write_text(tex.read_text().replace("B3", "B4"))
    assert problems(root) == ["ablation_lite.tex: is not what ablation_lite.json gives"]
    table = read_json(root / "viz" / "xval_main.json")
    table["blocks"][0]["rows"][0]["accuracy"]["mean"] = 0.5
    write_json(root / "viz" / "xval_main.json", table)
    assert any("xval_main.json: blocks[0].rows[0].accuracy.mean: says 0.5" in line for line in problems(root))


def test_a_table_whose_json_is_gone(suite, tmp_path):
    write_tables([suite], tmp_path / "viz")
    for name in ("ablation_lite", "xval_main"):
        (tmp_path / "viz" / f"{name}.json").unlink()
        assert f"{name}.json: missing, so {name}.tex cannot be made again" in problems(tmp_path)


def test_nothing_to_verify(tmp_path):
    with pytest.raises(UserError, match="is it a finished run"):
        verify(tmp_path)
    assert call("verify", tmp_path / "none") == 2


def test_a_run_without_its_sums(run):
    (run / "SHA256SUMS.txt").unlink()
    assert "SHA256SUMS.txt: missing" in problems(run)


def test_an_evaluation_without_its_sums(run):
    (run / "ablation_fingerprint.json").unlink()
    (run / "SHA256SUMS.txt").unlink()
    assert problems(run) == ["SHA256SUMS.txt: missing"]


def test_what_cannot_be_read_is_a_finding_and_the_other_checks_go_on(run):
    metrics = read_json(run / "metrics.json")
    metrics["valid"]["eight_way"]["bootstrap"]["seed"] = -1
    write_json(run / "metrics.json", metrics)
    (run / "ablation_fingerprint.json").unlink()
    (run / "ablation_fingerprint.json").mkdir()
    found = problems(run)
    assert "ablation_fingerprint.json: missing" in found
    assert any(line.startswith("ablation_fingerprint.json: cannot be checked") for line in found)
    assert any(line.startswith("metrics.json: cannot be checked") and "bootstrap.seed" in line for line in found)
    (run / "SHA256SUMS.txt").write_bytes(b"\xff")
    assert any(line.startswith("SHA256SUMS.txt: cannot be checked") for line in problems(run))
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_results([run])


def test_json_of_another_shape_is_a_finding(run):
    write_json(run / "ablation_fingerprint.json", {"files": {"config": "config.yaml"}})
    metrics = read_json(run / "metrics.json")
    metrics["valid"]["eight_way"].pop("confusion")
    write_json(run / "metrics.json", metrics)
    (run / "SHA256SUMS.txt").write_text("nonsense\n")
    found = problems(run)
    assert any("ablation_fingerprint.json: is not as ngd-fast writes it" in line for line in found)
    assert any("metrics.json: cannot be checked" in line and "lacks eight_way confusion" in line for line in found)
    assert any("SHA256SUMS.txt: cannot be checked" in line for line in found)


def test_a_run_of_another_kind_has_its_sums_checked(tmp_path):
    """An EEG teacher's metrics are not a student's: nothing to derive, nothing wrong."""
    write_json(tmp_path / "metrics.json", {"validation": {"valence": {"ccc": 0.4}}})
    write_sums(tmp_path)
    (found,) = verify(tmp_path)
    assert (found.problems, found.checked) == ([], ["1 checksums"])
    with pytest.raises(UserError, match="holds no evaluation of a student"):
        load_results([tmp_path])
