"""A day in an hour: thousands of epochs, hundreds of evaluations and of predictions, each kind in one process.

``python -m ngd_fast.bench.soak``. After a warm-up (the first fifth) memory, open files, threads, child processes and
temporary files must not grow: printed is each one's least-squares slope over 100 iterations with its standard error,
and how many bytes an epoch adds to log.jsonl and to TensorBoard's file, which are the only ones that grow.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.stats import linregress

from ngd_fast.artifacts.files import read_json, write_json
from ngd_fast.cli import group
from ngd_fast.console import print_table
from ngd_fast.student.runlog import LOG_NAME, RunLog
from ngd_fast.synthetic.faces import make_faces

QUANTITIES = ("RSS, KiB", "open files", "threads", "children", "temporary files")
PARTS = {"epochs": 2000, "evaluations": 200, "predictions": 200}
_WARM_UP = 0.2
_SETTINGS = (
    "model.arch=resnet18-w4", "data.image_size=16", "train.precision=fp32", "train.batch_size=16", "train.log_every=4",
    "train.bootstrap=0", "train.compile=false", "train.checkpoint_seconds=5", "device=cpu", "feed.kind=torch",
)  # fmt: skip


def look() -> list[int]:
    """The QUANTITIES of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tasks = list(Path("/proc/self/task").iterdir())
    children = sum(len((task / "children").read_text().split()) for task in tasks)
    files = sum(len(names) for _, _, names in os.walk(tempfile.gettempdir()))
    return [pages * os.sysconf("SC_PAGESIZE") // 1024, len(os.listdir("/proc/self/fd")), len(tasks), children, files]


def slopes(samples: list[list[int]]) -> dict[str, tuple[float, float]]:
    """{quantity: (growth over 100 iterations, its standard error)} after the warm-up."""
    rows = np.array(samples[int(_WARM_UP * len(samples)) :], float)
    found = {}
    for name, values in zip(QUANTITIES, rows.T):
        line = linregress(np.arange(len(values)), values)
        error = line.stderr if np.ptp(values) else 0.0  # SciPy's is NaN where nothing changes
        found[name] = (100 * float(line.slope), 100 * float(error))
    return found


def _train(out: str, faces: Path, epochs: int) -> None:
    settings = (*_SETTINGS, f"train.epochs={epochs}", f"data.train={faces}", f"data.valid={faces}")
    arguments = ["student", "train", "--config", "B0", "--out", out]
    run(*arguments, *(part for setting in settings for part in ("--set", setting)))


def run(*arguments: str) -> None:
    group.main(list(arguments), standalone_mode=False)


def soak(part: str, count: int, folder: Path) -> dict:
    """Do ``part`` ``count`` times in this process: {"slopes": ..., and for epochs "bytes an epoch": {file: bytes}}."""
    torch.set_num_threads(1)
    faces, samples = folder / "faces.npz", []
    make_faces(32, 1).save(faces)
    if part == "epochs":
        logged = RunLog.epoch

        def epoch(self, *arguments):
            logged(self, *arguments)
            samples.append(look())

        RunLog.epoch = epoch
        try:
            _train(str(folder / "long"), faces, count)
        finally:
            RunLog.epoch = logged
        files = {LOG_NAME: folder / "long" / LOG_NAME, "tb": next((folder / "long" / "tb").iterdir())}
        sizes = {name: path.stat().st_size / count for name, path in files.items()}
        return {"slopes": slopes(samples), "bytes an epoch": sizes}
    _train(str(folder / "run"), faces, 1)
    student = ("--ckpt", str(folder / "run"), "--device", "cpu")
    work: Callable[[], None] = {
        "evaluations": lambda: run("evaluate", *student, "--npz", str(faces), "--bootstrap", "20", "--outs-dir",
                                   str(folder / "evaluation")),
        "predictions": lambda: run("predict", str(faces), *student, "--out", str(folder / "faces.csv")),
    }[part]  # fmt: skip
    for _ in range(count):
        work()
        samples.append(look())
    return {"slopes": slopes(samples)}


def table(results: dict[str, dict]) -> tuple[list[str], list[list]]:
    """(columns, rows) for the terminal."""
    rows = []
    for part, result in results.items():
        cells = [f"{slope:+.2f} ± {error:.2f}" for slope, error in result["slopes"].values()]
        rows.append([f"{result['count']} {part}", *cells])
    return ["growth over 100 of", *QUANTITIES], rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part, count in PARTS.items():
        parser.add_argument(f"--{part}", type=int, default=count, metavar="N", help=f"[default: {count}; 0: none]")
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # one part, in a process of its own
    options = parser.parse_args(arguments)
    if options.part:
        part, count, folder = options.part
        write_json(Path(folder) / "result.json", soak(part, int(count), Path(folder)))
        return
    results = {}
    for part in PARTS:
        count = getattr(options, part)
        if not count:
            continue
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / "tmp"
            temporary.mkdir()
            command = [sys.executable, "-m", "ngd_fast.bench.soak", "--part", part, str(count), folder]
            quiet = {"TMPDIR": str(temporary), "TQDM_DISABLE": "1"}
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **quiet})
            results[part] = {"count": count, **read_json(Path(folder) / "result.json")}
    columns, rows = table(results)
    print_table(columns, rows, title="slope ± standard error, after a warm-up of a fifth")
    for name, size in results.get("epochs", {}).get("bytes an epoch", {}).items():
        print(f"{name}: {size:.0f} bytes an epoch")
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
