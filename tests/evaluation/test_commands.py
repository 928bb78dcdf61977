"""``ngd-fast evaluate`` as it is called, and what every command says of a fault."""

import csv
import json

import numpy as np
import pytest

from ngd_fast.artifacts.files import alone_in, read_json, write_json
from ngd_fast.artifacts.verify import verify
from ngd_fast.evaluation.predictions import Predictions
from ngd_fast.faces.classes import CLASS_NAMES

from .conftest import call, error_of


def test_npz_csv_and_folder_give_the_same(ckpt, faces, tmp_path, capsys):
    sources = {
        "npz": ["--npz", faces / "toy.npz"],
        "csv": ["--csv", faces / "list.csv", "--image-root", faces / "tree", "--class-map", faces / "map.json"],
        "folder": ["--folder", faces / "tree"],
    }
    found = {}
    for kind, source in sources.items():
        out = tmp_path / kind
        assert (
            call("evaluate", "--ckpt", ckpt, *source, "--outs-dir", out, "--bootstrap", "20", "--dataset", "toy") == 0
        )
        found[kind] = read_json(out / "metrics.json")
        assert verify(out)[0].problems == []
    for kind in ("csv", "folder"):
        for protocol in ("eight_way", "present_only"):
            one, other = found[kind][protocol], found["npz"][protocol]
            assert one["confusion"] == other["confusion"], kind
            # a folder's rows come in another order, which the last bits and the resamples show
            for name in ("macro_f1", "auroc_macro", "ece"):
                assert one[name] == pytest.approx(other[name], abs=1e-9), (kind, name)
    metrics = found["npz"]
    # the run has no metrics.json of its own: its student's metadata say what it is
    assert (metrics["variant"], metrics["seed"], metrics["dataset"]) == ("B1", 7, "toy")
    assert metrics["eight_way"]["absent"] == ["disgust", "contempt"]
    assert metrics["present_only"]["n"] == 12
    assert {"confmat.png", "confmat_present.png", "per_class.csv"} <= {p.name for p in (tmp_path / "npz").iterdir()}
    rows = list(csv.DictReader((tmp_path / "npz" / "per_class.csv").open()))
    assert {r["class"] for r in rows} == set(CLASS_NAMES) - {"disgust", "contempt"}
    assert float(rows[0]["recall"]) == pytest.approx(metrics["eight_way"]["per_class"]["neutral"]["recall"])
    shown = capsys.readouterr().out
    assert "8-way" in shown
    assert "present-only" in shown


