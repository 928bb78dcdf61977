"""The paper's two tables as JSON: what ``viz/*.tex``, the terminal and the report are rendered from.

A table keeps the checksums of the files it was made from; :func:`rebuild_table` makes it again from them.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngd_fast.artifacts.files import read_json, sha256, write_json, write_text
from ngd_fast.errors import UserError
from ngd_fast.evaluation.bootstrap import METRICS
from ngd_fast.evaluation.comparison import paired_difference, require_same_rows, summarize, variant_samples
from ngd_fast.evaluation.metrics import PROTOCOLS
from ngd_fast.evaluation.predictions import Predictions
from ngd_fast.evaluation.results import Result, by_dataset, by_variant, load_results
from ngd_fast.evaluation.schema import MAX_RESAMPLES

ABLATION, XVAL = "ablation_lite", "xval_main"


def summarize_variant(results: Sequence[Result], protocol: str) -> dict:
    """Mean and spread over the runs of one variant on one dataset; the interval of the one run where there is one.

    Raises UserError where the runs are not the seeds of one setting.
    """
    _require_seeds_of_one_setting(results)
    row: dict[str, Any] = {"variant": results[0].variant}
    row |= {"seeds": [r.seed for r in results], "runs": [r.run for r in results]}
    for name in METRICS:
        values = [r.blocks[protocol][name] for r in results if name in r.blocks[protocol]]
        if len(values) != len(results):
            continue
        row[name] = summarize(values)
        intervals = results[0].blocks[protocol].get("ci", {})
        if len(results) == 1 and name in intervals:
            row[name]["ci"] = intervals[name]
    switches = [r.fingerprint["switches"] for r in results if r.fingerprint and "switches" in r.fingerprint]
    if switches:
        row["switches"] = switches[0]
    return row


def _require_seeds_of_one_setting(results: Sequence[Result]) -> None:
    """Raise UserError where a seed stands twice, or where what is known of the runs' settings differs."""
    seen: dict[int | None, Result] = {}
    settings: dict[str, tuple[Result, object]] = {}
    for r in results:
        for name, value in _setting(r).items():
            other, theirs = settings.setdefault(name, (r, value))
            if value != theirs:
                raise UserError(
                    f"variant {r.variant}: {other.folder} and {r.folder} differ in {name} ({theirs} and {value}); "
                    "they are not seeds of one variant: leave one out, or train it under another name (--set name=...)"
                )
        twin = seen.setdefault(r.seed, r)
        if r.seed is not None and twin is not r:
            raise UserError(
                f"variant {r.variant}: {twin.folder} and {r.folder} both have seed {r.seed}, which would count as two; "
                "name the one that belongs into the table"
            )


def _setting(result: Result) -> dict[str, object]:
    """What the result's own files say of how it was made; the machine is no part of it."""
    data = result.data
    setting = {name: value for name, value in data.get("config", {}).items() if name != "device"}
    setting |= {name: data[name] for name in ("flip_tta", "image_size") if name in data}
    for kind, key in (("switch", "switches"), ("weight", "weights")):
        setting |= {f"the {kind} of {name}": v for name, v in (result.fingerprint or {}).get(key, {}).items()}
    return setting


def ablation_table(
    results: Sequence[Result], *, protocol: str = "eight_way", baseline: str | None = None, resamples: int = 1000
) -> dict:
    """Variants on the one dataset that they share (validation), each against ``baseline`` (default: the first).

    Where every run kept its predictions, rows carry ``versus_baseline`` from the paired bootstrap (seed 0).
    Raises UserError where the results are on several datasets or on other rows, or the baseline is not among them.
    """
    datasets = by_dataset(results)
    if len(datasets) != 1:
        raise UserError(f"an ablation table needs one dataset, the runs have {len(datasets)}: {', '.join(datasets)}")
    variants = by_variant(results)
    baseline = baseline or next(iter(variants))
    if baseline not in variants:
        raise UserError(f"baseline {baseline!r} is not among the variants {', '.join(variants)}")
    rows = [summarize_variant(group, protocol) for group in variants.values()]
    if len(variants) > 1 and all(r.predictions is not None for r in results):
        _require_paired(results)
        samples = {
            name: variant_samples(_kept(group), protocol=protocol, resamples=resamples)
            for name, group in variants.items()
        }
        for row in rows:
            if row["variant"] != baseline:
                row["versus_baseline"] = paired_difference(samples[baseline], samples[row["variant"]])
    block = results[0].blocks[protocol]
    return {
        "kind": ABLATION,
        "dataset": next(iter(datasets)),
        "protocol": protocol,
        "baseline": baseline,
        "resamples": resamples,
        "n": block["n"],
        "rows": rows,
    }


