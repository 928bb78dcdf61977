"""Studies as one HTML page, in the form of ``ngd-fast report``."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ngd_fast.artifacts import html
from ngd_fast.artifacts.files import read_json, write_text
from ngd_fast.errors import UserError
from ngd_fast.flows.figures import CAPTIONS
from ngd_fast.flows.study import table_of

_INTRODUCTION = (
    "<p>Representation learning as a coupled slow-fast system: particles make local moves on a manifold, weights "
    "follow them (after the abstract of arXiv 2604.16801; the constructions are this package's own). Every number is "
    "read from the studies' metrics.json.</p>"
)
_CONDITIONAL = (
    "<p>Principal directions separate classes only where what tells classes apart is also what varies most: with a "
    "strong nuisance axis they do not, and rings stay inseparable for any linear map.</p>"
)


def write_report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write one self-contained page about the studies in ``folders`` to ``out``; UserError for a folder without one."""
    studies = [_read(Path(folder)) for folder in folders]
    sections = [
        (f"study{i}", f"{folder.name}: {metrics['manifold']}", _section(folder, metrics))
        for i, (folder, metrics) in enumerate(studies)
    ]
    write_text(out, html.page("Coupled flows", _INTRODUCTION, sections))
    return Path(out)


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder}: holds no metrics.json; is it the --out of a finished ngd-fast flows study?")
    metrics = read_json(folder / "metrics.json")
    if not isinstance(metrics, dict) or metrics.get("study") != "coupled flows":
        raise UserError(f"{folder}: is the run of another command, wanted an --out of ngd-fast flows study")
    return folder, metrics


def _section(folder: Path, metrics: Mapping[str, Any]) -> str:
    exact = metrics["learned"]["exact"]
    limit = metrics["moves"]
    facts = [(f"{limit[rule]['semigroup_slope']:.2f}", f"order of {rule}'s moves") for rule in limit]
    error = max(row["largest_relative_error"] for row in metrics["lyapunov"].values())
    facts += [(f"{100 * error:.2f} %", "largest error of dF/dt"), (f"{exact['seconds']:.3f} s", "exact eigh")]
    content = html.facts(facts) + _figure(folder, "particles")
    content += "<h3>What the rules found</h3><p>For points that are stored, eigh is exact and faster.</p>"
    content += html.table(*table_of(metrics)) + _figure(folder, "learning")
    for heading, name in (("The limit", "limit"), ("Singular values", "collapse"), ("Joint functional", "energy")):
        content += f"<h3>{heading}</h3>{_figure(folder, name)}"
    content += f"<h3>When features separate</h3>{_CONDITIONAL}{_figure(folder, 'separability')}"
    commit, environment = metrics["commit"] or "none", metrics["environment"]
    made = f"seed {metrics['seed']}, commit {commit[:12]}, torch {environment['torch']}"
    return content + f'<p class="soft">{escape(made)}; ngd-fast verify checks the folder.</p>'


def _figure(folder: Path, name: str) -> str:
    path = folder / "viz" / f"{name}.svg"
    if not path.is_file():
        return '<p class="soft">No figure: the study was run without matplotlib.</p>'
    return html.figure(path.read_bytes(), "svg", CAPTIONS[name])
