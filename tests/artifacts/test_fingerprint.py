import pytest

from ngd_fast.artifacts.files import read_json, sha256
from ngd_fast.artifacts.fingerprint import check_fingerprint, commit, make_fingerprint, write_environment
from ngd_fast.errors import UserError


@pytest.fixture
def made(tmp_path):
    run, data = tmp_path / "run", tmp_path / "faces.npz"
    run.mkdir()
    (run / "config.yaml").write_text("a: 1\n")
    data.write_bytes(b"faces")
    make_fingerprint(
        run,
        variant="B2",
        seed=3,
        switches={"kd": True, "d_geo": False},
        weights={"kd": 0.3},
        files={"config": run / "config.yaml", "data": data},
        checksums={"folder": "ab" * 32},
    )
    return run, data


def test_says_what_the_run_was_made_from(made):
    run, data = made
    kept = read_json(run / "ablation_fingerprint.json")
    assert (kept["variant"], kept["seed"]) == ("B2", 3)
    assert kept["switches"] == {"kd": True, "d_geo": False}
    assert kept["files"]["config"] == {"path": "config.yaml", "sha256": sha256(run / "config.yaml")}
    assert kept["files"]["data"] == {"path": str(data.resolve()), "sha256": sha256(data)}
    assert kept["checksums"] == {"folder": "ab" * 32}
    assert kept["environment"]["torch"]
    assert check_fingerprint(run, kept) == ([], [])


def test_moves_with_its_folder(made, tmp_path):
    run, _ = made
    moved = run.rename(tmp_path / "elsewhere")
    assert check_fingerprint(moved, read_json(moved / "ablation_fingerprint.json")) == ([], [])


def test_changed_and_absent_files_are_told_apart(made):
    run, data = made
    kept = read_json(run / "ablation_fingerprint.json")
    data.unlink()
    (run / "config.yaml").unlink()
    changed, absent = check_fingerprint(run, kept)
    assert changed == ["config: config.yaml is not there"]
    assert absent == [f"data: {data.resolve()} is not there"]


def test_a_file_that_does_not_exist_cannot_be_named(tmp_path):
    with pytest.raises(UserError, match="bank is to be hashed"):
        make_fingerprint(tmp_path, variant="B0", seed=1, switches={}, weights={}, files={"bank": tmp_path / "no.npz"})


def test_environment_files(tmp_path):
    write_environment(tmp_path)
    freeze = (tmp_path / "pip_freeze.txt").read_text()
    assert "\nnumpy==" in freeze
    assert (tmp_path / "git_commit.txt").read_text().startswith(commit() or "ngd_fast")
