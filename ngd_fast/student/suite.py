"""Several runs as one suite: the ablation B0 to B3, and the paper's sweeps. Finished runs are kept, others continue.

The outermost part of a training: decides which runs, and calls ``run`` for each, or for several side by side.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ngd_fast.artifacts.files import read_json
from ngd_fast.config import as_override
from ngd_fast.console import print_table, say
from ngd_fast.devices import pick_device
from ngd_fast.errors import UserError
from ngd_fast.evaluation.results import load_results
from ngd_fast.evaluation.tables import ABLATION, ablation_table, write_tables
from ngd_fast.prototypes.bank import PrototypeBank
from ngd_fast.student.checkpoint import LAST_NAME, progress_of
from ngd_fast.student.config import StudentConfig, load_student_config
from ngd_fast.student.inputs import load_bank_and_weights
from ngd_fast.student.run import holds_finished_run, train_students, trains_alike
from ngd_fast.student.session import Diverged

SWEEPS = {
    "proto-weight": ("objective.proto.weight", (0.0, 0.10, 0.12, 0.15)),
    "ramp-start": ("objective.geo.schedule.start", (0.0, 10.0, 20.0, 30.0, 40.0)),
    "geo-weight": ("objective.geo.weight", (0.0, 0.006, 0.012, 0.024)),
}
"""The key that a sweep changes, and the values that it tries by default (the paper's, where it states them)."""

# On an H100 two students in one graph train 13 % more images a second in all than one after the other; plain PyTorch
# on an H200 gains 11 % by two and 12 % by four. More only need memory.
_SIDE_BY_SIDE_ON_GPU = 4


@dataclass(frozen=True)
class Job:
    """One run of a suite."""

    config: StudentConfig
    folder: Path


def ablation_jobs(configs: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], out: str | Path) -> list[Job]:
    """Every configuration with every seed, in ``out``/NAME_seedN. Raises UserError where two share a name."""
    jobs, sources = [], {}
    for seed in seeds:
        for source in configs:
            config = load_student_config(source, [*overrides, f"seed={seed}"])
            folder = Path(out) / f"{config.name}_seed{seed}"
            if folder in sources:
                raise UserError(
                    f"{sources[folder]} and {source} are both named {config.name}, and two runs would be written to "
                    f"{folder}; give the configurations different names"
                )
            sources[folder] = source
            jobs.append(Job(config, folder))
    return jobs


def sweep_jobs(
    kind: str, config: str, values: Sequence[float], seeds: Sequence[int], overrides: Sequence[str], out: str | Path
) -> tuple[list[Job], str]:
    """``config`` with each value of a sweep and each seed; and the name of the variant that has its own value.

    A later start of D-Geo's ramp moves its end too, so that it takes as long.
    """
    key, defaults = SWEEPS[kind]
    base = load_student_config(config, overrides)
    own = _get(base, key)
    jobs = []
    for seed in seeds:
        for value in sorted({*(values or defaults), own}):
            changes = [f"{key}={value!r}", f"name={_value_name(kind, value)}", f"seed={seed}"]
            if kind == "ramp-start":
                ramp = base.objective.geo.schedule
                changes.append(f"objective.geo.schedule.end={value + ramp.end - ramp.start!r}")
            variant = load_student_config(config, [*overrides, *changes])
            jobs.append(Job(variant, Path(out) / f"{variant.name}_seed{seed}"))
    return jobs, _value_name(kind, own)


def grid_jobs(
    config: str, banks: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], out: str | Path
) -> tuple[list[Job], str]:
    """``config`` with each bank (one for each grid size) and each seed; the 5x5 grid, if there, is the baseline."""
    if len(banks) < 2:
        raise UserError("sweep grid: --banks must name two or more, made by ngd-fast prototypes build --grid N")
    grids: dict[int, str] = {}
    for bank in banks:
        loaded = PrototypeBank.load(bank)
        if loaded.va is not None:
            raise UserError(f"sweep grid: {bank} has no grid, but {len(loaded.va)} clusters (--layout kmeans)")
        grid = loaded.grid
        if grid in grids:
            raise UserError(f"sweep grid: {grids[grid]} and {bank} have the same grid, {grid}x{grid}")
        grids[grid] = bank
    jobs = []
    for seed in seeds:
        for grid, bank in sorted(grids.items()):
            changes = [as_override("objective.proto.bank", bank), f"name=grid-{grid}x{grid}", f"seed={seed}"]
            variant = load_student_config(config, [*overrides, *changes])
            jobs.append(Job(variant, Path(out) / f"{variant.name}_seed{seed}"))
    baseline = 5 if 5 in grids else min(grids)
    return jobs, f"grid-{baseline}x{baseline}"


