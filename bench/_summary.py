"""What gpu-check prints last."""


def table(report: dict) -> list[str]:
    """The table that ends the output, in Markdown: a line for each of ``rows`` that a reader wants, then the tests."""
    lines = ["| what | switches | us | images/s | GB/s | share of copy | more |", "|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        if row.get("part") == "tests":
            continue
        switches = " ".join(f"{name}={value}" for name, value in row.get("switches", {}).items())
        us = row.get("us", row["ms"] * 1e3 if "ms" in row else None)
        share = f"{row['share of copy']:.0%}" if row.get("share of copy") else ""
        cells = [_what(row), switches, _number(us), _number(row.get("images/s"), 0), _number(row.get("GB/s")), share]
        lines.append(f"| {' | '.join([*cells, _more(row)])} |")
    for title, counts in report.get("tests", {}).items():
        failed = counts["failures"] + counts["errors"]
        result = f"{counts['passed']} passed, {failed} failed, {counts['skipped']} skipped"
        reasons = "; ".join(f"{count}: {reason}" for reason, count in counts["skipped because"].items() if reason)
        lines.append(f"| {title} | | | | | | {result} in {counts['seconds']:.0f} s{reasons and ': ' + reasons} |")
    return lines


def _number(value, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _what(row: dict) -> str:
    """What a row measures, in words."""
    if row.get("bench") == "objective" and "us" in row:
        graph = ", graph" if row["graph"] else ""
        return f"objective, forward + backward, B={row['B']:,} {row['dtype']}, {row['implementation']}{graph}"
    if row.get("bench") == "stem" and "us" in row:
        return f"stem, forward + backward, {row['implementation']}{', graph' if row['graph'] else ''}"
    if "kernel" in row:
        return f"{row['variant']}, {row['implementation']}: {row['kernel'][:60]}".replace("|", "/")
    if row.get("bench") == "train" and "feed" in row:
        return f"training {row['variant']}, {row['implementation']}, faces: {row['feed']}"
    return row["title"]


def _more(row: dict) -> str:
    """What else a row says: an error, or the numbers that have no column."""
    if "error" in row:
        return f"error: {row['error']}".replace("|", "/")
    if row.get("bench") in ("ncu", "device"):
        values = row.get("clocks") if row["bench"] == "device" else row
        skip = ("part", "title", "bench", "switches")
        return ", ".join(f"{k} {v}" for k, v in values.items() if k not in skip) if isinstance(values, dict) else ""
    names = {
        "us cold": "us with a cold L2",
        "extra MB": "MB extra",
        "waiting %": "% waiting",
        "share %": "% of the step",
    }
    names |= {"launches": "launches"}
    return ", ".join(f"{row[key]:,.2f} {unit}" for key, unit in names.items() if row.get(key) is not None)
