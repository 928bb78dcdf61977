"""A run's folder, cross-validation, baselines and the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from ngd_fast.artifacts.files import alone_in, check_sums, load_npz, read_json
from ngd_fast.cli.teacher import command
from ngd_fast.config import load_config
from ngd_fast.errors import UserError
from ngd_fast.prototypes.from_teacher import build_bank
from ngd_fast.teacher.baselines import evaluate_baselines
from ngd_fast.teacher.config import TeacherConfig
from ngd_fast.teacher.crossval import cross_validate, make_splits, run_crossval
from ngd_fast.teacher.inputs import embed
from ngd_fast.teacher.metrics import evaluate_va
from ngd_fast.teacher.network import load_teacher
from ngd_fast.teacher.run import run_training
from tests.teacher.conftest import make_maps

QUICK = [
    "optimizer.epochs=3",
    "optimizer.batch_size=64",
    "network.width=8",
    "input.context=1",
]
FLAGS = [part for setting in QUICK for part in ("--set", setting)]


def rated(maps):
    return np.stack([maps.valence, maps.arousal], axis=1)


@pytest.fixture(scope="module")
def saved(maps, support, tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    return maps.save(folder, "made"), support.save(folder, "support")


def test_a_run_is_complete_and_repeats_byte_for_byte(maps, saved, tmp_path):
    config = load_config(TeacherConfig, overrides=QUICK)
    first = run_training(saved[0], tmp_path / "a" / "teacher", config, support_path=saved[1])
    second = run_training(saved[0], tmp_path / "b" / "teacher", config, support_path=saved[1])
    a, b = tmp_path / "a" / "teacher", tmp_path / "b" / "teacher"
    assert first == second == read_json(a / "metrics.json")
    assert check_sums(a) == []
    for name in ("teacher_best.safetensors", "metrics.json", "splits.json", "config.yaml"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert {"log.jsonl", "SHA256SUMS.txt", "tb", "viz"} <= {p.name for p in a.iterdir()}
    lines = [json.loads(line) for line in (a / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3] and lines[0]["consistency"] > 0
    assert load_config(TeacherConfig, a / "config.yaml") == config
    # What the folder says can be derived again from its weights and its splits.
    teacher, meta = load_teacher(a)
    (split,) = read_json(a / "splits.json")["splits"]
    rows = np.isin(maps.subject, split["validation"])
    va, features = embed(teacher, meta, maps)
    target = np.stack([maps.valence, maps.arousal], axis=1)
    assert evaluate_va(va[rows], target[rows], maps.subject[rows]) == first["validation"]
    assert features.shape == (len(maps), 256) and first["windows"]["support"] == 96
    assert meta["validation_subjects"] == split["validation"]
    with pytest.raises(UserError, match="the teacher was trained on"):
        embed(teacher, meta, replace(maps, bands=["delta", "theta"]))


def test_baselines_are_what_they_are_called(maps):
    config = TeacherConfig()
    blocks = evaluate_baselines(maps, (1, 2, 3, 4), (5, 6), config)
    assert blocks["mean"]["valence"]["ccc"] == 0
    # The patterns are linear in the ratings: ridge must find them.
    assert blocks["ridge"]["valence"]["ccc"] > 0.5 and blocks["extra_trees"]["arousal"]["ccc"] > 0.3
    train = np.isin(maps.subject, (1, 2, 3, 4))
    test = np.isin(maps.subject, (5, 6))
    expected = np.sqrt(np.mean((maps.valence[test] - maps.valence[train].mean()) ** 2))
    assert blocks["mean"]["valence"]["rmse"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("folds", "number"), [(4, 4), ("loso", 8)])
def test_cross_validation_tests_everybody_once_and_never_sees_a_test_rating(maps, folds, number):
    config = load_config(TeacherConfig, overrides=[*QUICK, "optimizer.epochs=1"])
    splits = make_splits(maps, folds, config)
    metrics, predictions = cross_validate(maps, splits, config, seeds=[1, 2, 1])
    assert metrics["seeds"] == [1, 2] and len(metrics["folds"]) == number
    assert set(predictions) == {"teacher_seed1", "teacher_seed2", "mean", "ridge", "extra_trees"}
    assert all(np.isfinite(va).all() for va in predictions.values())
    trials = [(maps.subject == s) & (maps.trial == t) for s in np.unique(maps.subject) for t in np.unique(maps.trial)]
    means = [np.array([va[rows].mean(axis=0) for rows in trials]) for va in (predictions["ridge"], rated(maps))]
    expected = evaluate_va(*means, np.repeat(np.unique(maps.subject), 6))
    assert metrics["by_trial"]["ridge"]["arousal"]["rmse"] == pytest.approx(expected["arousal"]["rmse"])
    assert metrics["by_trial"]["teacher_seed1"]["valence"]["n"] == len(trials) == 48
    # Turn the ratings of one fold's test subjects upside down: what is predicted for them stays.
    rows = np.isin(maps.subject, splits[0].test)
    flipped = replace(
        maps,
        valence=np.where(rows, -maps.valence, maps.valence),
        arousal=np.where(rows, -maps.arousal, maps.arousal),
    )
    _, again = cross_validate(flipped, splits[:1], config, seeds=[1])
    for name in ("teacher_seed1", "ridge", "mean"):
        np.testing.assert_array_equal(again[name][rows], predictions[name][rows])
        assert np.isnan(again[name][~rows]).all()


def test_cross_validation_without_choosing_the_epoch_trains_on_all_other_subjects(maps, saved, tmp_path):
    config = load_config(TeacherConfig, overrides=[*QUICK, "choice=last"])
    metrics = run_crossval(saved[0], tmp_path / "cv", config, folds=2, seeds=[1])
    assert all(fold["epochs"] == {"1": 3} for fold in metrics["folds"])
    stored = read_json(tmp_path / "cv" / "splits.json")
    assert stored["scheme"] == "2" and all(len(s["train"]) == 4 and not s["validation"] for s in stored["splits"])
    assert check_sums(tmp_path / "cv") == []
    stored = load_npz(tmp_path / "cv" / "predictions.npz")
    again = evaluate_va(stored["teacher_seed1"], stored["rating"], stored["subject"])
    assert again == metrics["pooled"]["teacher_seed1"]
    summary = metrics["summary"]["teacher"]
    assert summary["valence_pooled"] == pytest.approx(again["valence"]["ccc"])
    folds = [fold["metrics"]["teacher_seed1"]["valence"]["ccc"] for fold in metrics["folds"]]
    assert summary["valence_folds"] == pytest.approx(np.mean(folds))


def invoke(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments])


def test_the_command_line_trains_and_cross_validates(saved, tmp_path):
    result = invoke("train", "--maps", saved[0], "--out", tmp_path / "t", *FLAGS, "--device", "cpu", "--no-figures")
    assert result.exit_code == 0, result.output
    assert "teacher" in result.output and "ridge" in result.output and not (tmp_path / "t" / "viz").exists()
    result = invoke("crossval", "--maps", saved[0], "--out", tmp_path / "cv", "--folds", 2, "--seeds", "1,2", *FLAGS)
    assert result.exit_code == 0, result.output
    assert "fold1 (4)" in result.output and "2 seed(s)" in result.output
    assert (tmp_path / "cv" / "viz" / "predicted_vs_rated.png").stat().st_size > 5000


def test_several_datasets_are_one_and_each_is_reported_by_itself(maps, saved, quick, tmp_path):
    other = make_maps(subjects=4, seed=5, first_subject=1)
    other.save(tmp_path, "other")
    files = [saved[0], tmp_path / "other_topomaps_all.npz"]
    config = quick.model_copy(update={"choice": "last"})
    metrics = run_crossval(files, tmp_path / "cv", config, folds=2, seeds=[1], figures=False)
    a, b = metrics["datasets"]
    assert (a, b) == ("made", "other")
    for name in (a, b):
        assert list(metrics["datasets"][name]) == ["trained on all", "trained on it", "trained on the others"]
        for blocks in metrics["datasets"][name].values():
            assert list(blocks) == ["teacher", "mean", "ridge", "extra_trees"]
    # The same patterns in both: ridge learns them from either.
    assert metrics["datasets"][b]["trained on the others"]["ridge"]["valence"]["ccc"] > 0.5
    tested = [subject for fold in metrics["folds"] for subject in fold["test"]]
    assert sorted(tested) == [*range(1, 9), 11, 12, 13, 14]
    run_training(files, tmp_path / "run", config, figures=False)
    bank = build_bank(tmp_path / "run", files)
    validation = read_json(tmp_path / "run" / "splits.json")["splits"][0]["validation"]
    assert bank.meta["subjects"] == validation
    with pytest.raises(UserError, match=r"not what this teacher was trained on.*those files, in that order"):
        build_bank(tmp_path / "run", files[::-1])


def test_a_run_is_not_overwritten_and_one_that_cannot_start_leaves_nothing(support, saved, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "log.jsonl").touch()
    for arguments in (("train",), ("crossval", "--folds", 2)):
        result = invoke(*arguments, "--maps", saved[0], "--out", tmp_path / "full", *FLAGS)
        assert str(result.exception) == f"--out {tmp_path / 'full'}: is not empty; choose another folder"
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["log.jsonl"]
    other = replace(support, bands=["delta", "gamma"]).save(tmp_path, "other")
    result = invoke("train", "--maps", saved[0], "--support", other, "--out", tmp_path / "out", *FLAGS)
    assert "maps are 16x16 of delta, gamma" in str(result.exception) and not (tmp_path / "out").exists()
    result = invoke("crossval", "--maps", saved[0], "--folds", 2, "--out", "/proc/none", *FLAGS)
    assert "--out /proc/none: cannot be made" in str(result.exception) and "cross-validation" not in result.output


def test_the_users_faults_are_said_in_a_line(maps, support, saved, tmp_path):
    one = maps.subset(maps.subject == 1).save(tmp_path, "one")
    for arguments, message in (
        (("train", "--maps", tmp_path / "absent.npz"), "no such file"),
        (("train", "--maps", saved[1]), "none of its 96 windows"),
        (("train", "--maps", one), "needs at least 2 labelled subjects"),
        (("train", "--maps", saved[0], "--set", "optimizer.lrr=1"), "did you mean optimizer.lr"),
        (("train", "--maps", saved[0], "--set", "split.validation_subjects=[77]"), "no labelled window"),
        (("train", "--maps", saved[0], "--set", "seed=-1"), "seed: input should be greater than or equal to 0"),
        (("train", "--maps", saved[0], "--set", "split.seed=-1"), "split.seed: input should be greater"),
        (("train", "--maps", saved[0], "--support", saved[0]), "384 of its 384 windows are the labelled maps' own"),
        (("crossval", "--maps", saved[0], "--support", saved[0]), "384 of its 384 windows are the labelled maps' own"),
        (("train", "--maps", saved[0], "--device", "quantum"), "device quantum: must be auto"),
        (("crossval", "--maps", saved[0], "--folds", "many"), "--folds many"),
        (("crossval", "--maps", saved[0], "--folds", "9"), "9 folds"),
        (("crossval", "--maps", saved[0], "--seeds", "a"), "--seeds a"),
    ):
        result = invoke(*arguments, *(() if "--out" in arguments else ("--out", tmp_path / "out")))
        assert isinstance(result.exception, UserError), (arguments, result.output, result.exception)
        assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def gameemo(shared_data):
    from ngd_fast.eeg.pipeline import MapConfig
    from ngd_fast.eeg.table import topomaps_from_table

    folder = shared_data / "gameemo"
    config = load_config(MapConfig, overrides=["topomap.resolution=16"])
    return topomaps_from_table(folder / "bandpower_12s_2s.csv", config, ratings=folder / "sam_scores.csv")


def test_gameemo_on_subjects_not_seen(gameemo):
    # Two of the seven folds and a third of the epochs: all of it takes minutes.
    config = load_config(TeacherConfig, overrides=["optimizer.epochs=10", "choice=last"])
    metrics, _ = cross_validate(gameemo, make_splits(gameemo, 7, config)[:2], config, seeds=[1])
    blocks = metrics["pooled"]
    assert blocks["teacher_seed1"]["valence"]["n"] == 8 * 4 * 29
    for name, least in (("teacher_seed1", 0.15), ("ridge", 0.05)):
        assert (blocks[name]["valence"]["ccc"] + blocks[name]["arousal"]["ccc"]) / 2 > least


def test_gameemos_bank_is_finite_and_repeats_a_prototype_only_where_its_sources_repeat(gameemo, tmp_path):
    path = gameemo.save(tmp_path, "gameemo")
    run_training(path, tmp_path / "t", load_config(TeacherConfig, overrides=["optimizer.epochs=2"]), figures=False)
    bank = build_bank(tmp_path / "t", path)
    assert bank.prototypes.isfinite().all() and bank.counts.sum() == 7 * 4 * 29
    for k in range(25):
        for other in range(k):
            if (bank.prototypes[k] == bank.prototypes[other]).all():
                assert (bank.filled_from[k] == bank.filled_from[other]).all()


@pytest.mark.parametrize("arguments", [("train",), ("crossval", "--folds", 2)])
def test_two_processes_do_not_write_one_run(saved, tmp_path, arguments):
    with alone_in(tmp_path / "out"):
        result = invoke(*arguments, "--maps", saved[0], "--out", tmp_path / "out", *FLAGS)
        assert str(result.exception) == f"{tmp_path / 'out'}: another process is writing into it"
        assert list((tmp_path / "out").iterdir()) == []
