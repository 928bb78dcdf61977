"""The few pieces of HTML that the report is made of. One file, no scripts, nothing fetched."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { --ink: #1f2933; --soft: #5f6c7b; --line: #d9dee4; --mark: #0072b2; --best: #e8f3ec; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink); }
header { padding: 2.2rem 1.5rem 1.2rem; border-bottom: 1px solid var(--line); background: #f7f9fb; }
header > div, main { max-width: 1200px; margin-left: auto; margin-right: auto; }
main { padding: 0 0 4rem; }
@media (max-width: 1250px) { main { padding: 0 1.5rem 4rem; } }
h1 { margin-top: 0; margin-bottom: .3rem; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2.6rem 0 .6rem; font-size: 1.3rem; padding-top: .4rem; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1.02rem; }
p { margin: .4rem 0 .9rem; max-width: 78ch; }
.soft, figcaption, caption { color: var(--soft); font-size: .88rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: .9rem; font-size: .92rem; }
a { color: var(--mark); text-decoration: none; } a:hover { text-decoration: underline; }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin-top: 1rem; }
.facts div { min-width: 8rem; } .facts b { display: block; font-size: 1.25rem; line-height: 1.3; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0 1.2rem; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .35rem; }
th, td { padding: .32rem .55rem; text-align: right; border-bottom: 1px solid var(--line); }
th, td { vertical-align: top; white-space: nowrap; }
td:last-child { white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; }
td.best { background: var(--best); font-weight: 600; }
td small { color: var(--soft); font-weight: 400; }
figure { margin: .8rem 0 1.6rem; } figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { margin-top: .35rem; max-width: 88ch; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; } .row figure { flex: 1 1 430px; }
details { margin: .5rem 0 1rem; } summary { cursor: pointer; color: var(--mark); }
code { font-size: .84em; overflow-wrap: anywhere; } td code { white-space: normal; }
ul.check { list-style: none; padding: 0; } ul.check li { margin: .25rem 0; }
.yes::before { content: "\\2713\\00a0\\00a0"; color: #1b7f4d; font-weight: 700; }
.no::before { content: "\\2013\\00a0\\00a0"; color: #b0561d; font-weight: 700; }
@media print { nav { display: none; } h2 { break-after: avoid; } figure, table { break-inside: avoid; } }
"""


def page(title: str, header: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page; ``sections`` are (id, heading, HTML), listed in the navigation."""
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(heading)}</h2>{html}</section>' for key, heading, html in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><header><div><h1>{escape(title)}</h1>{header}<nav>{links}</nav></div></header><main>{body}</main></body></html>\n"
    )


class Best(str):
    """A table's cell with the best value of its column."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> str:
    """A table whose cells are HTML already; those that are :class:`Best` are marked as the best of their column."""
    html = f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>'
    html += "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr></thead><tbody>"
    for row in rows:
        cells = (f'<td{" class=best" * isinstance(c, Best)}>{c}</td>' for c in row)
        html += f"<tr>{''.join(cells)}</tr>"
    return html + "</tbody></table></div>"


def figure(image: bytes, kind: str, caption: str, *, width: int | None = None) -> str:
    """An image ("svg" or "png") inside the page, with what it shows (plain text) below; ``width`` in CSS pixels."""
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    data = base64.b64encode(image).decode("ascii")
    size = f' width="{width}"' if width else ""
    text = escape(caption)
    return f'<figure><img src="data:{mime};base64,{data}" alt="{text}"{size}><figcaption>{text}</figcaption></figure>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Large values with small labels: (value, label)."""
    cells = "".join(
        f'<div><b>{escape(value)}</b><span class="soft">{escape(label)}</span></div>' for value, label in pairs
    )
    return f'<div class="facts">{cells}</div>'


def details(summary: str, html: str) -> str:
    """``html`` folded away below a line of text."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"
