"""LaTeX from the JSON of :mod:`~ngd_fast.evaluation.tables`, and the number formats that all tables share.

The documents that include the tables need ``\\usepackage{booktabs}`` and nothing else. In a document of two columns the
tables span both.
"""

from collections.abc import Mapping, Sequence

TITLES = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro-F1",
    "balanced_accuracy": "bACC",
    "auroc_macro": "AUROC",
    "ece": "ECE",
}
PROTOCOL_TITLES = {"eight_way": "8-way", "present_only": "present-only"}
SWITCH_TITLES = {
    "ce": "CE",
    "kd": "KD",
    "proto": "Proto",
    "proto_kd": "Proto",
    "geo": "D-Geo",
    "d_geo": "D-Geo",
}
SMALLER_IS_BETTER = {"ece"}

_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        # LaTeX's default encoding prints other characters for these
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        # babel's shorthands; what \\ would take for its own where a row begins with it
        '"': r"\symbol{34}",
        "[": "{[}",
        "]": "{]}",
        "*": "{*}",
        "\n": " ",
    }
)


def escape(text: str) -> str:
    """``text`` with LaTeX's special characters made plain."""
    return text.translate(_ESCAPES)


def percent(value: float, digits: int = 2) -> str:
    """A fraction as a percentage without its sign: 0.8306 is "83.06"."""
    return f"{100 * value:.{digits}f}"


def summary_text(summary: Mapping) -> str:
    """A metric's summary as plain text: "83.06 ± 0.31" over seeds, "83.06 [81.8, 84.3]" for one."""
    if "std" in summary:
        return f"{percent(summary['mean'])} ± {percent(summary['std'])}"
    if "ci" in summary:
        return f"{percent(summary['mean'])} [{percent(summary['ci'][0], 1)}, {percent(summary['ci'][1], 1)}]"
    return percent(summary["mean"])


def columns_of(rows: Sequence[Mapping]) -> list[str]:
    """The metrics that every row has, in the tables' order."""
    return [name for name in TITLES if all(name in row for row in rows)]


def switches_of(rows: Sequence[Mapping]) -> list[str]:
    """The switches that are known for every row and not the same in all of them."""
    if not all("switches" in row for row in rows):
        return []
    found = {name for row in rows for name in row["switches"]}
    names = [name for name in SWITCH_TITLES if name in found] + sorted(found - SWITCH_TITLES.keys())
    return [name for name in names if len({row["switches"].get(name) for row in rows}) > 1]


def best_of(rows: Sequence[Mapping], name: str) -> float:
    """The best mean of metric ``name`` among the rows."""
    return (min if name in SMALLER_IS_BETTER else max)(row[name]["mean"] for row in rows if name in row)


