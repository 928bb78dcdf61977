"""Runs and evaluations as they lie on disk: found, read and checked, for tables, figures, the report and ``verify``."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ngd_fast.artifacts.files import read_json, require_untouched
from ngd_fast.artifacts.fingerprint import FINGERPRINT_NAME
from ngd_fast.config import Config, build_config
from ngd_fast.console import say
from ngd_fast.errors import UserError
from ngd_fast.evaluation.metrics import PROTOCOLS
from ngd_fast.evaluation.predictions import Predictions, is_name
from ngd_fast.evaluation.schema import Block, Fingerprint, Metrics

METRICS_NAME = "metrics.json"


@dataclass(frozen=True)
class Result:
    """One run on one dataset."""

    path: Path
    """The metrics.json it stands in."""
    split: str
    """The key below which the blocks stand ("valid"); empty where they stand at the top, as in outs/xval_*."""
    run: str
    variant: str
    seed: int | None
    dataset: str
    blocks: dict[str, dict]
    """{"eight_way": block, "present_only": block} as :func:`~ngd_fast.evaluation.metrics.evaluate` makes them."""
    data: dict = field(repr=False)
    """The whole metrics.json."""

    @property
    def folder(self) -> Path:
        """The folder of metrics.json."""
        return self.path.parent

    @property
    def student(self) -> tuple[str, str, int | None]:
        """Whose evaluation this is. Folders called seed1 may stand below each variant's, so that the run is not all."""
        return self.run, self.variant, self.seed

    @property
    def predictions_path(self) -> Path:
        """Where its predictions lie, if they were kept."""
        return self.folder / (f"predictions_{self.split}.npz" if self.split else "predictions.npz")

    @cached_property
    def predictions(self) -> Predictions | None:
        """The predictions that the metrics were computed from; None where they were not kept."""
        return Predictions.load(self.predictions_path) if self.predictions_path.exists() else None

    @cached_property
    def fingerprint(self) -> dict | None:
        """The run's ablation_fingerprint.json; None where there is none."""
        path = self.folder / FINGERPRINT_NAME
        return _checked(Fingerprint, read_json(path), path) if path.exists() else None

    @cached_property
    def calibration(self) -> dict | None:
        """A run's calibration.json."""
        return self._beside("calibration.json")

    @cached_property
    def slices(self) -> dict | None:
        """An evaluation's slices.json."""
        return self._beside("slices.json")

    @cached_property
    def corruptions(self) -> dict | None:
        """An evaluation's corruptions.json."""
        return self._beside("corruptions.json")

    def _beside(self, name: str) -> dict | None:
        path = self.folder / name
        if not path.exists():
            return None
        require_untouched(path)
        return read_json(path)


def load_results(paths: Sequence[str | Path]) -> list[Result]:
    """Read every evaluation in the given metrics.json files and folders (searched to any depth), without repeats.

    Sorted by variant, seed and dataset. Raises UserError where nothing is found, a file is no metrics.json, or metrics
    or predictions are not those that their run's SHA256SUMS.txt names.
    """
    results: list[Result] = []
    seen: set[Path] = set()
    for path in map(Path, paths):
        for file in _metrics_files(path):
            if file.resolve() not in seen:
                seen.add(file.resolve())
                require_untouched(file)
                results.extend(read_metrics(file))
    if not results:
        raise UserError(f"{', '.join(map(str, paths))}: holds no evaluation of a student")
    for path in {result.predictions_path for result in results}:
        if path.exists():
            require_untouched(path)
    results.sort(key=lambda r: (r.variant, r.seed if r.seed is not None else -1, r.dataset, r.run, str(r.path)))
    return _without_repeats(results)


