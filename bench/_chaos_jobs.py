"""What the chaos bench disturbs: small jobs of every kind, and what each leaves, comparable bit for bit."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ngd_fast.artifacts.files import SUMS_NAME, check_sums, read_sums
from ngd_fast.student.checkpoint import LAST_NAME
from ngd_fast.student.runlog import LOG_NAME
from ngd_fast.student.weights import BEST_NAME, read_state_dict
from ngd_fast.synthetic.face_files import write_affectnet_like, write_ckplus_like, write_fer2013
from ngd_fast.synthetic.faces import make_faces
from ngd_fast.synthetic.recordings import write_dreamer, write_mahnob

_TIMES = {"seconds", "total_seconds", "images_per_second", "data_wait", "preparing", "waited", "before", "sources"}
"""Keys below which logs, checkpoints and metrics say how long something took; and tables, which metrics they are of."""

_STUDENT = (
    "model.arch=resnet18-w8", "data.image_size=16", "train.precision=fp32", "train.batch_size=16", "train.epochs=3",
    "train.log_every=4", "train.checkpoint_every=2", "train.checkpoint_seconds=0", "train.bootstrap=20",
    "train.valid_batch_size=32", "train.compile=false", "optimizer.lr=1e-3", "device=cpu",
    "objective.geo.schedule.start=0", "objective.geo.schedule.end=1",
)  # fmt: skip
_TEACHER = ("optimizer.epochs=3", "optimizer.batch_size=32", "network.width=8", "input.context=1")
_MAPS = ("topomap.resolution=12",)


@dataclass(frozen=True)
class Job:
    """A command of ngd-fast that writes ``{out}``; ``{data}`` is the folder of :func:`write_data`."""

    name: str
    command: tuple[str, ...]
    resume: tuple[str, ...] = ()
    """What continues it after a fault, beside the command itself."""
    afresh: bool = False
    """It refuses a folder that holds something, in one line, and is begun again in an empty one."""
    often: float = 1.0
    """How often it is chosen, beside the others."""
    needs: str = ""
    """A package that is not always installed."""


def _sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def _student(name: str, config: str, feed: str, *more: str, **options) -> Job:
    faces = ("--train", "{data}/train.npz", "--valid", "{data}/valid.npz")
    teachers = ("--bank", "{data}/bank.npz", "--teacher", "{data}/vision") if config in ("B1", "B3") else ()
    command = ("student", "train", "--config", config, *faces, *teachers, *_sets(*_STUDENT, f"feed.kind={feed}", *more))
    return Job(name, (*command, "--out", "{out}"), resume=("--resume",), **options)


def jobs() -> list[Job]:
    """Every kind of work that writes files, as far as its packages are installed; each takes a second or two."""
    maps, runs = "{data}/dreamer_topomaps_all.npz", "{data}/runs"
    teacher = ("--maps", maps, *_sets(*_TEACHER), "--device", "cpu", "--out", "{out}")
    found = [
        _student("student, torch feed", "B3", "torch"),
        _student("student, resident feed", "B1", "resident", "objective.kd.cached=true"),
        _student("student, DALI feed", "B0", "dali", needs="nvidia.dali"),
        _student("vision teacher", "teacher", "torch"),
        Job("teacher", ("teacher", "train", *teacher), afresh=True, often=0.5),
        Job("teacher crossval", ("teacher", "crossval", "--folds", "2", "--seeds", "1", "--no-figures", *teacher),
            afresh=True, often=0.3),
        Job("ablation", ("ablation", "--configs", "B0,B2", "--seeds", "1", "--train", "{data}/train.npz", "--valid",
                         "{data}/valid.npz", "--bank", "{data}/bank.npz", "--teacher", "{data}/vision", "--out",
                         "{out}", *_sets(*_STUDENT, "train.epochs=2", "feed.kind=torch", "objective.kd.weight=0")),
            often=0.5),
        Job("data ferplus", ("data", "ferplus", "--fer2013", "{data}/fer/fer2013.csv", "--labels",
                             "{data}/fer/fer2013new.csv", "--out", "{out}")),
        Job("data affectnet", ("data", "affectnet", "{data}/affectnet", "--size", "48", "--out", "{out}")),
        Job("data ckplus", ("data", "ckplus", "{data}/ck", "--out", "{out}")),
        Job("data folder", ("data", "folder", "{data}/ck", "--size", "48", "--out", "{out}")),
        Job("eeg table", ("eeg", "table", "{data}/table.csv", "--out", "{out}", *_sets(*_MAPS)), needs="mne"),
        Job("eeg dreamer", ("eeg", "dreamer", "{data}/DREAMER.mat", "--out", "{out}", *_sets(*_MAPS)), needs="mne"),
        Job("eeg mahnob", ("eeg", "mahnob", "{data}/Sessions", "--out", "{out}", *_sets(*_MAPS)), needs="mne"),
        Job("prototypes build", ("prototypes", "build", "--teacher", "{data}/teacher", "--maps", maps, "--out",
                                 "{out}/bank.npz")),
        Job("evaluate", ("evaluate", "--ckpt", f"{runs}/B0_seed1", "--npz", "{data}/valid.npz", "--bootstrap", "20",
                         "--device", "cpu", "--outs-dir", "{out}"), often=0.5),
        Job("predict", ("predict", "{data}/valid.npz", "--ckpt", f"{runs}/B0_seed1", "--device", "cpu", "--out",
                        "{out}/faces.csv")),
        Job("report", ("report", f"{runs}/B0_seed1", "--embedding", "none", "--out", "{out}/report.html"), often=0.15),
        Job("export", ("export", f"{runs}/B0_seed1", "--onnx", "{out}/student.onnx", "--model-card",
                       "{out}/card.md"), often=0.15, needs="onnxscript"),
    ]  # fmt: skip
    return [job for job in found if not job.needs or _is_installed(job.needs)]


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _table(path: Path) -> None:
    rows = [(s, t, w) for s in (1, 2) for t in (1, 2) for w in range(6)]
    table = pd.DataFrame(rows, columns=["subject", "trial", "window"])
    columns = [f"{channel}_{band}" for channel in ("F3", "F4", "T7", "T8", "O1", "O2") for band in ("alpha", "beta")]
    table[columns] = np.random.default_rng(0).lognormal(size=(len(table), len(columns)))
    table.assign(valence=2.0 * table["trial"], arousal=9.0).to_csv(path, index=False)


_MADE: dict[str, Callable[[Path], object]] = {
    "train.npz": lambda path: make_faces(96, 1).save(path),
    "valid.npz": lambda path: make_faces(40, 2).save(path),
    "fer": lambda path: write_fer2013(path, {"train": 60, "valid": 20, "test": 20}),
    "affectnet": lambda path: write_affectnet_like(path, {"train": 24, "test": 24}),
    "ck": lambda path: write_ckplus_like(path, 40),
    "DREAMER.mat": lambda path: write_dreamer(path, subjects=4, clips=6, seconds=8, baseline_seconds=4),
    "Sessions": lambda path: write_mahnob(path, subjects=2, sessions=2, seconds=6, around_seconds=2),
    "table.csv": _table,
}
_ONE_EPOCH = ("--train", "{data}/train.npz", "--valid", "{data}/valid.npz", *_sets(*_STUDENT, "train.epochs=1"))
_MAPS_FILE = "{data}/dreamer_topomaps_all.npz"
_RUN = {
    "dreamer_topomaps_all.npz": ("eeg", "dreamer", "{data}/DREAMER.mat", "--out", "{data}", "--set",
                                 "topomap.resolution=16"),
    "teacher": ("teacher", "train", "--maps", _MAPS_FILE, "--out", "{data}/teacher", "--device", "cpu",
                *_sets(*_TEACHER)),
    "bank.npz": ("prototypes", "build", "--teacher", "{data}/teacher", "--maps", _MAPS_FILE, "--out",
                 "{data}/bank.npz"),
    "vision": ("student", "train", "--config", "teacher", *_ONE_EPOCH, "--out", "{data}/vision"),
    "runs": ("student", "train", "--config", "B0", *_ONE_EPOCH, "--out", "{data}/runs/B0_seed1"),
}  # fmt: skip


def write_data(folder: Path, jobs: list[Job], run: Callable[[list[str]], None]) -> None:
    """Write the made-up inputs of ``jobs`` that are not yet in ``folder``; ``run`` runs a command of ngd-fast."""
    folder.mkdir(exist_ok=True)
    needed = {name for job in jobs for name in _inputs(job.command)}
    for name in reversed(_RUN):
        needed |= _inputs(_RUN[name]) if name in needed else set()
    for name in (*_MADE, *_RUN):
        done = folder / f".{name}"
        if name not in needed or done.exists():
            continue
        clear(folder / name)
        if name in _MADE:
            _MADE[name](folder / name)
        else:
            run([part.format(data=folder) for part in _RUN[name]])
        done.touch()


def _inputs(command: tuple[str, ...]) -> set[str]:
    return {part.split("/")[1] for part in command if part.startswith("{data}/")}


# -- what a job has left ----------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """{file: digest of what it says, but for how long things took} of every file that is not hidden or TensorBoard's.

    Raises what reading raises where a file is not whole.
    """
    return {path.relative_to(folder).as_posix(): _digest(path) for path in _files(folder) if not _is_hidden(path)}


def hidden(folder: Path) -> list[str]:
    """Files that were being written."""
    return [path.name for path in _files(folder) if _is_hidden(path)]


def in_the_making(name: str) -> bool:
    """Whether a file is written several times during a run, so that it differs from its last state till then."""
    return Path(name).name in (LAST_NAME, BEST_NAME, LOG_NAME)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "tb")


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _digest(path: Path) -> str:
    if path.name == LAST_NAME:
        content = torch.load(path, weights_only=True)
    elif path.suffix == ".safetensors":
        read_state_dict(path)
        content = path.read_bytes()
    elif path.name == LOG_NAME:
        content = [json.loads(line) for line in path.read_text().splitlines()]
    elif path.suffix == ".json":
        content = json.loads(path.read_text())
    elif path.name == SUMS_NAME:
        problems = check_sums(path.parent)
        if problems:
            raise ValueError(f"{path.name}: {problems}")
        content = [name for name in read_sums(path.parent) if not name.startswith("tb/")]
    else:
        content = path.read_bytes()
    digest = hashlib.sha256()
    _feed(digest, content)
    return digest.hexdigest()


def _feed(digest, value) -> None:
    """Add a nested value to a digest: tensors by their bits, times left out."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            if key not in _TIMES:
                digest.update(f"{key}:".encode())
                _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _feed(digest, entry)
    elif isinstance(value, torch.Tensor):
        digest.update(value.numpy().tobytes())
    elif isinstance(value, bytes):
        digest.update(value)
    else:
        digest.update(f"{value!r},".encode())


def clear(path: Path) -> None:
    """Remove a folder or a file, and the logits of KD teachers beside it."""
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(path.parent / "kd_cache", ignore_errors=True)
