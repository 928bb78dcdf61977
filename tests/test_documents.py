"""What the pages show is true: every command, option, file and snippet of the README and the READMEs of the folders."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ngd_fast import cli
from ngd_fast.objective import functional
from ngd_fast.prototypes.bank import PrototypeBank

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "bench/README.md", "bench/RESULTS.md", "configs/README.md", "csrc/README.md",
         "kernels/README.md")  # fmt: skip
# What makes the commands of the pages small; they are run as they stand but for these.
STUDENTS = ("model.arch=resnet18-w4", "data.image_size=24", "train.precision=fp32", "train.batch_size=16",
            "train.epochs=1", "train.bootstrap=20", "objective.geo.schedule.start=0", "objective.geo.schedule.end=1",
            "device=cpu", "feed.kind=torch")  # fmt: skip
SMALLER = {
    ("student", "train"): STUDENTS,
    ("ablation",): STUDENTS,
    ("sweep",): STUDENTS,
    ("teacher",): ("optimizer.epochs=1", "optimizer.batch_size=16"),
}


def blocks(page: str, language: str) -> list[str]:
    """The page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (REPOSITORY / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The lines of its sh blocks as words; comments and continued lines as a shell reads them."""
    text = "".join(blocks(page, "sh")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def inline(page: str) -> list[list[str]]:
    """Commands of ngd-fast within sentences."""
    text = re.sub(r"^```.*?^```$", "", (REPOSITORY / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(found) for found in re.findall(r"`(ngd-fast [^`]*)`", text)]


def require_options(words: list[str]) -> None:
    """Raise for a command or an option that ngd-fast does not have."""
    command, context, rest = cli.group, click.Context(cli.group), words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name, command, rest = command.resolve_command(context, rest)
        assert command is not None, f"no command {name}"
        context = click.Context(command, info_name=name, parent=context)
    known = {flag for p in command.get_params(context) for flag in (*p.opts, *p.secondary_opts)}
    assert {word for word in rest if word.startswith("--")} - known == set(), f"ngd-fast {' '.join(words[1:])}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page):
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for words in [*commands(page), *inline(page)]:
        program = Path(words[0]).name
        if program == "ngd-fast":
            require_options(words)
        elif program == "make":
            assert words[1] in targets, words
        elif program == "python":
            assert words[1:3] == ["-m", "pytest"] and all((REPOSITORY / word).exists() for word in words[3:]), words
        else:
            assert program == "pip" and words[1] == "install", f"{page}: nothing here runs {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES)
def test_files_and_options_that_it_names_are_there(page):
    text = (REPOSITORY / page).read_text()
    folder = (REPOSITORY / page).parent
    for name in re.findall(r"`((?:ngd_fast|csrc|kernels|bench|configs|tests|cpu|cuda)/[\w/.-]+)`", text):
        assert (REPOSITORY / name).exists() or (folder / name).exists(), f"{page}: {name}"
    for name in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (folder / name).exists(), f"{page}: {name}"
    extras = (REPOSITORY / "pyproject.toml").read_text()
    for name in re.findall(r"ngd-fast\[(\w+)", text):
        assert re.search(rf"^{name} = \[", extras, re.MULTILINE), f"{page}: extra {name}"


def test_the_readme_fits_a_reader():
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 120


def test_the_loss_in_a_trainer_of_ones_own(tmp_path, monkeypatch):
    """The README's Python, as it stands, in a small trainer."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    bank = PrototypeBank.build(rng.standard_normal((60, 256), np.float32), *rng.uniform(-1, 1, (2, 60)))
    bank.save(tmp_path / "outs" / "demo" / "prototypes_5x5.npz")
    monkeypatch.chdir(tmp_path)

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(12, 256), nn.Linear(256, 8)

        def forward(self, images):
            features = self.body(images)
            return features, self.head(features)

    student = Student()
    names = {
        "device": "cpu", "epochs": 2, "student": student, "teacher": nn.Linear(12, 8),
        "loader": [(torch.randn(16, 12), torch.randint(8, (16,)))] * 2,
        "optimizer": torch.optim.SGD(student.parameters(), 0.1),
    }  # fmt: skip
    before = student.body.weight.clone()
    (snippet,) = blocks("README.md", "python")
    exec(snippet, names)
    assert not torch.equal(before, student.body.weight) and torch.isfinite(names["out"].total)


def _write_data(folder: Path) -> None:
    """Small files of the kinds and names that configs/README.md starts from."""
    from ngd_fast.synthetic.face_files import write_affectnet_like, write_fer2013
    from ngd_fast.synthetic.recordings import write_dreamer, write_mahnob

    write_dreamer(folder / "DREAMER.mat", subjects=4, clips=6, seconds=8, baseline_seconds=4)
    write_mahnob(folder / "Sessions", subjects=2, sessions=2, seconds=6, around_seconds=2)
    write_fer2013(folder, {"train": 120, "valid": 60, "test": 60})
    elsewhere = write_affectnet_like(folder / "AffectNet-mini", {"test": 24})
    (elsewhere / "labels_test.csv").rename(folder / "labels_test.csv")
    (elsewhere / "images").rename(folder / "AffectNet-mini" / "images")
    (folder / "faces").symlink_to(elsewhere / "images")
    rng = np.random.default_rng(0)
    power = pd.DataFrame([(s, g, w) for s in (1, 2) for g in (1, 2) for w in range(3)],
                         columns=["SUBJECT", "GAME", "WINDOW_INDEX"])  # fmt: skip
    for channel in ("F3", "F4", "T7", "T8", "O1", "O2"):
        for band in ("Alpha", "Beta"):
            power[f"{channel}_{band}_Power"] = rng.lognormal(size=len(power))
    power.to_csv(folder / "bandpower_12s_2s.csv", index=False)
    scores = [(f"S{s:02d}", f"G{g}.pdf", 2 * g + s, 9 - g) for s in (1, 2) for g in (1, 2)]
    pd.DataFrame(scores, columns=["Subject", "Path", "Valence", "Arousal"]).to_csv(
        folder / "sam_scores.csv", index=False
    )


def _run(words: list[str]) -> None:
    smaller = next((s for start, s in SMALLER.items() if tuple(words[1:1 + len(start)]) == start), ())  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cli.main([*words[1:], *(part for setting in smaller for part in ("--set", setting))])
    assert stop.value.code == 0, shlex.join(words)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_recipes_lead_from_recordings_to_tables(tmp_path, monkeypatch):
    """Every command of configs/README.md, in its order, on small files of the names that it gives."""
    for package in ("mne", "h5py", "matplotlib", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    _write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in commands("configs/README.md"):
        _run(words)
    assert (tmp_path / "report.html").exists() and (tmp_path / "student.onnx").exists()


@pytest.mark.slow
def test_the_benches_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words in commands("bench/README.md"):
        if words[0] == "ngd-fast":
            _run(words)


def test_what_doctor_prints(capsys):
    """The README's excerpt of it: one row for each backend."""
    shown = re.findall(r"^│ ([a-z]+) +│", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert shown.pop(0) == "variant"  # the demo's table stands above
    with pytest.raises(SystemExit):
        cli.main(["doctor"])
    printed = capsys.readouterr().out
    assert shown == ["reference", "cpu", "triton", "cuda"]
    assert all(re.search(rf"^│ {name} ", printed, re.MULTILINE) for name in shown)
    assert sys.version.split()[0] in printed


def test_the_reference_builds_without_a_warning(tmp_path):
    pytest.importorskip("pdoc")
    rooms = [f"ngd_fast.{room}" for room in ("objective", "prototypes", "evaluation")]
    command = [sys.executable, "-W", "error::UserWarning", "-m", "pdoc", "--docformat", "google", "-o", tmp_path]
    result = subprocess.run([*command, *rooms], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "ngd_fast" / "objective" / "functional.html").read_text()
    assert "label_smoothing" in page and "Algorithm 2" in page


@pytest.mark.parametrize("function", [functional.ngd_objective, PrototypeBank.build, PrototypeBank.load])
def test_public_docstrings_name_every_argument_and_error(function):
    for name in inspect.signature(function).parameters:
        assert re.search(rf"\b{name}\b", function.__doc__), name
    assert "Raises" in function.__doc__
