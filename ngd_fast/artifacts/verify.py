"""Is a run still what it says it is? Checksums, inputs, metrics and tables, each derived again from what lies below."""

import math
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path

from ngd_fast.artifacts.files import SUMS_NAME, check_sums, read_json, read_sums
from ngd_fast.artifacts.fingerprint import FINGERPRINT_NAME, check_fingerprint
from ngd_fast.errors import UserError

TOLERANCE = 1e-9
_TABLES = {"ablation_lite.json": "ablation_lite.tex", "xval_main.json": "xval_main.tex"}
"""Each table's JSON, and what is made from it."""


@dataclass
class Verification:
    """What was found in one folder."""

    folder: Path
    checked: list[str] = field(default_factory=list)
    """What was checked and holds."""
    problems: list[str] = field(default_factory=list)
    """What changed; empty where the folder is as it was written."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, and files that came later."""

    def add(self, what: str, problems: list[str]) -> None:
        self.problems += problems
        if not problems:
            self.checked.append(what)


def verify(path: str | Path) -> list[Verification]:
    """Verify the run in ``path``, or every run and evaluation below it.

    Raises UserError where there is nothing to verify.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: is a file, wanted a run's folder" if path.exists() else f"{path}: no such folder")
    marks = {SUMS_NAME, *_CHECKS, *_TABLES.values()}
    folders = sorted({file.parent for file in path.rglob("*") if file.name in marks and file.is_file()})
    if not folders:
        raise UserError(f"{path}: holds no {SUMS_NAME}, metrics.json or table; is it a finished run?")
    return [_verify_folder(folder) for folder in folders]


def _verify_folder(folder: Path) -> Verification:
    found = Verification(folder)
    if (folder / SUMS_NAME).exists():
        _run_check(found, SUMS_NAME, _verify_sums)
    elif any((folder / name).exists() for name in (FINGERPRINT_NAME, "metrics.json")):
        found.problems.append(f"{SUMS_NAME}: missing")
    for made_from, tex in _TABLES.items():
        if (folder / tex).exists() and not (folder / made_from).exists():
            found.problems.append(f"{made_from}: missing, so {tex} cannot be made again")
    for name, check in _CHECKS.items():
        if (folder / name).exists():
            _run_check(found, name, check)
    return found


def _run_check(found: Verification, name: str, check: Callable[[Verification, Path], None]) -> None:
    """A file that cannot even be read is a finding about this folder, not the end of the other checks."""
    try:
        check(found, found.folder / name)
    except UserError as error:
        found.problems.append(f"{name}: cannot be checked: {error}")
    except (LookupError, TypeError, AttributeError, ValueError, OSError, RecursionError) as error:
        found.problems.append(f"{name}: is not as ngd-fast writes it ({type(error).__name__}: {error})")


def _verify_sums(found: Verification, path: Path) -> None:
    listed = read_sums(found.folder).keys()
    found.add(f"{len(listed)} checksums", check_sums(found.folder))
    found.notes += [f"{name}: not in {path.name}, came later" for name in _unlisted(found.folder, listed)]


def _unlisted(folder: Path, listed: Container[str]) -> list[str]:
    files = (p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file())
    return [
        p.as_posix() for p in files if p.name != SUMS_NAME and not p.name.startswith(".") and p.as_posix() not in listed
    ]


def _verify_fingerprint(found: Verification, path: Path) -> None:
    fingerprint = read_json(path)
    changed, absent = check_fingerprint(found.folder, fingerprint)
    metrics = found.folder / "metrics.json"
    told = read_json(metrics) if metrics.exists() else {}
    for name in ("variant", "seed"):
        if name in told and told[name] != fingerprint[name]:
            changed.append(f"{name} is {fingerprint[name]}, but metrics.json says {told[name]}")
    found.add("fingerprint", [f"{FINGERPRINT_NAME}: {line}" for line in changed])
    found.notes += [f"{FINGERPRINT_NAME}: {line}, so it was not checked" for line in absent]


def _verify_metrics(found: Verification, path: Path) -> None:
    from ngd_fast.evaluation.metrics import evaluate
    from ngd_fast.evaluation.results import read_metrics

    for result in read_metrics(path):
        predictions = result.predictions
        where = f"metrics.json {result.split}".strip()
        if predictions is None:
            found.notes.append(f"{where}: {result.predictions_path.name} was not kept, so it was not derived again")
            continue
        problems = []
        for protocol, block in result.blocks.items():
            again = evaluate(
                predictions.labels,
                predictions.logits,
                class_names=predictions.class_names,
                protocol=protocol,
                bootstrap=block.get("bootstrap", {}).get("resamples", 0),
                seed=block.get("bootstrap", {}).get("seed", 0),
            )
            problems += [f"{where}: {line}" for line in differences(block, again, protocol)]
        found.add(f"{where} from {result.predictions_path.name}", problems)


def _verify_table(found: Verification, path: Path) -> None:
    from ngd_fast.evaluation.latex import render
    from ngd_fast.evaluation.tables import rebuild_table

    table = read_json(path)
    problems = [f"{path.name}: {line}" for line in differences(table, rebuild_table(path), "")]
    tex = path.with_suffix(".tex")
    if not tex.exists():
        problems.append(f"{tex.name}: missing")
    elif tex.read_text(encoding="utf-8") != render(table):
        problems.append(f"{tex.name}: is not what {path.name} gives")
    found.add(f"{tex.name} from {path.name} and its {len(table['sources'])} sources", problems)


_CHECKS = {
    FINGERPRINT_NAME: _verify_fingerprint,
    "metrics.json": _verify_metrics,
    **dict.fromkeys(_TABLES, _verify_table),
}


def differences(kept, again, where: str) -> list[str]:
    """Where two JSON values differ, numbers by more than 1e-9: a line each, "eight_way.accuracy: says 0.9, is 0.8"."""
    if isinstance(kept, dict) and isinstance(again, dict):
        lines = []
        for key in sorted(kept.keys() | again.keys()):
            name = f"{where}.{key}".lstrip(".")
            if key not in again:
                lines.append(f"{name}: cannot be derived")
            elif key not in kept:
                lines.append(f"{name}: missing")
            else:
                lines += differences(kept[key], again[key], name)
        return lines
    if isinstance(kept, list) and isinstance(again, list) and len(kept) == len(again):
        return [line for i, (a, b) in enumerate(zip(kept, again)) for line in differences(a, b, f"{where}[{i}]")]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (kept, again))
    same = math.isclose(kept, again, rel_tol=0, abs_tol=TOLERANCE) if numbers else kept == again
    return [] if same else [f"{where}: says {kept}, is {again}"]
