"""The sections of the report, each as HTML; a section without anything to show is empty."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np

from ngd_fast.artifacts import html
from ngd_fast.artifacts.figure_style import render, save_figure
from ngd_fast.artifacts.files import file_stem, read_text
from ngd_fast.artifacts.model_card import PROHIBITED, checklist
from ngd_fast.config import build_config, parse_yaml
from ngd_fast.errors import UserError
from ngd_fast.evaluation.comparison import paired_difference, variant_samples
from ngd_fast.evaluation.figures_classes import confusion_figure, per_class_figure
from ngd_fast.evaluation.figures_training import read_log, terms_figure, timeline_figure
from ngd_fast.evaluation.latex import (
    PROTOCOL_TITLES,
    SWITCH_TITLES,
    TITLES,
    best_of,
    columns_of,
    p_value,
    percent,
    seeds_text,
    switches_of,
)
from ngd_fast.evaluation.metrics import classes_of
from ngd_fast.evaluation.results import Result
from ngd_fast.evaluation.tables import ablation_table, xval_table
from ngd_fast.student.config import GeoConfig


@dataclass
class Report:
    """What the sections are made from."""

    runs: dict[str, list[Result]]
    """Validation results of each variant, one for each seed."""
    others: list[Result]
    """Evaluations on other datasets."""
    viz: Path | None
    embedding: str
    seed: int
    baseline: str | None = None
    extra: Mapping[str, bytes] = field(default_factory=dict)
    prototypes: np.ndarray | None = None
    """[K, D], for the angles of the features to their span."""
    _used: set[str] = field(default_factory=set)

    @property
    def every(self) -> list[Result]:
        return [r for group in self.runs.values() for r in group] + self.others

    def shown(self) -> dict[str, Result]:
        """One run for each variant: that of the first seed."""
        return {variant: group[0] for variant, group in self.runs.items()}

    def with_predictions(self, *, features: bool = False) -> dict:
        """{variant: predictions of its first seed}, for the variants that kept them (and their features)."""
        found = {variant: r.predictions for variant, r in self.shown().items() if r.predictions is not None}
        return {v: p for v, p in found.items() if p.features is not None} if features else found

    def figure(self, name: str, drawn, caption: str) -> str:
        """Save the figure as PDF, SVG and PNG where there is a folder for it, and embed it."""
        name = file_stem(name)
        while name in self._used:  # B0/a and B0_a
            name += "_"
        self._used.add(name)
        if self.viz is None:
            image = render(drawn, "svg")
        else:
            image = next(p for p in save_figure(drawn, self.viz / name) if p.suffix == ".svg").read_bytes()
        # at 96 pixels an inch a figure keeps the size of its letters
        return html.figure(image, "svg", caption, width=round(drawn.get_figwidth() * 96))


def _cell(summary: Mapping, best: bool) -> str:
    text = percent(summary["mean"])
    if "std" in summary:
        text += f" <small>± {percent(summary['std'])}</small>"
    elif "ci" in summary:
        low, high = (percent(v, 1) for v in summary["ci"])
        text += f" <small>[{low}, {high}]</small>"
    return html.Best(text) if best else text


def _metrics_table(rows: Sequence[Mapping], caption: str, baseline: str | None = None) -> str:
    names, switches = columns_of(rows), switches_of(rows)
    paired = any("versus_baseline" in row for row in rows)
    head = ["Variant", *(SWITCH_TITLES.get(s, s) for s in switches), "Seeds", *(f"{TITLES[n]} %" for n in names)]
    head += [f"Macro-F1 vs {baseline}", "p"] if paired else []
    lines = []
    for row in rows:
        cells = [f"<b>{escape(row['variant'])}</b>", *("●" if row["switches"].get(s) else "" for s in switches)]
        cells.append(seeds_text(row))
        cells += [_cell(row[n], len(rows) > 1 and row[n]["mean"] == best_of(rows, n)) for n in names]
        if paired:
            versus = row.get("versus_baseline", {}).get("macro_f1")
            cells += [_difference(versus), escape(p_value(versus["p"]))] if versus else ["", ""]
        lines.append(cells)
    return html.table(head, lines, caption=caption)


def _difference(versus: Mapping) -> str:
    low, high = (f"{100 * v:+.1f}" for v in versus["ci"])
    return f"{100 * versus['difference']:+.2f} <small>[{low}, {high}]</small>"


def summary(report: Report) -> str:
    if not report.runs:
        return ""
    results = [r for group in report.runs.values() for r in group]
    datasets = sorted({r.dataset for r in results})
    if len(datasets) > 1:
        raise UserError(f"one report needs one validation set, the runs have {len(datasets)}: {', '.join(datasets)}")
    made = ablation_table(results, baseline=report.baseline)
    text = (
        "<p>8-way metrics on the validation split, on which the best epoch was chosen. ± is the standard deviation "
        "over seeds; brackets are 95 % intervals of a stratified bootstrap of the rows. Differences are paired on "
        f"{made['resamples']:,} resamples of the rows, the seeds held fixed; p is two-sided and not corrected for "
        "several comparisons. Green: best.</p>"
    )
    text += _metrics_table(made["rows"], f"{made['dataset']}, n = {made['n']}", made["baseline"])
    return text + _pairwise(report)


def _pairwise(report: Report) -> str:
    """Every variant against every earlier one."""
    names = list(report.runs)
    if len(names) < 3 or any(r.predictions is None for group in report.runs.values() for r in group):
        return ""
    samples = {name: variant_samples([r.predictions for r in group]) for name, group in report.runs.items()}
    rows = []
    for j, name in enumerate(names):
        cells = [f"<b>{escape(name)}</b>"]
        for i, other in enumerate(names[:-1]):
            if i >= j:
                cells.append("")
                continue
            versus = paired_difference(samples[other], samples[name])["macro_f1"]
            cells.append(f"{_difference(versus)} <small>p {escape(p_value(versus['p']))}</small>")
        if j:
            rows.append(cells)
    table = html.table(["", *(f"minus {name}" for name in names[:-1])], rows, caption="Macro-F1, in percentage points")
    return html.details("Every pair of variants", table)


def training(report: Report) -> str:
    logs = {}
    for variant, group in report.runs.items():
        found = [read_log(r.folder / "log.jsonl") for r in group if (r.folder / "log.jsonl").exists()]
        if any(found):
            logs[variant] = [epochs for epochs in found if epochs]
    if not logs:
        return ""
    ramp = agreed(report, _ramp)
    content = report.figure(
        "timeline",
        timeline_figure(logs, ramp),
        "Training loss and validation metrics over epochs: thick lines are means over seeds, thin lines the seeds. The "
        "shaded window is where the weight of D-Geo rises from 0 to its full value.",
    )
    terms = report.figure("terms", terms_figure(logs, ramp), "The terms of the objective, unweighted, over epochs.")
    settings = ("arch", "image_size", "epochs", "batch_size", "lr", "precision")
    rows = []
    for group in report.runs.values():
        for r in group:
            train, config = r.data.get("train", {}), r.data.get("config", {})
            rate, seconds = train.get("images_per_second"), train.get("seconds")
            cells = [r.run, r.seed, *(config.get(name, "") for name in settings), r.data.get("best_epoch", "")]
            cells += [f"{rate:,.0f}" if rate else "", f"{seconds:,.0f}" if seconds else ""]
            rows.append([escape(str(cell)) for cell in cells])
    head = ["Run", "Seed", "Network", "Pixels", "Epochs", "Batch", "Learning rate", "Precision"]
    speed = html.table([*head, "Best epoch", "Images/s", "Seconds"], rows)
    return content + terms + html.details("Runs: settings, best epoch and speed", speed)


def _ramp(geo: GeoConfig) -> tuple[float, float] | None:
    return None if geo.schedule.kind == "constant" else (geo.schedule.start, geo.schedule.end)


def classes(report: Report) -> str:
    shown = report.shown()
    if not shown:
        return ""
    first = next(iter(shown.values()))
    blocks = {variant: r.blocks["eight_way"] for variant, r in shown.items()}
    content = report.figure(
        "per_class",
        per_class_figure(blocks),
        f"F1 of each class on {first.dataset} with its 95 % bootstrap interval (first seed of each variant).",
    )
    ends = list(dict.fromkeys((next(iter(shown)), list(shown)[-1])))
    figures = {v: _confusions(report, shown[v], f"confusion_{v}") for v in shown}
    content += f'<div class="row">{"".join(figures[v] for v in ends)}</div>'
    rest = "".join(figures[v] for v in shown if v not in ends)
    if rest:
        content += html.details("The other variants", f'<div class="row">{rest}</div>')
    return content + html.details("Numbers", "".join(_per_class_table(shown[v]) for v in shown))


def _confusions(report: Report, result: Result, stem: str) -> str:
    """8-way, and present-only where it differs."""
    content = ""
    absent = result.blocks["eight_way"].get("absent")
    for protocol in PROTOCOL_TITLES if absent else ("eight_way",):
        title = f"{result.variant} on {result.dataset}, {PROTOCOL_TITLES[protocol]}"
        drawn = confusion_figure(result.blocks[protocol], title=title)
        caption = f"Percent of the true class, and counts ({result.run})."
        content += report.figure(stem if protocol == "eight_way" else f"{stem}_present", drawn, caption)
    return content


def _per_class_table(result: Result) -> str:
    rows = []
    for name, rates in classes_of(result.blocks["eight_way"]):
        cells = [escape(name), str(rates["support"])]
        for key in ("precision", "recall", "f1", "auroc"):
            interval = rates.get("ci", {}).get(key)
            text = percent(rates[key]) if key in rates else ""
            if interval:
                text += f" <small>[{percent(interval[0], 1)}, {percent(interval[1], 1)}]</small>"
            cells.append(text)
        rows.append(cells)
    head = ["Class", "n", "Precision %", "Recall %", "F1 %", "AUROC %"]
    return html.table(head, rows, caption=f"{result.run} on {result.dataset}, 8-way")


def agreed(report: Report, read: Callable[[GeoConfig], tuple | None]) -> tuple | None:
    """What ``read`` takes from D-Geo's settings, where all variants that have it on agree: a sweep's do not."""
    found = set()
    for result in report.shown().values():
        path = result.folder / "config.yaml"
        if (result.fingerprint or {}).get("switches", {}).get("d_geo") and path.exists():
            config = parse_yaml(read_text(path), path)
            if not isinstance(config, dict) or not isinstance(config.get("objective"), dict):
                raise UserError(f"{path}: is no student's configuration")
            found.add(read(build_config(GeoConfig, config["objective"].get("geo") or {}, source=str(path))))
    return found.pop() if len(found) == 1 else None


def prototypes(report: Report) -> str:
    # a PNG's width stands in bytes 16 to 19; shown at 96 pixels an inch instead of the 150 it was drawn with
    widths = {caption: int.from_bytes(image[16:20], "big") * 96 // 150 for caption, image in report.extra.items()}
    return "".join(html.figure(image, "png", text, width=widths[text]) for text, image in report.extra.items())


def other_datasets(report: Report) -> str:
    if not report.others:
        return ""
    content = (
        "<p>8-way: every class can be predicted, absent ones have no part in the averages. Present-only: predictions "
        "are restricted to the classes that the dataset has.</p>"
    )
    for block in xval_table(report.others)["blocks"]:
        caption = f"{block['dataset']}, {PROTOCOL_TITLES[block['protocol']]}, n = {block['n']}"
        if block["absent"]:
            caption += f", without {', '.join(block['absent'])}"
        content += _metrics_table(block["rows"], caption)
    first_seeds = {(r.dataset, r.variant): r for r in reversed(report.others)}
    folders = [*report.runs, *(r.folder.name for r in first_seeds.values())]
    pictures = ""
    for r in reversed(first_seeds.values()):
        # B0/ck and B3/ck are two pictures, and a folder called B3 is not the run's own
        name = r.folder.name if folders.count(r.folder.name) == 1 else f"{r.folder.name}_{r.variant}_{r.dataset}"
        pictures += _confusions(report, r, f"confusion_{name}")
    return content + html.details("Confusion matrices", f'<div class="row">{pictures}</div>')


def provenance(report: Report) -> str:
    made_by: dict[tuple[str, str, str], list[str]] = {}
    tables = ""
    for r in report.every:
        fingerprint = r.fingerprint
        if fingerprint is None:
            continue
        environment = fingerprint.get("environment", {})
        software = f"ngd_fast {environment.get('ngd_fast', '?')}, torch {environment.get('torch', '?')}"
        device = ", ".join(environment.get("devices") or ["CPU"])
        made_by.setdefault((software, device, _short(fingerprint.get("commit"))), []).append(r.run)
        sums = [
            [escape(name), f"<code>{escape(entry['sha256'])}</code>"] for name, entry in fingerprint["files"].items()
        ]
        tables += html.table(["File", "SHA-256"], sums, caption=r.run)
    if not made_by:
        return ""
    rows = [
        [escape(software), escape(device), f"<code>{escape(commit)}</code>", escape(", ".join(dict.fromkeys(runs)))]
        for (software, device, commit), runs in made_by.items()
    ]
    text = "<p><code>ngd-fast verify</code> checks these sums and derives every metric and table again.</p>"
    return text + html.table(["Software", "Device", "Commit", "Runs"], rows) + html.details("Checksums", tables)


def _short(commit: str | None) -> str:
    """The commit's first twelve digits, and whether the sources differed from it."""
    digits, dash, dirty = (commit or "none").partition("-")
    return digits[:12] + dash + dirty


def responsible_use(report: Report) -> str:
    results = report.every
    last = next(reversed(report.shown().values()), None)
    fingerprint = (last.fingerprint if last else None) or {}
    items = checklist(results, fingerprint, [r for group in report.runs.values() for r in group if r is not last])
    lines = "".join(f'<li class="{"yes" if done else "no"}">{escape(item)}</li>' for done, item in items)
    uses = "".join(f"<li>{escape(use)}</li>" for use in PROHIBITED)
    return f'<ul class="check">{lines}</ul><h3>Prohibited</h3><ul>{uses}</ul>'
