"""How every figure looks and is written: one palette that colour-blind readers can tell apart, bytes that repeat."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

from ngd_fast.artifacts.files import atomic_path
from ngd_fast.errors import UserError

# Okabe & Ito (2008), grey first for the baseline; yellow is too faint for lines on white and comes last.
PALETTE = ("#4d4d4d", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B8A900")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))
WIDTH = 9.0
"""Inches of a figure that spans a page: across a paper's two columns (7 inches) its letters still have 6 points."""
SHADES = "Blues"
"""One hue whose lightness alone carries the value."""

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "path",
    # matplotlib names SVG elements by a hash of this and their content instead of by chance
    "svg.hashsalt": "ngd_fast",
    "pdf.fonttype": 42,
    # names of classes and runs are no formulas, and none of them is run as a program of TeX
    "text.usetex": False,
    "text.parse_math": False,
}
# Without these, files would hold the time and the version that wrote them.
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}


@contextlib.contextmanager
def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """Yield (figure, axes [rows, columns]) of ``width`` x ``height`` inches in our style, without a display.

    Raises UserError where matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'ngd-fast[viz]'") from None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)


def has_matplotlib() -> bool:
    """Whether figures can be drawn here."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def render(figure, kind: str, dpi: int = 150) -> bytes:
    """The figure as "png", "svg" or "pdf"; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        if figure.get_layout_engine() is not None:
            # the layout costs more than the drawing: once is enough for all kinds
            figure.draw_without_rendering()
            figure.set_layout_engine(None)
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=_METADATA[kind])
    return buffer.getvalue()


def save_figure(figure, stem: str | Path, kinds: Sequence[str] = ("pdf", "svg", "png")) -> list[Path]:
    """Write ``stem``.pdf, .svg and .png and return their paths."""
    paths = []
    for kind in kinds:
        path = Path(f"{stem}.{kind}")
        with atomic_path(path) as temporary:
            temporary.write_bytes(render(figure, kind))
        paths.append(path)
    return paths


def color_of(index: int) -> str:
    """The palette's colour for the index-th thing; it starts again after eight."""
    return PALETTE[index % len(PALETTE)]
