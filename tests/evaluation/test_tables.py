import shutil
import subprocess

import pytest

from ngd_fast.artifacts.files import read_json, write_json, write_sums
from ngd_fast.artifacts.model_card import model_card
from ngd_fast.errors import UserError
from ngd_fast.evaluation.latex import escape, render
from ngd_fast.evaluation.metrics import classes_of, evaluate_predictions
from ngd_fast.evaluation.predictions import Predictions
from ngd_fast.evaluation.results import load_results
from ngd_fast.evaluation.selection import rank_runs
from ngd_fast.evaluation.tables import ablation_table, write_tables, xval_table
from ngd_fast.faces.classes import CLASS_NAMES


@pytest.fixture(scope="module")
def outs(suite, tmp_path_factory):
    """The suite, and B0 and B3 on a dataset that lacks two classes."""
    from .conftest import draw

    root = tmp_path_factory.mktemp("xval") / "outs"
    shutil.copytree(suite, root)
    for variant, signal in (("B0", 1.0), ("B3", 1.5)):
        predictions = draw((50, 40, 30, 20, 20, 0, 10, 0), signal=signal, dataset="ck_plus & friends")
        folder = root / f"xval_ckplus_{variant}"
        predictions.save(folder / "predictions.npz")
        meta = {"run": f"{variant}_seed1", "variant": variant, "seed": 1, "dataset": predictions.dataset}
        write_json(folder / "metrics.json", meta | evaluate_predictions(predictions, bootstrap=20))
    return root


def test_rows_are_the_mean_over_seeds(suite):
    table = ablation_table(load_results([suite]), resamples=100)
    assert [row["variant"] for row in table["rows"]] == ["B0", "B1", "B2", "B3"]
    b1 = table["rows"][1]
    values = [read_json(suite / f"B1_seed{s}" / "metrics.json")["valid"]["eight_way"]["macro_f1"] for s in (1, 2)]
    assert b1["macro_f1"]["mean"] == pytest.approx(sum(values) / 2)
    assert b1["seeds"] == [1, 2]
    assert b1["switches"] == {"kd": True, "proto": False, "d_geo": False}
    assert "versus_baseline" not in table["rows"][0]
    gain = table["rows"][3]["versus_baseline"]["macro_f1"]
    assert gain["difference"] == pytest.approx(
        table["rows"][3]["macro_f1"]["mean"] - table["rows"][0]["macro_f1"]["mean"]
    )
    assert gain["p"] < 0.05


def test_present_only_stands_beside_8_way_where_classes_lack(outs):
    blocks = xval_table(load_results([outs]))["blocks"]
    assert {(b["dataset"], b["protocol"]) for b in blocks} == {
        ("faces_valid", "eight_way"),
        ("ck_plus & friends", "eight_way"),
        ("ck_plus & friends", "present_only"),
    }


def test_every_number_in_the_latex_comes_from_the_json(outs, tmp_path):
    files = write_tables([outs], tmp_path / "viz")
    assert [f.name for f in files] == ["xval_main.json", "xval_main.tex", "ablation_lite.json", "ablation_lite.tex"]
    table = read_json(tmp_path / "viz" / "ablation_lite.json")
    tex = (tmp_path / "viz" / "ablation_lite.tex").read_text()
    for row in table["rows"]:
        assert f"{100 * row['macro_f1']['mean']:.2f}" in tex
    table["rows"][0]["accuracy"]["mean"] = 0.123456
    assert "12.35" in render(table)
    again = write_tables([outs], tmp_path / "again" / "viz")
    assert again[3].read_text() == tex


def test_captions_say_which_epoch_and_which_seeds(outs, tmp_path):
    write_tables([outs], tmp_path)
    ablation, xval = ((tmp_path / f"{name}.tex").read_text() for name in ("ablation_lite", "xval_main"))
    assert "each run at its best epoch on these rows. $\\pm$: mean and standard deviation over seeds 1, 2." in ablation
    assert "resamples of the rows, the seeds held fixed" in ablation
    assert "best epoch on validation, not of the last. $\\pm$: mean and standard deviation over seeds 1, 2." in xval
    assert "Brackets: seed 1 and its 95" in xval
    table = read_json(tmp_path / "ablation_lite.json")
    table["rows"][0]["seeds"] = [1, 2, 3]
    assert "over 2 to 3 seeds" in render(table)
    table["rows"][-1]["seeds"] = [1, 2, 3, 4]
    assert "over 2 to 4 seeds" in render(table)
    for row in table["rows"]:
        row["seeds"] = [None, None]
    assert "over 2 seeds" in render(table)


