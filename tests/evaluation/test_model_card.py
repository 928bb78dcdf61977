"""``ngd-fast export --model-card`` as it is called."""

from ngd_fast.artifacts.files import read_json, write_json
from ngd_fast.evaluation.metrics import evaluate_predictions
from ngd_fast.evaluation.slices import evaluate_slices

from .conftest import call, write_run


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


def test_groups_corruptions_and_calibration_have_their_tables(run, make_predictions, tmp_path):
    evaluation = tmp_path / "x"
    meta = {"run": run.name, "variant": "B3", "seed": 1, "dataset": "elsewhere"}
    write_json(evaluation / "metrics.json", meta | evaluate_predictions(make_predictions(), bootstrap=0))
    groups = {n: "<b>a|b" if i % 2 else "c" for i, n in enumerate(make_predictions().names)}
    write_json(evaluation / "slices.json", evaluate_slices(make_predictions(), {"age": groups}, bootstrap=50))
    levels = {"accuracy": [0.5, 0.4, 0.3, 0.2, 0.1]}
    scores = {"clean": {"accuracy": 0.6}, "corruptions": {"jpeg": levels}, "versus": {"run": "B0", "mce": 93.21}}
    write_json(evaluation / "corruptions.json", scores)
    kept = {"nll": 1.5, "brier": 0.5, "ece": 0.07, "classwise_ece": 0.02}
    write_json(run / "calibration.json", {"method": "vector", "before": kept, "after": kept | {"ece": 0.0123}})
    assert call("export", run, "--model-card", tmp_path / "card.md", "--with", evaluation) == 0
    card = (tmp_path / "card.md").read_text()
    assert "| after | 1.5000 | 0.5000 | 0.0123 | 0.0200 |" in card
    assert "| jpeg | 50.0 | 40.0 | 30.0 | 20.0 | 10.0 |" in card
    assert "over B0: 93.2 %" in card
    assert "&lt;b>a\\|b" in card
    assert "<b>" not in card
    assert "no audit by age" not in card
