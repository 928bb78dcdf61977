"""A model card: what a student was trained on, how well it does, and what it must not be used for.

Every number comes from the run's own files; an item of the paper's responsible-use checklist is ticked only where the
given files show that it was done.
"""

from collections.abc import Sequence

from ngd_fast.artifacts.fingerprint import FINGERPRINT_NAME
from ngd_fast.evaluation.calibration import SCORES
from ngd_fast.evaluation.latex import PROTOCOL_TITLES, TITLES, percent
from ngd_fast.evaluation.metrics import PROTOCOLS, classes_of
from ngd_fast.evaluation.results import Result
from ngd_fast.evaluation.slices import SLICE_METRICS, SMALL

PROHIBITED = (
    "Diagnosis, screening or any other clinical decision: neither the student nor the EEG behind its prototypes "
    "measures health.",
    "Identifying or tracking people, surveillance, or inferring protected traits.",
    "Decisions about hiring, education, credit, insurance, policing or migration.",
    "Use on people who have not agreed to it, or claims about what a person truly feels: it classifies "
    "how a face looks.",
)
TERMS = (
    ("FER2013 / FERPlus", "images: research use (Kaggle challenge terms); FER+ labels: MIT"),
    ("DREAMER, MAHNOB-HCI", "on request from their owners, for research, not to be passed on"),
    ("GAMEEMO", "CC BY 4.0"),
    ("AffectNet, CK+", "on request from their owners, for research"),
)


def model_card(run: Result, others: Sequence[Result] = ()) -> str:
    """Markdown for the run ``run``; ``others`` are its evaluations on other datasets and runs to compare it with."""
    fingerprint = run.fingerprint or {}
    mine = [run, *(r for r in others if r.student == run.student and not r.path.samefile(run.path))]
    compared = [r for r in others if r.student != run.student]
    parts = [
        f"# Model card: {_plain(run.run)}\n",
        f"A facial-expression student (variant {_plain(run.variant)}, seed {run.seed}) of NeuroGaze-Distill (arXiv "
        "2509.11916), made with ngd_fast. It takes a cropped face and gives probabilities of "
        f"{len(run.blocks['eight_way']['confusion'])} expression classes.\n",
        _training(run, fingerprint),
        _metrics(mine),
        _calibration(run),
        _robustness(mine),
        _groups(mine),
    ]
    if compared:
        parts.append(_comparison(run, compared))
    parts += [_data(fingerprint), _responsible_use(mine, fingerprint, compared)]
    return "\n".join(part for part in parts if part)


def _training(run: Result, fingerprint: dict) -> str:
    lines = ["## Training\n"]
    on = [name for name, value in fingerprint.get("switches", {}).items() if value]
    if on:
        weights = fingerprint.get("weights", {})
        terms = [_plain(name) + (f" ({weights[name]:g})" if name in weights else "") for name in on]
        lines.append(f"- Terms of the objective (weight): {', '.join(terms)}")
    config = run.data.get("config", {})
    if {"arch", "image_size", "epochs", "batch_size", "lr", "precision"} <= config.keys():
        lines.append(
            f"- Setting: {_plain(config['arch'])} at {config['image_size']} px, {config['epochs']} epochs, batches of "
            f"{config['batch_size']}, learning rate {config['lr']:g}, {_plain(config['precision'])}"
        )
    if "best_epoch" in run.data:
        lines.append(f"- Chosen: epoch {run.data['best_epoch']}, on the validation split of {_plain(run.dataset)}")
    environment = fingerprint.get("environment", {})
    if environment:
        devices = ", ".join(environment.get("devices") or ["CPU"])
        made = f"torch {environment.get('torch')} on {devices}; commit {fingerprint.get('commit')}"
        lines.append(f"- Made with {_plain(made)}")
    for name, entry in fingerprint.get("files", {}).items():
        lines.append(f"- {_plain(name)}: SHA-256 `{_plain(entry['sha256'])}`")
    if len(lines) == 1:
        lines.append("The run kept no fingerprint.")
    return "\n".join(lines) + "\n"


