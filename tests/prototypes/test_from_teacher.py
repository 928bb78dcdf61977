"""From a teacher's file and topomaps to a bank, through the library and the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ngd_fast import PrototypeBank
from ngd_fast.artifacts.files import load_npz, save_npz, sha256
from ngd_fast.cli.prototypes import command
from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.errors import UserError
from ngd_fast.prototypes.analysis import compared
from ngd_fast.prototypes.from_teacher import build_bank, build_cluster_bank
from ngd_fast.teacher.config import InputConfig, NetworkConfig
from ngd_fast.teacher.inputs import embed
from ngd_fast.teacher.network import Teacher, load_teacher, save_teacher


@pytest.fixture(scope="module")
def maps() -> Topomaps:
    rng = np.random.default_rng(0)
    subject, trial, window = (i.ravel() for i in np.indices((4, 9, 3)))
    valence, arousal = ((rng.integers(1, 6, (4, 9)) - 3)[subject, trial] / 2 for _ in range(2))
    unrated = trial == 8
    return Topomaps(
        maps=rng.uniform(0, 1, (108, 2, 16, 16)), power=rng.normal(size=(108, 3, 2)),
        valence=np.where(unrated, np.nan, valence), arousal=np.where(unrated, np.nan, arousal),
        subject=subject, trial=trial, window=window, bands=["alpha", "beta"], channels=["F3", "F4", "O1"],
        mask=np.ones((16, 16), bool),
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(maps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path = maps.save(folder, "made")
    torch.manual_seed(0)
    teacher = Teacher(2, 16, NetworkConfig(width=8))
    teacher.set_input_statistics(torch.from_numpy(maps.maps))
    meta = {
        "band_names": ["alpha", "beta"], "input": InputConfig().model_dump(mode="json"), "maps_sha256": sha256(path),
        "train_subjects": [0, 1], "validation_subjects": [2, 3],
    }  # fmt: skip
    save_teacher(folder / "teacher_best.safetensors", teacher, meta)
    return folder, path


@pytest.mark.parametrize(("split", "subjects"), [("validation", [2, 3]), ("train", [0, 1]), ("all", [0, 1, 2, 3])])
def test_the_bank_is_algorithm_1_on_that_sides_rated_windows(maps, files, split, subjects):
    folder, path = files
    bank = build_bank(folder, path, split=split)
    teacher, meta = load_teacher(folder)
    _, features = embed(teacher, meta, maps)
    rows = np.isin(maps.subject, subjects) & maps.labelled
    expected = PrototypeBank.build(features[rows], maps.valence[rows], maps.arousal[rows])
    assert torch.equal(bank.prototypes, expected.prototypes) and torch.equal(bank.prior, expected.prior)
    assert bank.embedding_dim == 256 and bank.meta["subjects"] == subjects and bank.meta["split"] == split
    assert bank.meta["subject_disjoint_from_training"] == (split == "validation")
    assert bank.meta["teacher_sha256"] == sha256(folder / "teacher_best.safetensors")
    assert bank.meta["maps_sha256"] == sha256(path) and bank.meta["rating_levels"] == 5


def test_other_maps_than_the_teachers_own_need_all(maps, files, tmp_path):
    folder, _ = files
    other = replace(maps, maps=maps.maps * 0.5).save(tmp_path, "other")
    with pytest.raises(UserError, match="--split all"):
        build_bank(folder, other)
    assert build_bank(folder, other, split="all").meta["windows"] == 96
    wrong = replace(maps, bands=["delta", "beta"]).save(tmp_path, "wrong")
    with pytest.raises(UserError, match="the teacher was trained on 16x16 of alpha, beta"):
        build_bank(folder, wrong, split="all")
    unrated = replace(maps, valence=maps.valence * np.nan, arousal=maps.arousal * np.nan).save(tmp_path, "unrated")
    with pytest.raises(UserError, match="prototypes need ratings"):
        build_bank(folder, unrated, split="all")
    with pytest.raises(ValueError, match="split"):
        build_bank(folder, other, split="test")
    broken = load_npz(other)
    broken["maps"][3, 0, 5, 5] = np.nan
    save_npz(tmp_path / "nan.npz", broken)
    with pytest.raises(UserError, match="NaN or infinite in 1 of 108 rows"):
        build_bank(folder, tmp_path / "nan.npz", split="all")


def invoke(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments])


def test_the_command_line_builds_shows_verifies_and_sweeps(files, tmp_path):
    folder, path = files
    source, bank = ("--teacher", folder, "--maps", path), tmp_path / "prototypes_7x7.npz"
    result = invoke("build", *source, "--grid", 7, "--out", bank, "--class-prior", "va_of_label")
    assert result.exit_code == 0, result.output
    assert "ratings on 5 levels can never fill 24 of its 49 bins" in result.output
    loaded = PrototypeBank.load(bank)
    assert loaded.grid == 7 and loaded.class_prior.shape == (8, 49)
    assert loaded.meta["class_prior"]["class_names"][1] == "happiness"

    result = invoke("show", bank, "--out", tmp_path / "figs")
    assert result.exit_code == 0, result.output
    assert "silhouette" in result.output and "filled from" in result.output
    assert result.output.count("\nempty ") == int(loaded.empty.sum())
    assert {p.name for p in (tmp_path / "figs").iterdir()} == {"coverage_7x7.png", "centers_7x7.png"}

    assert invoke("verify", bank).exit_code == 0 and loaded.checksum in invoke("verify", bank).output
    arrays = load_npz(bank)
    arrays["prior"][0] += 1e-6
    save_npz(bank, arrays)
    assert isinstance(invoke("verify", bank).exception, UserError)

    result = invoke("sweep", *source, "--json", tmp_path / "sweep.json")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["grid"] for row in rows] == list(range(3, 10)) and rows[4]["unreachable"] == 24
    assert "7x7: ratings on 5 levels can never fill 24" in result.output
    assert isinstance(invoke("sweep", *source, "--smallest", 5, "--largest", 4).exception, UserError)


def test_the_command_line_builds_shows_and_compares_clusters(files, tmp_path):
    folder, path = files
    source, bank = ("--teacher", folder, "--maps", path), tmp_path / "k.npz"
    result = invoke("build", *source, "--layout", "kmeans", "--k", 6, "--seed", 3, "--out", bank)
    assert result.exit_code == 0, result.output
    loaded = PrototypeBank.load(bank, embedding_dim=256)
    assert loaded.layout == "kmeans 6" and loaded.meta["seed"] == 3 and loaded.meta["split"] == "validation"
    assert f"6 prototypes, clusters of {loaded.counts.min()} to" in result.output and loaded.checksum in result.output
    expected = build_cluster_bank(folder, path, k=6, seed=3)
    assert torch.equal(loaded.prototypes, expected.prototypes) and loaded.meta["subjects"] == [2, 3]

    result = invoke("show", bank, "--out", tmp_path / "figs")
    assert result.exit_code == 0, result.output
    assert f"{loaded.va[5, 0]:+.2f}" in result.output and "empty" not in result.output
    assert {p.name for p in (tmp_path / "figs").iterdir()} == {"coverage_kmeans6.png", "centers_kmeans6.png"}
    assert "unchanged, kmeans 6 prototypes of 256" in invoke("verify", bank).output

    invoke("build", *source, "--grid", 7, "--out", tmp_path / "g.npz")
    result = invoke("compare", tmp_path / "g.npz", bank)
    assert result.exit_code == 0 and "1.000" in result.output
    assert f"{compared(loaded)['mean_distance']:.3f}" in result.output
    for options, message in (
        (("--layout", "kmeans", "--grid", 5), "--grid: needs a grid"),
        (("--layout", "kmeans", "--class-prior", "va_of_label"), "--class-prior: needs a grid"),
        (("--k", 5), "--k: is for --layout kmeans"),
        (("--layout", "kmeans", "--k", 17), "k 17: there are only 16 different windows"),
    ):
        error = invoke("build", *source, *options, "--out", tmp_path / "none.npz").exception
        assert isinstance(error, UserError) and message in str(error) and "\n" not in str(error)
    assert "1 is not in the range" in invoke("build", *source, "--layout", "kmeans", "--k", 1).output
    assert not (tmp_path / "none.npz").exists()


def test_the_class_prior_is_off_by_default(files, tmp_path):
    folder, path = files
    assert invoke("build", "--teacher", folder, "--maps", path, "--out", tmp_path / "b.npz").exit_code == 0
    assert PrototypeBank.load(tmp_path / "b.npz").class_prior is None
