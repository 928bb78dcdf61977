"""ngd-fast demo: the whole of NeuroGaze-Distill on made-up data, by the same commands that real data takes."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import click

from ngd_fast.console import say
from ngd_fast.errors import UserError


@dataclass(frozen=True)
class Scale:
    """How much is made and trained; the commands are the same."""

    dreamer: dict
    mahnob: dict
    faces: dict
    elsewhere: int
    teacher_epochs: int
    overrides: tuple[str, ...] = ()


_FULL = Scale(
    dreamer={"subjects": 10, "clips": 12, "seconds": 16, "baseline_seconds": 6},
    mahnob={"subjects": 3, "sessions": 6, "seconds": 12, "around_seconds": 4},
    faces={"train": 2400, "valid": 800, "test": 800},
    elsewhere=320,
    teacher_epochs=30,
)
# What the tests run: every stage, too little of it to learn much.
_SMALL = Scale(
    dreamer={"subjects": 4, "clips": 6, "seconds": 8, "baseline_seconds": 4},
    mahnob={"subjects": 2, "sessions": 2, "seconds": 6, "around_seconds": 2},
    faces={"train": 160, "valid": 80, "test": 80},
    elsewhere=48,
    teacher_epochs=2,
    overrides=("train.epochs=2", "objective.geo.schedule.start=0", "objective.geo.schedule.end=1"),
)


@click.command("demo")
@click.option("--out", default="outs/demo", show_default=True, type=click.Path(file_okay=False), help="Folder.")
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0), help="Of the made-up data and trainings.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--small", is_flag=True, help="Every stage in the smallest size: a check, not a demonstration.")
def command(out, seed, device, small):
    """Run the whole of NeuroGaze-Distill on made-up data, from recordings to verified tables.

    Recordings in DREAMER's and MAHNOB-HCI's own formats and drawn faces of the eight expressions stand in for the
    datasets, whose owners hand them out themselves. Every other step is a command that is printed before it runs.
    """
    from ngd_fast.artifacts.files import require_free
    from ngd_fast.cli.demo_picture import draw_overview
    from ngd_fast.eeg.channels import import_mne
    from ngd_fast.teacher.figures import new_figure

    scale, out, started = (_SMALL if small else _FULL), Path(out), time.monotonic()
    # What would end a later stage ends the demo before its first one has filled the folder.
    require_free(out)
    import_mne()
    new_figure(1)
    data, eeg, bank = out / "data", out / "eeg", out / "prototypes_5x5.npz"
    teacher, vision, runs = out / "teacher", out / "vision_teacher", out / "runs"
    settings = [part for override in scale.overrides for part in ("--set", override)]

    _heading("1/6  Made-up recordings and drawn faces")
    _make_data(data, scale, seed)

    _heading("2/6  EEG to topomaps")
    _run("eeg", "dreamer", data / "DREAMER.mat", "--out", eeg, "--name", "dreamer")
    _run("eeg", "mahnob", data / "Sessions", "--out", eeg, "--name", "mahnob", "--unlabelled")
    _run("eeg", "show", eeg / "dreamer_topomaps_all.npz", "--out", out / "viz" / "topomaps")

    _heading("3/6  The teacher and its bank of prototypes")
    _run(
        *("teacher", "train", "--maps", eeg / "dreamer_topomaps_all.npz"),
        *("--support", eeg / "mahnob_topomaps_all.npz", "--out", teacher, "--device", device),
        *("--set", f"optimizer.epochs={scale.teacher_epochs}", "--set", f"seed={seed}"),
    )
    _run("prototypes", "build", "--teacher", teacher, "--maps", eeg / "dreamer_topomaps_all.npz", "--out", bank)
    _run("prototypes", "show", bank)

    _heading("4/6  The vision teacher, then the students B0 to B3")
    faces = ("--train", data / "ferplus_train.npz", "--valid", data / "ferplus_valid.npz", "--device", device)
    _run(
        *("student", "train", "--config", "demo/teacher", *faces, "--seed", seed, "--out", vision, *settings[:2]),
        makes=vision / "metrics.json",
    )
    _run(
        *("ablation", "--configs", "demo/B0,demo/B1,demo/B2,demo/B3", "--seeds", seed, *faces),
        *("--bank", bank, "--teacher", vision, "--out", runs, *settings),
        makes=runs / "viz" / "ablation_lite.json",
    )

    _heading("5/6  The students on faces from elsewhere")
    wild, posed = data / "affectnet" / "labels_test.csv", data / "ck"
    elsewhere = {"AffectNet-like": ("--csv", wild), "CK-like": ("--folder", posed)}
    for variant in ("B0", "B3"):
        for name, source in elsewhere.items():
            folder = out / "xval" / f"{variant}_{name}"
            _run(
                *("evaluate", "--ckpt", runs / f"{variant}_seed{seed}", *source, "--dataset", name),
                *("--device", device, "--outs-dir", folder),
            )

    _heading("6/6  Tables, figures, verification")
    _run("report", runs, out / "xval", "--bank", bank, "--out", out / "report.html", "--viz", out / "viz")
    maps, valid = eeg / "dreamer_topomaps_all.npz", data / "ferplus_valid.npz"
    draw_overview(out / "overview", maps=maps, bank=bank, faces=valid, runs=runs, seed=seed)
    _run("prototypes", "verify", bank)
    _run("verify", runs, out / "xval")
    _closing(out, runs, time.monotonic() - started)


def _heading(text: str) -> None:
    say(f"\n== {text}")


def _make_data(data: Path, scale: Scale, seed: int) -> None:
    from ngd_fast.synthetic.face_files import write_affectnet_like, write_ckplus_like
    from ngd_fast.synthetic.faces import write_ferplus_like
    from ngd_fast.synthetic.recordings import write_dreamer, write_mahnob

    for what, make in (
        ("DREAMER.mat", lambda: write_dreamer(data / "DREAMER.mat", **scale.dreamer, seed=seed)),
        ("MAHNOB-HCI's Sessions/", lambda: write_mahnob(data / "Sessions", **scale.mahnob, seed=seed + 1)),
        ("ferplus_{train,valid,test}.npz", lambda: write_ferplus_like(data, **scale.faces, seed=seed)),
        ("faces in the wild, AffectNet's labels", lambda: write_affectnet_like(
            data / "affectnet", {"test": scale.elsewhere}, seed=seed)),
        ("posed faces, CK+'s folders", lambda: write_ckplus_like(data / "ck", scale.elsewhere, seed=seed)),
    ):  # fmt: skip
        say(f"writing {what}")
        make()


def _run(*arguments, makes: Path | None = None) -> None:
    """Print a command as a user would type it, and run it here. Raises UserError where it fails.

    ``makes`` is the file that it leaves at its end: a training that SIGTERM stops leaves a checkpoint and no failure.
    """
    from ngd_fast.cli import group

    arguments = [str(argument) for argument in arguments]
    say(f"$ ngd-fast {shlex.join(arguments)}")
    status = group.main(arguments, prog_name="ngd-fast", standalone_mode=False)
    if status:
        raise UserError(f"ngd-fast {' '.join(arguments[:2])} ended with {status}")
    if makes is not None and not makes.exists():
        raise UserError(f"ngd-fast {' '.join(arguments[:2])} was stopped before it wrote {makes}")


def _closing(out: Path, runs: Path, seconds: float) -> None:
    from ngd_fast.artifacts.files import read_json
    from ngd_fast.cli.evaluation_output import print_summary
    from ngd_fast.evaluation.tables import ABLATION

    _heading(f"Done in {seconds / 60:.1f} minutes")
    print_summary(read_json(runs / "viz" / f"{ABLATION}.json"))
    for what, path in (
        ("in one picture", out / "overview.png"),
        ("report", out / "report.html"),
        ("figures and LaTeX tables", out / "viz"),
        ("prototypes", out / "prototypes_5x5.npz"),
        ("students (weights, metrics, checksums)", runs),
    ):
        click.echo(f"{what + ':':41}{path}")
    click.echo("The data are drawn and made up: the numbers show that the pipeline works, nothing about people.")