@pytest.mark.parametrize("columns", ["onecolumn", "twocolumn"])
def test_latex_compiles(outs, tmp_path, columns):
    engine = next((e for e in ("pdflatex", "tectonic", "lualatex", "xelatex") if shutil.which(e)), None)
    if engine is None:
        pytest.skip("no TeX engine here")
    write_tables([outs], tmp_path)
    document = rf"\documentclass[{columns}]{{article}}\usepackage{{booktabs}}\begin{{document}}" "\n"
    document += r"\input{xval_main}\input{ablation_lite}\end{document}" "\n"
    (tmp_path / "paper.tex").write_text(document)
    options = [] if engine == "tectonic" else ["-interaction=nonstopmode", "-halt-on-error"]
    done = subprocess.run([engine, *options, "paper.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout, "the tables fit an article's page"
    assert (tmp_path / "paper.pdf").stat().st_size > 1000


def test_a_dataset_without_a_metric_leaves_it_to_the_others(outs):
    table = xval_table(load_results([outs]))
    whole = render(table)
    assert "--" not in whole
    for row in table["blocks"][0]["rows"]:
        del row["auroc_macro"]
    assert "AUROC" in render(table)
    assert render(table).count("& -- &") == len(table["blocks"][0]["rows"])


def test_special_characters_are_escaped():
    assert escape("a_b & 5% {x}") == r"a\_b \& 5\% \{x\}"
    assert escape("<a|b>") == r"\textless{}a\textbar{}b\textgreater{}"


def test_classes_keep_their_order_on_disk(suite):
    block = load_results([suite / "B0_seed1"])[0].blocks["eight_way"]
    assert list(block["per_class"]) == sorted(block["per_class"]), "JSON is written with sorted keys"
    assert [name for name, _ in classes_of(block)] == list(CLASS_NAMES)


def test_what_cannot_stand_in_one_table(suite, outs, tmp_path):
    with pytest.raises(UserError, match="needs one dataset"):
        ablation_table(load_results([outs]))
    with pytest.raises(UserError, match="baseline 'B9' is not among"):
        ablation_table(load_results([suite]), baseline="B9")
    with pytest.raises(UserError, match="no such run folder"):
        load_results([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no metrics\.json"):
        load_results([tmp_path / "empty"])
    shutil.copytree(suite / "B0_seed1", tmp_path / "two" / "a")
    assert len(load_results([suite, tmp_path / "two"])) == 8, "the same run again is taken once"
    changed = read_json(tmp_path / "two" / "a" / "metrics.json")
    changed["valid"]["eight_way"]["accuracy"] += 0.1
    write_json(tmp_path / "two" / "a" / "metrics.json", changed)
    write_sums(tmp_path / "two" / "a")
    with pytest.raises(UserError, match="two results that differ"):
        load_results([suite, tmp_path / "two"])


def renamed(run, folder, **changes):
    """A copy of ``run`` in ``folder``, whose metrics.json says otherwise."""
    shutil.copytree(run, folder)
    write_json(folder / "metrics.json", read_json(folder / "metrics.json") | {"run": folder.name} | changes)
    write_sums(folder)
    return folder


def test_only_seeds_of_one_setting_are_averaged(suite, tmp_path):
    again = renamed(suite / "B0_seed1", tmp_path / "B0_again")
    with pytest.raises(UserError, match="both have seed 1, which would count as two"):
        write_tables([suite, again], tmp_path / "viz")
    longer = renamed(suite / "B0_seed1", tmp_path / "B0_seed3", seed=3, config={"epochs": 9, "device": "cuda"})
    shorter = renamed(suite / "B0_seed1", tmp_path / "B0_seed4", seed=4, config={"epochs": 4, "device": "cpu"})
    with pytest.raises(UserError, match=r"B0_seed3 and .*B0_seed4 differ in epochs \(9 and 4\)"):
        write_tables([longer, shorter], tmp_path / "viz")
    mirrored = renamed(suite / "B1_seed2", tmp_path / "B1_mirrored", seed=3, flip_tta=True)
    plain = renamed(suite / "B1_seed2", tmp_path / "B1_plain", seed=4, flip_tta=False)
    with pytest.raises(UserError, match="differ in flip_tta"):
        xval_table(load_results([mirrored, plain]))
    fingerprint = read_json(shorter / "ablation_fingerprint.json")
    fingerprint["weights"]["kd"] = 0.5
    write_json(shorter / "ablation_fingerprint.json", fingerprint)
    with pytest.raises(UserError, match=r"differ in the weight of kd \(0\.3 and 0\.5\)"):
        write_tables([suite / "B0_seed1", shorter], tmp_path / "viz")
    write_json(shorter / "metrics.json", read_json(shorter / "metrics.json") | {"seed": 1})
    write_sums(shorter)
    with pytest.raises(UserError, match="differ in the weight of kd"):  # and not that both have seed 1
        write_tables([suite / "B0_seed1", shorter], tmp_path / "viz")


def test_a_validation_done_again_in_float32_gives_way_to_the_run(suite, tmp_path, capsys):
    """``evaluate`` on the validation faces of a run trained in bfloat16 differs in the last digits."""
    run = renamed(suite / "B0_seed1", tmp_path / "B0_seed1", config={"image_size": 48})
    fingerprint = read_json(run / "ablation_fingerprint.json")
    fingerprint["files"]["weights"] = {"path": "student_best.safetensors", "sha256": "a" * 64}
    write_json(run / "ablation_fingerprint.json", fingerprint)
    blocks = read_json(run / "metrics.json")["valid"]
    blocks["eight_way"]["ece"] += 1e-5
    meta = {"run": "B0_seed1", "variant": "B0", "seed": 1, "dataset": "faces_valid", "flip_tta": False}
    again = meta | {"image_size": 48, "checkpoint": {"sha256": "a" * 64}} | blocks
    for folder in ("B0_again", "xval"):
        write_json(tmp_path / folder / "metrics.json", again)
        (result,) = load_results([run, tmp_path / folder])
        assert result.folder == run
        assert f"{folder}: B0_seed1 on its validation faces once more" in capsys.readouterr().err
    for change in ({"flip_tta": True}, {"image_size": 64}, {"checkpoint": {"sha256": "b" * 64}}):
        write_json(tmp_path / "xval" / "metrics.json", again | change)
        with pytest.raises(UserError, match="two results that differ"):
            load_results([run, tmp_path / "xval"])


def test_variants_are_paired_only_on_the_same_rows(suite, tmp_path):
    """The same faces in another order are resampled otherwise: equal students would seem to differ by chance."""
    runs = [renamed(suite / "B0_seed1", tmp_path / v, variant=v) for v in ("B0", "B1")]
    p = Predictions.load(runs[1] / "predictions_valid.npz")
    names = [p.names[-1 - i] for i in range(len(p))]
    Predictions(p.logits[::-1], p.labels[::-1], names, p.class_names, p.dataset).save(runs[1] / "predictions_valid.npz")
    write_sums(runs[1])
    with pytest.raises(UserError, match=r"B0 and .*B1: predictions cannot be paired"):
        ablation_table(load_results([tmp_path]))


def test_folders_of_one_name_are_two_students(suite, tmp_path):
    for variant in ("B0", "B3"):
        renamed(suite / f"{variant}_seed1", tmp_path / variant / "seed1")
    ranking = rank_runs(load_results([tmp_path]))
    assert [(r["run"], r["variant"]) for r in ranking["runs"]] == [("seed1", "B3"), ("seed1", "B0")]
    card = model_card(load_results([tmp_path / "B0"])[0], load_results([tmp_path / "B3"]))
    assert card.count("| seed1 | B3 |") == 1
    assert "Reported with and without D-Geo (against B3)" in card


def test_a_dataset_of_other_faces_needs_another_name(make_predictions, tmp_path):
    """As many rows under the same name, such as one made with another label mode."""
    for variant, counts in (("B0", (10, 20)), ("B3", (20, 10))):
        predictions = make_predictions((*counts, 0, 0, 0, 0, 0, 0))
        meta = {"run": variant, "variant": variant, "seed": 1, "dataset": predictions.dataset}
        write_json(tmp_path / variant / "metrics.json", meta | evaluate_predictions(predictions, bootstrap=0))
    with pytest.raises(UserError, match="they cannot stand in one table"):
        xval_table(load_results([tmp_path]))


@pytest.mark.parametrize("name", ["metrics.json", "predictions_valid.npz"])
def test_nothing_is_made_from_a_run_that_was_touched(run, name):
    load_results([run])
    content = (run / name).read_bytes()
    (run / name).write_bytes(content + b" ")
    with pytest.raises(UserError, match=rf"{name}: is not the file that its run wrote"):
        load_results([run])
