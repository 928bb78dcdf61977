"""Choosing among runs: on the validation split, or as the paper did, on the sets that it reports."""

from collections.abc import Sequence

from ngd_fast.errors import UserError
from ngd_fast.evaluation.results import Result


def rank_runs(results: Sequence[Result], *, metric: str = "macro_f1", select_on_test: bool = False) -> dict:
    """Runs from best to worst by ``metric``.

    By default by the 8-way metric on validation in each run's own metrics.json. With ``select_on_test`` by the
    mean present-only metric over all other datasets, which biases what is then reported on them: the result says so.

    Returns {"selected_on", "metric", "runs": [{"run", "variant", "seed", "score", "datasets": {name: value}}]}.
    Raises UserError where a run lacks a dataset that another has, or nothing fits.
    """
    protocol = "present_only" if select_on_test else "eight_way"
    fitting = [r for r in results if (r.split != "valid") == select_on_test]
    if not fitting:
        wanted = "evaluations on test sets (outs/xval_*)" if select_on_test else "runs with a validation split"
        raise UserError(f"no {wanted} among the given folders")
    runs: dict[tuple, dict] = {}
    for r in fitting:
        run = runs.setdefault(r.student, {"run": r.run, "variant": r.variant, "seed": r.seed, "datasets": {}})
        run["datasets"][r.dataset] = r.blocks[protocol][metric]
    datasets = sorted({r.dataset for r in fitting})
    for run in runs.values():
        lacking = [name for name in datasets if name not in run["datasets"]]
        if lacking:
            raise UserError(
                f"{run['run']} was not evaluated on {lacking[0]}, on which others were; runs must share datasets"
            )
        run["score"] = sum(run["datasets"].values()) / len(datasets)
    return {
        "selected_on": "TEST SETS (as the paper did; optimistic)" if select_on_test else "validation",
        "metric": f"{protocol} {metric}",
        "runs": sorted(runs.values(), key=lambda run: (-run["score"], run["run"])),
    }
