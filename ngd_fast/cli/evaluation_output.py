"""What an evaluation leaves: its folder's files, and its tables on the terminal."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ngd_fast.console import print_table, say
from ngd_fast.errors import UserError


def write_evaluation(
    folder: Path, predictions, identity: dict, *, bootstrap: int, seed: int, groups=None, corrupted=None, baseline=None
) -> dict:
    """Write everything that an evaluation leaves into ``folder`` and return its metrics, slices and corruptions too."""
    from ngd_fast.artifacts.figure_style import has_matplotlib, save_figure
    from ngd_fast.artifacts.files import alone_in, write_json, write_sums
    from ngd_fast.evaluation.figures_classes import confusion_figure
    from ngd_fast.evaluation.figures_robustness import corruption_figure, slices_figure
    from ngd_fast.evaluation.metrics import evaluate_predictions, write_per_class
    from ngd_fast.evaluation.slices import evaluate_slices

    # what can fail comes before anything is written
    blocks = evaluate_predictions(predictions, bootstrap=bootstrap, seed=seed)
    slices = evaluate_slices(predictions, groups, bootstrap=bootstrap, seed=seed) if groups else None
    scores = _corruptions(corrupted, identity, baseline) if corrupted else None
    metrics = {**identity, **blocks}
    with alone_in(folder, resume=True):
        predictions.save(folder / "predictions.npz")
        write_json(folder / "metrics.json", metrics)
        write_per_class(folder / "per_class.csv", blocks)
        drawn = {}
        for name, protocol in (("confmat", "eight_way"), ("confmat_present", "present_only")):
            title = f"{identity['dataset']}, {'8-way' if protocol == 'eight_way' else 'present-only'}"
            drawn[name] = partial(confusion_figure, blocks[protocol], title=title)
        if slices:
            write_json(folder / "slices.json", slices)
            drawn["slices"] = partial(slices_figure, slices)
        if scores:
            write_json(folder / "corruptions.json", scores)
            others = {} if baseline is None else {baseline["run"]: baseline}
            drawn["corruptions"] = partial(corruption_figure, {**others, identity["run"]: scores})
        if has_matplotlib():
            for name, draw in drawn.items():
                save_figure(draw(), folder / name, kinds=("png", "pdf"))
        else:
            say("no figures: drawing needs matplotlib (pip install 'ngd-fast[viz]')")
        write_sums(folder)
    return {**metrics, **({"slices": slices} if slices else {}), **({"corruptions": scores} if scores else {})}


def _corruptions(corrupted, identity: Mapping, baseline: Mapping | None) -> dict:
    from ngd_fast.student.robustness import corruption_scores, mean_corruption_error

    if baseline is not None and baseline["data"] != identity["data"]:
        raise UserError(f"--versus: {baseline['run']} was evaluated on other faces ({baseline['data']['source']})")
    scores = {**identity, **corruption_scores(*corrupted())}
    if baseline is not None:
        scores["versus"] = {"run": baseline["run"], **mean_corruption_error(scores, baseline)}
    return scores


def print_slices(slices: Mapping) -> None:
    """Every group's metrics, and the gaps between worst and best."""
    from ngd_fast.evaluation.latex import TITLES, p_value, percent
    from ngd_fast.evaluation.slices import SLICE_METRICS, SMALL

    for column, made in slices.items():
        rows = []
        for group, entry in made["groups"].items():
            cells = []
            for name in SLICE_METRICS:
                low, high = entry.get("ci", {}).get(name, (None, None))
                shown = "" if low is None else f" [{percent(low, 1)}, {percent(high, 1)}]"
                cells.append(percent(entry[name]) + shown)
            rows.append([group, f"{entry['n']}{' (few)' if entry['small'] else ''}", *cells])
        if made["gaps"]:
            gaps = (made["gaps"][name] for name in SLICE_METRICS)
            cells = [
                f"{100 * g['difference']:.2f}" + (f" (p {p_value(g['p'])})" if "p" in g else "") + f": {g['worst']}"
                for g in gaps
            ]
            rows.append(["gap: worst group", "", *cells])
        title = f"by {column}, 8-way, in %; (few): under {SMALL} faces, {made['unlisted']} faces not listed"
        print_table([column, "n", *(TITLES[name] for name in SLICE_METRICS)], rows, title=title)


def print_corruptions(scores: Mapping) -> None:
    """Accuracy at each severity, and the mean corruption error where there is a baseline."""
    from ngd_fast.evaluation.latex import percent

    versus = scores.get("versus")
    rows = [["clean", percent(scores["clean"]["accuracy"])]]
    for name, values in scores["corruptions"].items():
        cells = [percent(value, 1) for value in values["accuracy"]]
        mean = percent(sum(values["accuracy"]) / len(values["accuracy"]))
        rows.append([name.replace("_", " "), mean, *cells, *([f"{versus['ce'][name]:.1f}"] if versus else [])])
    columns = ["corruption", "mean", *(f"severity {k}" for k in range(1, 6)), *(["CE %"] if versus else [])]
    title = f"{scores['run']} under corruptions: accuracy in %"
    if versus:
        title += f"; mean corruption error over {versus['run']}: {versus['mce']:.1f} %"
    print_table(columns, [row + [""] * (len(columns) - len(row)) for row in rows], title=title)


def print_evaluation(metrics: dict) -> None:
    """Both protocols with their intervals, then the classes."""
    from ngd_fast.evaluation.latex import PROTOCOL_TITLES, TITLES, percent

    rows = []
    for protocol, title in PROTOCOL_TITLES.items():
        block = metrics[protocol]
        cells = []
        for name in TITLES:
            interval = block.get("ci", {}).get(name)
            shown = f" [{percent(interval[0], 1)}, {percent(interval[1], 1)}]" if interval else ""
            cells.append(percent(block[name]) + shown if name in block else "")
        rows.append([title, block["n"], *cells])
    print_table(["protocol", "n", *TITLES.values()], rows, title=f"{metrics['run']} on {metrics['dataset']}, in %")
    block = metrics["eight_way"]
    rows = []
    for name in block["classes"]:
        rates = block["per_class"].get(name)
        keys = ("precision", "recall", "f1", "auroc")
        cells = [percent(rates[key]) if key in rates else "" for key in keys] if rates else [""] * 4
        rows.append([name, rates["support"] if rates else 0, *cells])
    print_table(["class (8-way)", "n", "precision", "recall", "F1", "AUROC"], rows)


def print_summary(made: dict) -> None:
    """A table of ngd_fast.evaluation.tables on the terminal."""
    from ngd_fast.evaluation.latex import PROTOCOL_TITLES, TITLES, columns_of, p_value, summary_text

    blocks = made.get("blocks", [made])
    for block in blocks:
        names = columns_of(block["rows"])
        paired = any("versus_baseline" in row for row in block["rows"])
        rows = []
        for row in block["rows"]:
            cells = [row["variant"], len(row["seeds"]), *(summary_text(row[name]) for name in names)]
            if paired:
                versus = row.get("versus_baseline", {}).get("macro_f1")
                cells += [f"{100 * versus['difference']:+.2f}", p_value(versus["p"])] if versus else ["", ""]
            rows.append(cells)
        head = ["variant", "seeds", *(TITLES[name] for name in names)]
        head += [f"macro-F1 vs {made['baseline']}", "p"] if paired else []
        title = f"{made['kind']}: {block['dataset']}, {PROTOCOL_TITLES[block['protocol']]}, n={block['n']}, in %"
        title += ", best epochs by validation"
        print_table(head, rows, title=title)