def _metrics(results: Sequence[Result]) -> str:
    head = ["Dataset", "Protocol", "n", *TITLES.values()]
    intervals = any("ci" in block for result in results for block in result.blocks.values())
    unit = "In %; brackets are 95 % stratified bootstrap intervals.\n" if intervals else "In %.\n"
    lines = ["## Metrics\n", unit, *_header(head)]
    for result in results:
        for protocol, block in result.blocks.items():
            cells = [_plain(result.dataset), PROTOCOL_TITLES[protocol], str(block["n"])]
            for name in TITLES:
                interval = block.get("ci", {}).get(name)
                shown = f" [{percent(interval[0], 1)}, {percent(interval[1], 1)}]" if interval else ""
                cells.append(percent(block[name]) + shown if name in block else "")
            lines.append(_row(cells))
    block = results[0].blocks["eight_way"]
    lines.append(f"\nBy class, on {_plain(results[0].dataset)} (8-way):\n")
    lines += _header(["Class", "n", "Precision", "Recall", "F1"])
    for name, rates in classes_of(block):
        interval = rates.get("ci", {}).get("f1")
        shown = f" [{percent(interval[0], 1)}, {percent(interval[1], 1)}]" if interval else ""
        values = [
            str(rates["support"]),
            percent(rates["precision"]),
            percent(rates["recall"]),
            percent(rates["f1"]) + shown,
        ]
        lines.append(_row([_plain(name), *values]))
    for name in block.get("absent", ()):
        lines.append(_row([_plain(name), "0", "", "", ""]))
    return "\n".join(lines) + "\n"


def _calibration(run: Result) -> str:
    fitted = run.calibration
    if fitted is None:
        return ""
    lines = ["## Calibration\n", f"By {_plain(fitted['method'])} on {_plain(run.dataset)}; after: cross-fitted.\n"]
    lines += _header(["", "NLL", "Brier", "ECE", "Classwise ECE"])
    lines += [_row([when, *(f"{fitted[when][name]:.4f}" for name in SCORES)]) for when in ("before", "after")]
    return "\n".join(lines) + "\n"


def _robustness(results: Sequence[Result]) -> str:
    lines = []
    for r in results:
        if not r.corruptions:
            continue
        lines += [f"\nOn {_plain(r.dataset)}, clean {percent(r.corruptions['clean']['accuracy'])}:\n"]
        lines += _header(["Corruption", *(f"Severity {k}" for k in range(1, 6))])
        for name, values in r.corruptions["corruptions"].items():
            lines.append(_row([_plain(name.replace("_", " ")), *(percent(v, 1) for v in values["accuracy"])]))
        versus = r.corruptions.get("versus")
        if versus:
            lines.append(f"\nMean corruption error over {_plain(versus['run'])}: {versus['mce']:.1f} %.")
    return "\n".join(["## Under corruptions: accuracy in %", *lines]) + "\n" if lines else ""


def _groups(results: Sequence[Result]) -> str:
    lines = []
    for r in results:
        for column, made in (r.slices or {}).items():
            lines += [f"\nBy {_plain(column)} on {_plain(r.dataset)} (8-way; * under {SMALL} faces):\n"]
            lines += _header([_plain(column), "n", *(TITLES[name] for name in SLICE_METRICS)])
            for group, entry in made["groups"].items():
                cells = []
                for name in SLICE_METRICS:
                    interval = entry.get("ci", {}).get(name)
                    shown = f" [{percent(interval[0], 1)}, {percent(interval[1], 1)}]" if interval else ""
                    cells.append(percent(entry[name]) + shown)
                lines.append(_row([_plain(group), f"{entry['n']}{'*' if entry['small'] else ''}", *cells]))
            gap = made["gaps"].get("macro_f1")
            if gap:
                interval = f" [{', '.join(f'{100 * v:.1f}' for v in gap['ci'])}]" if "ci" in gap else ""
                groups = f"{_plain(gap['worst'])} behind {_plain(gap['best'])}"
                lines.append(f"\nGap in macro-F1: {100 * gap['difference']:.1f}{interval} points, {groups}.")
    return "\n".join(["## Groups of faces, in %", *lines]) + "\n" if lines else ""


