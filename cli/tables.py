"""Tables of tensors, and the progress of work on files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

__all__ = [
    "Column",
    "file_progress",
    "print_table",
    "printable",
    "say",
    "shape_text",
    "short_dtype",
]

WIDE = 100
"""From so many columns on, a terminal has room for everything."""

_SHORT = {"bool": "bool", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Column:
    """One column: its header, and whether narrow terminals do without it."""

    name: str
    wide_only: bool = False


def print_table(
    console: Console,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    total: Sequence[str] = (),
    title: str = "",
) -> None:
    """Print rows, the first column to the left and folded where it does not fit."""
    chosen = [i for i, c in enumerate(columns) if console.width >= WIDE or not c.wide_only]
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        pad_edge=False, show_footer=bool(total),
    )  # fmt: skip
    for i in chosen:
        footer = total[i] if total else ""
        if i:
            table.add_column(columns[i].name, footer, justify="right", no_wrap=True)
        else:
            table.add_column(columns[i].name, footer, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(row[i])) for i in chosen))
    console.print(table)


def say(console: Console, text: str) -> None:
    """Print a sentence that may hold names from a file: no markup, no control codes."""
    console.print(Text(printable(text)))


def printable(text: str) -> str:
    """Replace what is not printable (escape sequences, say) by its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shape_text(shape: Sequence[int]) -> str:
    """``64×32×5×5``; a scalar is ``–``."""
    return "×".join(map(str, shape)) or "–"


def short_dtype(dtype: str) -> str:
    """``f32`` for ``float32``."""
    if dtype in _SHORT:
        return _SHORT[dtype]
    kind = "f" if dtype.startswith("float") else dtype[0]
    return kind + dtype.lstrip("abcdefghijklmnopqrstuvwxyz")


@contextmanager
def file_progress(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on a terminal while work on a file goes on; nothing stays behind."""
    bars = Progress(
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bars:
        task = bars.add_task("", total=None)

        def update(done: int, total: int, what: str) -> None:
            bars.update(task, completed=done, total=max(total, 1), description=printable(what))

        yield update