def _value_name(kind: str, value: float) -> str:
    text = f"{value:04.1f}" if kind == "ramp-start" else f"{value:.3f}"
    return f"{kind}-{text if float(text) == value else repr(value)}"


def _get(config: StudentConfig, key: str) -> float:
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def run_suite(
    jobs: Sequence[Job], out: str | Path, *, baseline: str | None = None, side_by_side: int | None = None
) -> dict | None:
    """Train what is not finished, write and print the table of all (see :func:`report_jobs`), and return it.

    ``baseline``: the variant that the others are compared with; the first where it is None or all its runs diverged.
    None where SIGTERM stopped it. Raises UserError naming the runs that diverged, once the others stand in the table.
    """
    finished = run_jobs(jobs, side_by_side=side_by_side)
    if finished is None:
        return None
    lost = {job.config.name for job in jobs} - {job.config.name for job in finished}
    table = report_jobs(finished, out, baseline=None if baseline in lost else baseline) if finished else None
    diverged = [job.folder.name for job in jobs if job not in finished]
    if diverged:
        raise UserError(f"{len(diverged)} of {len(jobs)} runs diverged and stand in no table: {', '.join(diverged)}")
    return table


def run_jobs(jobs: Sequence[Job], *, side_by_side: int | None = None) -> list[Job] | None:
    """Train what is not finished. Returns the jobs but for those that diverged, which stop no other; None: SIGTERM.

    ``side_by_side``: how many students of one seed share a feed and, on a GPU, a CUDA graph; default 4 there, else 1.
    Raises UserError for a folder that holds another run.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a suite runs in one process; under torchrun use ngd-fast student train")
    if side_by_side is None:
        side_by_side = _SIDE_BY_SIDE_ON_GPU if pick_device(jobs[0].config.device).type == "cuda" else 1
    left = [job for job in jobs if not holds_finished_run(job.folder, job.config)]
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} runs are finished already")
    for job in left:  # or the last variant would miss its teacher only after the others' hours of training
        load_bank_and_weights(job.config)
    finished, groups = list(jobs), _groups(left, side_by_side)
    while groups:
        group = groups.pop(0)
        say(f"training {', '.join(job.folder.name for job in group)} ({left.index(group[0]) + 1} of {len(left)})")
        try:
            metrics = train_students([job.config for job in group], [job.folder for job in group], resume=True)
        except Diverged as error:
            say(str(error))
            finished = [job for job in finished if job.folder != error.folder]
            groups[:0] = _groups([job for job in group if job.folder != error.folder], side_by_side)
            continue
        if any(m is None for m in metrics):
            return None
    return finished


def _groups(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Jobs that may train side by side: one seed, the same data and steps, equally far."""
    groups: list[list[Job]] = []
    for job in jobs:
        for group in groups:
            alike = trains_alike(group[0].config, job.config) and _far(group[0]) == _far(job)
            if len(group) < size and alike:
                group.append(job)
                break
        else:
            groups.append([job])
    return groups


def _far(job: Job) -> tuple[int, int]:
    return progress_of(job.folder / LAST_NAME)


def report_jobs(jobs: Sequence[Job], out: str | Path, *, baseline: str | None = None) -> dict:
    """Write ``out``/viz/ablation_lite.{json,tex} (and xval_main), print the table, and return it."""
    folders = [job.folder for job in jobs]
    results = [result for result in load_results(folders) if result.split == "valid"]
    names = list(dict.fromkeys(job.config.name for job in jobs))
    baseline = baseline or names[0]
    write_tables(folders, Path(out) / "viz", baseline=baseline)
    # A single variant has nothing to stand beside, so write_tables leaves that table out.
    path = Path(out) / "viz" / f"{ABLATION}.json"
    table = read_json(path) if len(names) > 1 else ablation_table(results, baseline=baseline)
    print_table(
        ["variant", "seeds", "accuracy %", "macro-F1 %", "bACC %", f"macro-F1 against {baseline}", "p"],
        [_row(row) for row in table["rows"]],
        title=f"{table['dataset']}, {table['n']} faces, best epoch by valid; mean and standard deviation over seeds",
    )
    return table


def _row(row: dict) -> list:
    cells = [row["variant"], len(row["seeds"])]
    for name in ("accuracy", "macro_f1", "balanced_accuracy"):
        value = row[name]
        spread = f" ± {100 * value['std']:.2f}" if "std" in value else ""
        cells.append(f"{100 * value['mean']:.2f}{spread}")
    versus = row.get("versus_baseline", {}).get("macro_f1")
    if versus is None:
        return [*cells, "", ""]
    low, high = versus["ci"]
    return [*cells, f"{100 * versus['difference']:+.2f} [{100 * low:+.1f}, {100 * high:+.1f}]", f"{versus['p']:.3f}"]