def _comparison(run: Result, others: Sequence[Result]) -> str:
    head = ["Run", "Variant", "Dataset", "Protocol", *TITLES.values()]
    lines = ["## Compared with\n", "Where a dataset has every class the protocols are one.\n", *_header(head)]
    for result in [run, *others]:
        for protocol, block in result.blocks.items():
            if protocol != PROTOCOLS[0] and not block.get("absent"):
                continue
            cells = [*map(_plain, (result.run, result.variant, result.dataset)), PROTOCOL_TITLES[protocol]]
            lines.append(_row([*cells, *(percent(block[name]) if name in block else "" for name in TITLES)]))
    return "\n".join(lines) + "\n"


def _data(fingerprint: dict) -> str:
    lines = ["## Data and terms\n", "The weights carry the terms of what they were trained on:\n"]
    lines += [f"- {name}: {terms}" for name, terms in TERMS]
    sums = [
        f"{_plain(name)} `{_plain(entry['sha256'][:12])}`"
        for name, entry in fingerprint.get("files", {}).items()
        if "data" in name
    ]
    if sums:
        lines.append(f"\nThis run's files: {', '.join(sums)} (whole sums above and in {FINGERPRINT_NAME}).")
    return "\n".join(lines) + "\n"


def checklist(results: Sequence[Result], fingerprint: dict, compared: Sequence[Result]) -> list[tuple[bool, str]]:
    """The paper's responsible-use checklist: (shown by the given files, item)."""
    with_geo = bool(fingerprint.get("switches", {}).get("d_geo"))
    opposite = [
        r for r in compared if r.fingerprint and bool(r.fingerprint.get("switches", {}).get("d_geo")) != with_geo
    ]
    both = all(set(PROTOCOL_TITLES) <= set(r.blocks) for r in results)
    intervals = all("ci" in block for r in results for block in r.blocks.values())
    versus = f" (against {', '.join(sorted({r.variant for r in opposite}))})" if opposite else ""
    return [
        (True, "Non-diagnostic: stated here, with the uses that are prohibited"),
        (both, "Both protocols reported: 8-way and present-only"),
        (bool(opposite), f"Reported with and without D-Geo{versus}"),
        (intervals, "Uncertainty reported: bootstrap intervals"),
        (bool(fingerprint.get("files")), "Checksums of configuration, data, prototypes and weights kept"),
    ]


def _responsible_use(results: Sequence[Result], fingerprint: dict, compared: Sequence[Result]) -> str:
    lines = ["## Responsible use\n"]
    lines += [f"- [{'x' if done else ' '}] {_plain(item)}" for done, item in checklist(results, fingerprint, compared)]
    lines += ["\nProhibited:\n", *(f"- {use}" for use in PROHIBITED)]
    audit = "; groups other than those above have not been audited"
    if not any(r.slices for r in results):
        audit = "; no audit by age, sex or skin colour has been made"
    lines += [
        "\nKnown limits: labels are what most raters saw, and raters often disagree; classes with few faces (in "
        "FERPlus disgust, fear and contempt) have wide intervals; FERPlus holds grey 48-pixel faces from the web, "
        f"and other cameras differ{audit}.",
    ]
    return "\n".join(lines) + "\n"


def _header(cells: Sequence[str]) -> list[str]:
    return [_row(cells), _row(["---"] * len(cells))]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_PLAIN = str.maketrans({**{c: f"\\{c}" for c in "\\`*[]|"}, "<": "&lt;", "&": "&amp;"})


def _plain(text: object) -> str:
    """Text of a user (a group's name, a run's) that shall not become Markdown or HTML."""
    return " ".join(str(text).translate(_PLAIN).split())
