"""What gpu-check prints last."""


def table(report: dict) -> list[str]:
    """The short table that ends the output, in Markdown."""
    lines = ["| objective, forward + backward | B | eager us | graph us | graph, cold L2, us | GB/s | extra MB |"]
    lines.append("|---|---|---|---|---|---|---|")
    rows = [row for row in report["benches"].get("objective", []) if row["what"] == "both"]
    for plain in (row for row in rows if not row["graph"]):
        key = ("B", "dtype", "implementation")
        graph = next((row for row in rows if row["graph"] and all(row[k] == plain[k] for k in key)), {})
        cells = [f"{plain['us']:,.1f}"]
        for row, name in ((graph, "us"), (graph, "us cold"), (graph, "GB/s"), (plain, "extra MB")):
            cells.append(f"{row[name]:,.1f}" if row.get(name) is not None else "")
        lines.append(f"| {plain['implementation']} {plain['dtype']} | {plain['B']:,} | {' | '.join(cells)} |")
    for row in report["benches"].get("step", []):
        lines.append(
            f"| step {row['variant']}, {row['implementation']} | {row['batch']} | {row['ms']:,.2f} ms "
            f"| {row['images/s']:,.0f} images/s | | | |"
        )
    for row in report["benches"].get("stem", []):
        name = f"stem, forward + backward, {row['implementation']}{', graph' if row['graph'] else ''}"
        lines.append(f"| {name} | {row['batch']} | {row['us']:,.1f} us | | | {row['GB/s']:,.1f} | |")
    for row in report["benches"].get("train", []):
        waiting = "" if row["waiting %"] is None else f"waiting {row['waiting %']:.2f} %"
        name = f"training {row['variant']}, {row['implementation']}, faces: {row['feed']}"
        lines.append(f"| {name} | {row['batch']} | {waiting} | {row['images/s']:,.0f} images/s | | | |")
    for row in report["benches"].get("feeds", []):
        lines.append(f"| feed {row['feed']} alone | {row['batch']} | | {row['images/s']:,.0f} images/s | | | |")
    for title, counts in report["tests"].items():
        failed = counts["failures"] + counts["errors"]
        result = f"{counts['passed']} passed, {failed} failed, {counts['skipped']} skipped"
        lines.append(f"| {title} | | {result} in {counts['seconds']:.0f} s | | | | |")
    return lines