def p_value(p: float) -> str:
    """ "0.012", or "< 0.002" style where it is below what three digits show."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def render(table: Mapping) -> str:
    """A complete ``table`` environment. Raises ValueError for a kind of table that is not known."""
    renderers = {"ablation_lite": _ablation, "xval_main": _xval}
    if table.get("kind") not in renderers:
        raise ValueError(f"table kind must be one of {', '.join(renderers)}, is {table.get('kind')!r}")
    return renderers[table["kind"]](table)


def _cell(summary: Mapping, bold: bool) -> str:
    mean = percent(summary["mean"])
    text = rf"\textbf{{{mean}}}" if bold else mean
    if "std" in summary:
        return rf"{text} {{\tiny$\pm${percent(summary['std'])}}}"
    if "ci" in summary:
        low, high = (percent(v, 1) for v in summary["ci"])
        return rf"{text} {{\tiny[{low}, {high}]}}"
    return text


def _metric_cells(row: Mapping, rows: Sequence[Mapping], names: Sequence[str]) -> list[str]:
    return [
        _cell(row[name], len(rows) > 1 and row[name]["mean"] == best_of(rows, name)) if name in row else "--"
        for name in names
    ]


def seeds_text(row: Mapping) -> str:
    """ "1, 2, 3": the seeds behind a row; "-" for one that is not known."""
    return ", ".join("-" if seed is None else str(seed) for seed in row["seeds"])


def _spread_note(rows: Sequence[Mapping]) -> str:
    several = [row for row in rows if len(row["seeds"]) > 1]
    single = [row for row in rows if "ci" in row["accuracy"]]
    notes = []
    if several:
        found, counts = {seeds_text(row) for row in several}, {len(row["seeds"]) for row in several}
        if len(found) == 1 and None not in several[0]["seeds"]:
            seeds = f"seeds {found.pop()}"
        else:
            least, most = min(counts), max(counts)
            seeds = f"{least} seeds" if least == most else f"{least} to {most} seeds"
        notes.append(f"$\\pm$: mean and standard deviation over {seeds}.")
    if single:
        found = {seeds_text(row) for row in single}
        seed = f"seed {found.pop()}" if len(found) == 1 and found != {"-"} else "one seed"
        notes.append(f"Brackets: {seed} and its 95\\% stratified bootstrap interval.")
    return " ".join(notes)


def _table(body: Sequence[str], *, columns: str, caption: str, label: str) -> str:
    lines = [
        "% Written by ngd-fast from the JSON file beside it; edits are found by `ngd-fast verify`.",
        r"\begin{table*}[t]",
        r"\centering\footnotesize\setlength{\tabcolsep}{2.4pt}",
        rf"\caption{{{caption}}}",
        rf"\label{{{label}}}",
        rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
        r"\toprule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _ablation(table: Mapping) -> str:
    rows = table["rows"]
    # the paper's three metrics; with switches and differences there is no room for more in a column
    names, switches = columns_of(rows)[:3], switches_of(rows)
    paired = any("versus_baseline" in row for row in rows)
    head = ["Variant", *(escape(SWITCH_TITLES.get(s, s)) for s in switches), *(TITLES[n] for n in names)]
    if paired:
        head += [r"$\Delta$F1", "$p$"]
    body = [_line(head), r"\midrule"]
    for row in rows:
        cells = [escape(row["variant"])]
        cells += [r"$\bullet$" if row["switches"].get(s) else "" for s in switches]
        cells += _metric_cells(row, rows, names)
        if paired:
            cells += _difference_cells(row.get("versus_baseline"))
        body.append(_line(cells))
    caption = (
        f"Ablation on {escape(table['dataset'])} ({PROTOCOL_TITLES[table['protocol']]}, $n={table['n']}$), in \\%, "
        f"each run at its best epoch on these rows. {_spread_note(rows)}"
    )
    if paired:
        caption += (
            f" $\\Delta$F1: difference of macro-F1 to {escape(table['baseline'])} with its 95\\% interval from a "
            f"paired stratified bootstrap ({table['resamples']} resamples of the rows, the seeds held fixed); $p$ "
            "two-sided, uncorrected."
        )
    columns = "l" + "c" * len(switches) + "r" * (len(head) - 1 - len(switches))
    return _table(body, columns=columns, caption=caption, label="tab:ablation_lite")


def _difference_cells(versus: Mapping | None) -> list[str]:
    if versus is None:
        return ["", ""]
    difference = versus["macro_f1"]
    low, high = (f"{100 * v:+.1f}" for v in difference["ci"])
    text = rf"{100 * difference['difference']:+.2f} {{\tiny[{low}, {high}]}}"
    return [text.replace("+", "$+$").replace("-", "$-$"), p_value(difference["p"]).replace("<", "$<$")]


def _xval(table: Mapping) -> str:
    every = [row for block in table["blocks"] for row in block["rows"]]
    # a dataset of one class has no AUROC: that must not take it from the others
    names = [name for name in TITLES if any(name in row for row in every)]
    body = [_line(["Variant", *(TITLES[n] for n in names)])]
    for block in table["blocks"]:
        title = f"{escape(block['dataset'])}, {PROTOCOL_TITLES[block['protocol']]} ($n={block['n']}$"
        if block["absent"]:
            title += f"; without {escape(', '.join(block['absent']))}"
        body += [r"\midrule", rf"\multicolumn{{{len(names) + 1}}}{{@{{}}l}}{{\emph{{{title})}}}} \\"]
        body += [_line([escape(row["variant"]), *_metric_cells(row, block["rows"], names)]) for row in block["rows"]]
    caption = (
        "Evaluation within and across datasets, in \\%. 8-way: all classes can be predicted; present-only: predictions "
        "restricted to the classes that the dataset has. Students are those of their best epoch on validation, not of "
        f"the last. {_spread_note(every)}"
    )
    return _table(body, columns="l" + "r" * len(names), caption=caption, label="tab:xval_main")
