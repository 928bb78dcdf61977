import subprocess
import sys

import numpy as np
import pytest

from ngd_fast.cli import main
from ngd_fast.eeg.manifest import Topomaps

pytest.importorskip("mne")


def run(capsys, *args):
    """Exit status, stdout and stderr of ngd-fast eeg."""
    with pytest.raises(SystemExit) as end:
        main(["eeg", *map(str, args)])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_dreamer(dreamer_mat, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("topomap: {resolution: 16}\n")
    options = ("--out", tmp_path / "o", "--config", tmp_path / "c.yaml", "--set", "window_seconds=4")
    status, out, err = run(capsys, "dreamer", dreamer_mat, *options)
    assert status == 0, err
    assert out.splitlines() == [
        "24 windows (24 labelled, 0 unlabelled) of 3 subjects, 14 channels, "
        "bands delta, theta, alpha, beta, gamma; left out: nothing",
        str(tmp_path / "o" / "dreamer_topomaps_all.npz"),
    ]
    assert "band power" in err and "topomaps" in err
    topomaps = Topomaps.load(tmp_path / "o" / "dreamer_topomaps_all.npz")
    assert topomaps.maps.shape == (24, 5, 16, 16)
    assert (tmp_path / "o" / "dreamer_topomaps_manifest.csv").read_text().count("\n") == 25


def test_mahnob_and_its_silence(mahnob_sessions, tmp_path, capsys):
    status, out, err = run(capsys, "mahnob", mahnob_sessions, "--out", tmp_path, "--name", "support", "--unlabelled")
    assert status == 0, err
    assert out.startswith("24 windows (0 labelled, 24 unlabelled) of 2 subjects, 32 channels")
    assert not Topomaps.load(tmp_path / "support_topomaps_all.npz").labelled.any()
    for noise in ("Extracting EDF", "Reading", "Warning"):
        assert noise not in err


def test_table_with_mapping_and_ratings(tmp_path, capsys):
    rng = np.random.default_rng(0)
    names = [f"{c}.{b}" for c in ("F3", "F4", "O1", "O2") for b in ("alpha", "beta")]
    lines = [",".join(["who", "film", *names])]
    lines += [",".join(["S1", f"f{t}", *(f"{v:.6f}" for v in rng.lognormal(size=8))]) for t in (1, 1, 2, 2)]
    (tmp_path / "power.csv").write_text("\n".join(lines))
    (tmp_path / "ratings.csv").write_text("subject,film,valence,arousal\n1,1,1,3\n1,2,4,5\n")
    (tmp_path / "m.yaml").write_text(
        "{subject: who, trial: film, features: '{channel}.{band}', rating_range: [1, 5],"
        " ratings_subject: subject, ratings_trial: film}"
    )
    options = ("--mapping", tmp_path / "m.yaml", "--ratings", tmp_path / "ratings.csv", "--out", tmp_path)
    status, out, err = run(capsys, "table", tmp_path / "power.csv", *options)
    assert status == 0, err
    topomaps = Topomaps.load(tmp_path / "power_topomaps_all.npz")
    assert topomaps.valence.tolist() == [-1, -1, 0.5, 0.5] and topomaps.window.tolist() == [0, 1, 0, 1]
    assert topomaps.meta["mapping"]["features"] == "{channel}.{band}" and len(topomaps.meta["files"]) == 2


def test_show_draws_the_same_bytes_twice(make_topomaps, tmp_path, capsys):
    path = make_topomaps(n=40).save(tmp_path, "set")
    status, out, _ = run(capsys, "show", path, "--out", tmp_path / "a")
    assert status == 0 and out.split() == [str(tmp_path / "a.png"), str(tmp_path / "a.pdf")]
    run(capsys, "show", path, "--out", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.pdf").read_bytes()[:5] == b"%PDF-"


def test_show_draws_unlabelled_maps_and_single_subjects(make_topomaps, tmp_path, capsys):
    nothing = np.full(6, np.nan)
    path = make_topomaps(valence=nothing, arousal=nothing).save(tmp_path, "set")
    assert run(capsys, "show", path, "--out", tmp_path / "a.png", "--subject", "1")[0] == 0
    status, _, err = run(capsys, "show", path, "--out", tmp_path / "b.png", "--subject", "7")
    assert status == 2 and err == "error: subject 7 has no topomaps; there are 0, 1, 2\n"
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("dreamer", "none.mat"), "none.mat: no such file (wanted DREAMER.mat)"),
        (("mahnob", "none"), "none: no such folder"),
        (("table", "none.csv"), "none.csv: no such file"),
        (("table", "none.csv", "--mapping", "none.yaml"), "none.yaml: no such configuration file"),
        (("dreamer", "none.mat", "--set", "window_second=2"), "did you mean window_seconds?"),
        (("dreamer", "none.mat", "--config", "none.yaml"), "none.yaml: no such configuration file"),
    ],
)
def test_the_users_faults_are_one_line_and_leave_nothing(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *args, "--out", "o")
    assert status == 2 and err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert not out and not list(tmp_path.iterdir())


def test_help_needs_no_heavy_package():
    code = (
        "import sys\nfrom ngd_fast.cli.eeg import command\n"
        "command.main(['dreamer', '--help'], standalone_mode=False)\n"
        "print(*(m for m in ('torch', 'mne', 'pandas', 'matplotlib', 'scipy') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "DREAMER.mat" in done.stdout and done.stdout.splitlines()[-1] == ""