def _kept(results: Sequence[Result]) -> list[Predictions]:
    return [r.predictions for r in results if r.predictions is not None]


def _require_paired(results: Sequence[Result]) -> None:
    """Raise UserError unless all have the same rows in the same order: only those are resampled together."""
    first, *others = _kept(results)
    for r, other in zip(results[1:], others):
        try:
            require_same_rows(first, other)
        except UserError as error:
            raise UserError(f"{results[0].folder} and {r.folder}: {error}") from None


def xval_table(results: Sequence[Result]) -> dict:
    """All variants on all datasets, 8-way and present-only (one block where every class is present)."""
    blocks = []
    for dataset, group in by_dataset(results).items():
        example = group[0].blocks
        absent = example[PROTOCOLS[0]].get("absent", [])
        for protocol in PROTOCOLS if absent else PROTOCOLS[:1]:
            blocks.append(
                {
                    "dataset": dataset,
                    "protocol": protocol,
                    "n": example[protocol]["n"],
                    "absent": absent,
                    "rows": [summarize_variant(runs, protocol) for runs in by_variant(group).values()],
                }
            )
    return {"kind": XVAL, "blocks": blocks}


def write_tables(
    paths: Sequence[str | Path], out: str | Path, *, protocol: str = "eight_way", baseline: str | None = None
) -> list[Path]:
    """Write ``xval_main`` and, where at least two variants share a dataset named by their runs' own metrics.json,
    ``ablation_lite`` into ``out``: each as .json and as .tex rendered from that JSON. Returns the files.

    ``paths`` are run folders, outs/xval_* folders or folders above them.
    """
    results = load_results(paths)
    own = [r for r in results if r.split == "valid"]
    tables = [xval_table(results)]
    if len(by_variant(own)) > 1:
        tables.append(ablation_table(own, protocol=protocol, baseline=baseline))
    return [file for table in tables for file in _write(table, results, Path(out))]


def _write(table: dict, results: Sequence[Result], out: Path) -> list[Path]:
    from ngd_fast.evaluation.latex import render

    if table["kind"] == ABLATION:
        results = [r for r in results if r.split == "valid"]
    table["sources"] = [
        {"path": Path(os.path.relpath(path, out)).as_posix(), "sha256": sha256(path)}
        for path in sorted({r.path for r in results})
    ]
    stem = out / table["kind"]
    write_json(stem.with_suffix(".json"), table)
    write_text(stem.with_suffix(".tex"), render(table))
    return [stem.with_suffix(".json"), stem.with_suffix(".tex")]


def rebuild_table(path: str | Path) -> dict:
    """The table that the sources named in the table file ``path`` give now; raises UserError where one is gone."""
    path = Path(path)
    table = read_json(path)
    sources = [path.parent / source["path"] for source in table["sources"]]
    for source in sources:  # a folder would be searched, the whole disk if it is /
        if not source.is_file():
            raise UserError(f"{source}: no such file, though {path.name} is made from it")
    results = load_results(sources)
    if table["kind"] == ABLATION:
        own = [r for r in results if r.split == "valid"]
        if not 0 < table["resamples"] <= MAX_RESAMPLES:
            raise UserError(f"{path}: resamples must be from 1 to {MAX_RESAMPLES}, are {table['resamples']}")
        made = ablation_table(own, protocol=table["protocol"], baseline=table["baseline"], resamples=table["resamples"])
    else:
        made = xval_table(results)
    made["sources"] = [
        {"path": source["path"], "sha256": sha256(path.parent / source["path"])} for source in table["sources"]
    ]
    return made
