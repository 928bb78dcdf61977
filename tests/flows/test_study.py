"""The study as a whole: its run folder, its numbers, its page, and what it refuses."""

import json

import numpy as np
import pytest
import torch
import yaml

from ngd_fast import cli
from ngd_fast.artifacts.verify import verify
from ngd_fast.flows import slow, study
from ngd_fast.flows.manifolds import load_points

SMALL = ("--set", "particles=1000", "--set", "steps=500")


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["flows", *map(str, arguments)])
    return stop.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("flows") / "sphere"
    options = ("--seed", 3, "--set", "gamma=0.2", "--set", "concentration=10")
    assert run("study", "--manifold", "sphere", *SMALL, *options, "--out", out) == 0
    return out


def test_a_study_finds_the_wells_and_says_so(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    rules, exact = metrics["learned"]["rules"], metrics["learned"]["exact"]
    for rule in ("oja", "sanger", "projected"):
        assert max(rules[rule]["angles_degrees"]) < 8
        assert rules[rule]["captured"] == pytest.approx(1, abs=0.01)
        assert rules[rule]["norm2"] == pytest.approx(3, abs=0.1)
        assert rules[rule]["probe"] > 0.97
    assert rules["trace"]["norm2"] == pytest.approx(1, abs=0.05)
    assert rules["trace"]["singular_values"][1] < 0.1
    assert rules["hebb"]["diverged_at"] and rules["sanger"]["diverged_at"] is None
    assert exact["probe_random"] < 0.85 < 0.97 < exact["probe_eigenspace"]
    assert metrics["moves"]["barker"]["semigroup_slope"] > 1.75


def test_a_run_folder_is_whole(folder):
    assert [found.problems for found in verify(folder)] == [[]]
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 3
    figures = {path.name for path in (folder / "viz").glob("*.svg")}
    assert figures == {f"{n}.svg" for n in ("particles", "limit", "collapse", "energy", "learning", "separability")}
    (folder / "series.npz").rename(folder / "moved.npz")
    assert verify(folder)[0].problems == ["series.npz: missing"]
    (folder / "moved.npz").rename(folder / "series.npz")


def test_the_page_shows_what_was_measured(folder, tmp_path):
    assert run("report", folder, "--out", tmp_path / "flows.html") == 0
    page = (tmp_path / "flows.html").read_text(encoding="utf-8")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"{metrics['learned']['rules']['sanger']['angles_degrees'][0]:.2f}" in page
    assert page.count("<img") == 6
    assert "rings stay inseparable" in page


def test_separability_is_conditional():
    cases = study.separability(study.StudyConfig(particles=2000))
    wells, nuisance, wider, rings = cases
    assert wells["eigenspace"] >= 0.98 and wells["random"] < 0.8
    assert nuisance["x"] > 0.97 and nuisance["eigenspace"] < 0.8, "the nuisance axis takes a class's place"
    assert wider["eigenspace"] > 0.95, "one more component brings it back"
    assert max(rings[key] for key in ("x", "eigenspace", "random")) < 0.6


def test_a_probe_is_judged_on_rows_it_has_not_seen():
    rng = np.random.default_rng(0)
    assert study.linear_probe(rng.normal(size=(300, 100)), rng.integers(0, 2, 300)) < 0.65


@pytest.mark.parametrize("manifold", ["circle", "torus"])
def test_other_manifolds_at_their_own_dimension(manifold, tmp_path):
    config = study.StudyConfig(manifold=manifold, particles=200, steps=32, rules=("sanger",))
    generator = torch.Generator().manual_seed(0)
    particles = study._Walkers(config, generator)
    learned, series = study.learn(config, particles, 2, 0.05, generator)
    assert series["view"].shape == (2, particles.manifold.ambient)
    assert learned["rules"]["sanger"]["probe"] > 0.4


def blobs(path, *, features=None, **arrays):
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 3
    made = rng.normal(size=(240, 12)) + 2 * np.eye(12)[labels] if features is None else features
    np.savez(path, features=made.astype(np.float32), labels=labels, **arrays)
    return path


def test_a_files_points_against_their_exact_eigenspace(tmp_path):
    path = blobs(tmp_path / "blobs.npz")
    config = study.StudyConfig(manifold=str(path), particles=1000, steps=500, rules=("sanger",))
    generator = torch.Generator().manual_seed(0)
    particles = study._Hoppers(config, generator)
    learned, series = study.learn(config, particles, 2, particles.gamma, generator)
    found = learned["rules"]["sanger"]
    assert max(found["angles_degrees"]) < 15 and found["captured"] > 0.98
    assert found["probe"] == pytest.approx(learned["exact"]["probe_eigenspace"], abs=0.05)
    points, _ = load_points(path, "auto", center=True)
    values, _ = slow.eigenspace(torch.from_numpy(points), 2)
    assert learned["exact"]["eigenvalues"][0] == pytest.approx(values[0].item(), rel=0.2)
    pytest.importorskip("matplotlib")
    from ngd_fast.flows.figures import particles_figure

    assert len(particles_figure({"manifold": str(path)}, series).axes) == 3


def test_topomaps_are_points_without_their_empty_pixels(tmp_path):
    maps = np.random.default_rng(0).random((30, 2, 8, 8), dtype=np.float32)
    maps[:, :, 0] = 0
    np.savez(tmp_path / "x_topomaps_all.npz", maps=maps)
    points, labels = load_points(tmp_path / "x_topomaps_all.npz", "auto", center=False)
    assert points.shape == (30, 2 * 7 * 8) and labels is None


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--set", "gamma=0.6"], "gamma=0.6: gamma R^2 is 0.6 at R = 1, and trace is known to stay bounded up to "),
        (["--set", "components=9"], "components=9: the features of sphere span 8 dimensions; use 8 or fewer"),
        (["--set", "features=4"], "features=4: the sphere lies in 8 dimensions"),
        (["--manifold", "klein"], "klein: no such file"),
        (["--manifold", "nan.npz"], "nan.npz: features is NaN or infinite in 1 of 240 rows, first row 7"),
        (["--manifold", "parts.npz"], "parts.npz: the graph of 10 nearest neighbours is not connected: 2 parts"),
        (["--manifold", "flat.npz"], "flat.npz: features has the same point in every row"),
        (["--manifold", "few.npz"], "neighbours=10: must be 1 to 4, few.npz has 5 points"),
        (["--manifold", "blobs.npz", "--set", "array=maps"], "blobs.npz: lacks maps (has features, labels)"),
        (["--manifold", "blobs.npz", "--set", "components=13"], "components=13: the features of blobs.npz span 12"),
        (["--manifold", "blobs.npz", "--set", "gamma=1"], "gamma=1: gamma R^2 is "),
        (["--set", "wells=1"], "wells: input should be greater than or equal to 2"),
        (["--set", "eps=0"], "eps: input should be greater than 0"),
    ],
)
def test_what_cannot_work_is_one_line(options, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    points = np.load(blobs(tmp_path / "blobs.npz"))["features"]
    bad = points.copy()
    bad[7, 2] = np.nan
    blobs(tmp_path / "nan.npz", features=bad)
    blobs(tmp_path / "parts.npz", features=np.concatenate([points[:120], points[120:] + 1000]))
    blobs(tmp_path / "flat.npz", features=np.ones((240, 3)))
    np.savez(tmp_path / "few.npz", features=points[:5])
    assert run("study", *options, "--out", "out") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {line}") and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_report_of_something_else_is_one_line(tmp_path, capsys):
    assert run("report", tmp_path) == 2
    (tmp_path / "metrics.json").write_text('{"run": "B0"}')
    assert run("report", tmp_path) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert [e.partition(": ")[2] for e in errors] == [
        f"{tmp_path}: holds no metrics.json; is it the --out of a finished ngd-fast flows study?",
        f"{tmp_path}: is the run of another command, wanted an --out of ngd-fast flows study",
    ]
