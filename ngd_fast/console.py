"""What the terminal shows: progress bars and tables. Everything goes to stderr but tables, which are results."""

import sys
from collections.abc import Iterable, Sequence

from tqdm import tqdm


def progress(iterable: Iterable | None = None, *, desc: str, total: int | None = None, unit: str = "it", **options):
    """A tqdm bar (``options``: its own). Where stderr is no terminal it prints at most a line every ten seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        unit=unit,
        dynamic_ncols=terminal,
        mininterval=0.1 if terminal else 10.0,
        maxinterval=10.0,
        **options,
    )


def say(message: str) -> None:
    """Print one line to stderr without breaking a bar that is being drawn."""
    tqdm.write(message, file=sys.stderr)


def print_table(columns: Sequence[str], rows: Iterable[Sequence], *, title: str | None = None) -> None:
    """Print rows to stdout; the first column is left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    # Piped output keeps whole cells instead of being folded to rich's default of 80 columns.
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False).print(table)