def test_saved_predictions_keep_whose_they_are(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for variant in ("B0", "B3"):
        file = suite / f"{variant}_seed1" / "predictions_valid.npz"
        assert call("evaluate", "--predictions", file, "--bootstrap", 0) == 0
        metrics = read_json(tmp_path / "outs" / f"xval_faces_valid_{variant}_seed1" / "metrics.json")
        assert (metrics["run"], metrics["variant"], metrics["seed"]) == (f"{variant}_seed1", variant, 1)
    (tmp_path / "p.npz").write_bytes(file.read_bytes())
    for _ in range(2):
        assert call("evaluate", "--predictions", "p.npz", "--bootstrap", 0) == 0
    assert read_json(tmp_path / "outs" / "xval_faces_valid_p" / "metrics.json")["run"] == "p"
    (tmp_path / "metrics.json").write_text('{"run": "p", "variant": "B3", "seed": 2}')
    assert call("evaluate", "--predictions", "p.npz", "--bootstrap", 0) == 2, "another student's run of that name"
    assert "xval_faces_valid_p: holds the evaluation of another student" in error_of(capsys)


def test_another_students_evaluation_is_found_before_anything_is_predicted(ckpt, faces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_json("outs/xval_toy_student_best/metrics.json", {"eight_way": {}, "run": "student_best", "variant": "B0"})
    monkeypatch.setattr("ngd_fast.student.inference.predict", lambda *_, **__: pytest.fail("minutes for nothing"))
    assert call("evaluate", "--ckpt", ckpt, "--npz", faces / "toy.npz") == 2
    assert "xval_toy_student_best: holds the evaluation of another student" in error_of(capsys)


def test_evaluations_on_two_files_of_one_name_are_told_apart(ckpt, faces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with np.load(faces / "toy.npz") as content:
        np.savez("toy.npz", **{name: content[name][::-1] for name in content.files})
    for _ in range(2):
        assert call("evaluate", "--ckpt", ckpt, "--npz", faces / "toy.npz", "--bootstrap", 0) == 0
    capsys.readouterr()
    assert call("evaluate", "--ckpt", ckpt, "--npz", "toy.npz", "--bootstrap", 0) == 2
    assert "xval_toy_student_best: holds the evaluation on other faces of the same name" in error_of(capsys)
    assert call("evaluate", "--ckpt", ckpt, "--npz", "toy.npz", "--bootstrap", 0, "--dataset", "other") == 0


def test_a_training_is_not_overwritten(run, make_predictions, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    make_predictions().save(tmp_path / "p.npz")
    assert call("evaluate", "--predictions", tmp_path / "p.npz", "--out", run) == 2
    assert "holds the metrics of a training" in error_of(capsys)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    for _ in range(2):
        assert call("evaluate", "--predictions", tmp_path / "p.npz", "--out", tmp_path / "x", "--bootstrap", 0) == 0


def test_two_processes_do_not_write_one_evaluation(make_predictions, tmp_path, capsys):
    make_predictions().save(tmp_path / "p.npz")
    with alone_in(tmp_path / "out"):
        assert call("evaluate", "--predictions", tmp_path / "p.npz", "--outs-dir", tmp_path / "out") == 2
        assert "out: another process is writing into it" in error_of(capsys)
        assert list((tmp_path / "out").iterdir()) == []


def test_flip_tta_and_image_size_reach_the_network(ckpt, faces, tmp_path):
    for name, flags in {"plain": [], "flip": ["--flip-tta"], "large": ["--img-size", "48"]}.items():
        out = tmp_path / name
        call("evaluate", "--ckpt", ckpt, "--npz", faces / "toy.npz", "--outs-dir", out, "--bootstrap", 0, *flags)
    logits = {n: Predictions.load(tmp_path / n / "predictions.npz").logits for n in ("plain", "flip", "large")}
    assert not np.allclose(logits["plain"], logits["flip"], atol=1e-6)
    assert not np.allclose(logits["plain"], logits["large"], atol=1e-6)
    assert read_json(tmp_path / "flip" / "metrics.json")["flip_tta"] is True


def test_tables_and_choice_from_the_command_line(suite, tmp_path, capsys):
    assert call("evaluate", "table", suite, "--out", tmp_path / "viz") == 0
    assert (tmp_path / "viz" / "ablation_lite.tex").exists()
    assert "ablation_lite: faces_valid" in capsys.readouterr().out
    assert call("evaluate", "select", suite, "--out", tmp_path / "choice.json") == 0
    choice = read_json(tmp_path / "choice.json")
    assert choice["selected_on"] == "validation"
    assert choice["runs"][0]["variant"] == "B3"
    assert capsys.readouterr().out.splitlines()[-1] == choice["runs"][0]["run"]
    assert call("evaluate", "select", suite, "--select-on-test") == 2
    assert "no evaluations on test sets" in error_of(capsys)


def test_choosing_on_test_sets_says_so(ckpt, faces, tmp_path, capsys):
    call("evaluate", "--ckpt", ckpt, "--npz", faces / "toy.npz", "--outs-dir", tmp_path / "x", "--bootstrap", 0)
    capsys.readouterr()
    assert call("evaluate", "select", tmp_path / "x", "--select-on-test") == 0
    shown = capsys.readouterr()
    assert "TEST SETS" in shown.out
    assert "no longer an unbiased estimate" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "give --ckpt and one of --npz"),
        (["evaluate", "--ckpt", "{ckpt}"], "give --ckpt and one of --npz"),
        (["evaluate", "--ckpt", "none", "--npz", "{faces}/toy.npz"], "no such student"),
        (["evaluate", "--ckpt", "{ckpt}", "--npz", "none.npz"], "none.npz: no such file"),
        (["evaluate", "--ckpt", "{ckpt}", "--csv", "{faces}/list.csv"], "give --class-map"),
        (["evaluate", "--ckpt", "{ckpt}", "--npz", "{faces}/toy.npz", "--device", "tpu"], "device tpu"),
        (["evaluate", "--predictions", "{faces}/toy.npz"], "lacks logits"),
        (["evaluate", "--predictions", "{faces}/toy.npz", "--flip-tta"], "--flip-tta: says how faces are predicted"),
        (["evaluate", "--ckpt", "{ckpt}", "select", "none"], "--ckpt: stands before select"),
        (["evaluate", "--ckpt", "{ckpt}", "--npz", "{faces}/toy.npz", "--image-root", "."], "give --csv with it"),
        (["predict", "--ckpt", "{ckpt}", "{faces}/tree", "--image-root", "."], "give a CSV list with it"),
        (["predict", "--ckpt", "{ckpt}", "none.png"], "none.png: no such image"),
        (["predict", "--ckpt", "{ckpt}", "{faces}/tree", "--out", "x.txt"], "must end in .csv or .json"),
        (["export", "none", "--onnx", "x.onnx"], "no such student"),
        (["report", "none"], "no such run folder"),
        (["verify", "none"], "no such folder"),
    ],
)
def test_faults_get_one_line_and_exit_code_2(arguments, message, ckpt, faces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*(a.format(ckpt=ckpt, faces=faces) for a in arguments)) == 2
    assert message in error_of(capsys)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_labels_that_are_not_in_the_map(ckpt, faces, tmp_path, capsys):
    (tmp_path / "map.json").write_text('{"neutral": 0, "happiness": 1}')
    source = ["--csv", faces / "list.csv", "--image-root", faces / "tree", "--class-map", tmp_path / "map.json"]
    assert call("evaluate", "--ckpt", ckpt, *source) == 2
    assert "is not in the class map" in error_of(capsys)


def test_a_student_that_was_touched(ckpt, faces, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for file in ckpt.iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    weights = bytearray((run / "student_best.safetensors").read_bytes())
    weights[-1] ^= 1
    (run / "student_best.safetensors").write_bytes(weights)
    assert call("evaluate", "--ckpt", run, "--npz", faces / "toy.npz") == 2
    assert "is not the file that its run wrote" in error_of(capsys)


def test_the_authors_commands(ckpt, faces, tmp_path, capsys):
    """tools/eval_student_npz.py, eval_student_csv.py and train_student_distill.py with the flags of their README."""
    file = ckpt / "student_best.safetensors"
    ferplus, affmini = tmp_path / "class_map_ferplus.json", faces / "tree" / "labels_all.csv"
    ferplus.write_text(json.dumps({name: i for i, name in enumerate(CLASS_NAMES)}))
    affmini.write_text((faces / "list.csv").read_text())
    calls = {
        "xval_ferplus": ["--npz", faces / "toy.npz", "--class-map", ferplus],
        "xval_affmini": ["--csv", affmini, "--class-map", faces / "map.json", "--img-size", 224],
    }
    for name, flags in calls.items():
        assert call("evaluate", "--ckpt", file, *flags, "--outs-dir", tmp_path / name) == 0
        found = {path.name for path in (tmp_path / name).iterdir()}
        assert {"metrics.json", "confmat.png", "confmat_present.png"} <= found
    capsys.readouterr()
    train = ["--workers", "8", "--channels-last", "--acc-steps", "1", "--clip-grad", "1.0", "--best-metric", "macro_f1"]
    folders = ["--runs-dir", tmp_path / "runs", "--outs-dir", tmp_path / "outs"]
    assert call("student", "train", "--cfg", tmp_path / "A3_full.yaml", *train, *folders, "--no-ldacc") == 2
    assert "A3_full.yaml: no such configuration file" in error_of(capsys), "every flag is known"


def test_predictions_with_nan(make_predictions, tmp_path, capsys):
    predictions = make_predictions()
    predictions.save(tmp_path / "p.npz")
    arrays = dict(np.load(tmp_path / "p.npz"))
    arrays["logits"][3, 0] = np.nan
    np.savez(tmp_path / "p.npz", **arrays)
    assert call("evaluate", "--predictions", tmp_path / "p.npz", "--outs-dir", tmp_path / "x") == 2
    assert "NaN or infinite logits, the first is row 3" in error_of(capsys)