def _without_repeats(results: list[Result]) -> list[Result]:
    """Drop a student's second evaluation on a dataset where it says the same, or is its validation once more in another
    precision than it was trained in; refuse it where it says something else."""
    kept: dict[tuple, Result] = {}
    for result in results:
        first = kept.setdefault((result.student, result.dataset), result)
        if first.blocks == result.blocks:
            continue
        if _is_validation_again(first, result):
            again = result
        elif _is_validation_again(result, first):
            again, kept[result.student, result.dataset] = first, result
        else:
            raise UserError(
                f"{result.run} on {result.dataset} has two results that differ: {first.path} and {result.path}; "
                "name the folders that belong into the table"
            )
        say(f"{again.folder}: {again.run} on its validation faces once more, in float32; the run's own metrics stand")
    return list(kept.values())


def _is_validation_again(own: Result, other: Result) -> bool:
    """Whether ``other`` evaluates the weights of the run ``own`` on as many faces in the same way as its validation."""
    weights = (own.fingerprint or {}).get("files", {}).get("weights", {}).get("sha256")
    return (
        own.split == "valid"
        and weights is not None
        and other.data.get("checkpoint", {}).get("sha256") == weights
        and not other.data.get("flip_tta")
        and other.data.get("image_size") == own.data.get("config", {}).get("image_size")
        and other.blocks[PROTOCOLS[0]]["n"] == own.blocks[PROTOCOLS[0]]["n"]
    )


def _metrics_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder or {METRICS_NAME}")
    files = sorted(path.rglob(METRICS_NAME))
    if not files:
        raise UserError(f"{path}: holds no {METRICS_NAME}; is the run finished?")
    return files


def read_metrics(path: Path) -> Iterator[Result]:
    """The evaluations in one metrics.json; none in that of another kind of run, such as an EEG teacher's."""
    data = read_json(path)
    found = {key: value for key, value in data.items() if isinstance(value, dict) and PROTOCOLS[0] in value}
    if PROTOCOLS[0] in data:
        found[""] = data
    for split, blocks in found.items():
        for protocol in PROTOCOLS:
            missing = {"accuracy", "macro_f1", "n", "classes", "confusion"} - set(blocks.get(protocol) or ())
            if missing:
                raise UserError(f"{path}: {split or 'the file'} lacks {protocol} {', '.join(sorted(missing))}")
            _checked(Block, blocks[protocol], f"{path}: {split} {protocol}")
        _checked(Metrics, data, path)
        run = str(data.get("run") or path.parent.name)
        names = {
            "run": run,
            "variant": str(data.get("variant") or run),
            "dataset": str(data.get("dataset") or split or path.parent.name),
        }
        for key, name in names.items():
            if not is_name(name):
                raise UserError(f"{path}: {key} must be one line of at most 200 printable characters, is {name!r:.200}")
        yield Result(
            path=path,
            split=split,
            seed=data.get("seed"),
            **names,
            blocks={protocol: blocks[protocol] for protocol in PROTOCOLS},
            data=data,
        )


def _checked(model: type[Config], data: dict, source: object) -> dict:
    """``data`` as it is, once ``model`` takes it."""
    build_config(model, data, source=str(source))
    return data


def by_variant(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results of each variant, variants in order of name."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: r.variant):
        groups.setdefault(result.variant, []).append(result)
    return groups


def by_dataset(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results on each dataset, which must have the same rows of each class. Raises UserError where it has not."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.dataset, []).append(result)
    for dataset, group in groups.items():
        for result in group[1:]:
            counts = [[sum(row) for row in r.blocks[PROTOCOLS[0]]["confusion"]] for r in (group[0], result)]
            if counts[0] != counts[1]:
                raise UserError(
                    f"{dataset}: {group[0].run} was evaluated on {sum(counts[0])} rows ({_commas(counts[0])} of the "
                    f"classes) and {result.run} on {sum(counts[1])} ({_commas(counts[1])}); they cannot stand in one "
                    "table"
                )
    return groups


def _commas(counts: Iterable[int]) -> str:
    return ", ".join(map(str, counts))
