"""What all subcommands share: options, tables, progress, and errors in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

__all__ = [
    "AsJson",
    "Column",
    "Force",
    "MaxBytes",
    "MaxSeconds",
    "explain",
    "file_progress",
    "is_usage",
    "make_console",
    "print_table",
    "printable",
    "refuse_to_overwrite",
    "say",
    "shape_text",
    "short_dtype",
    "show",
    "warn",
    "warn_of_exposure",
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite the output if it exists.")]
MaxBytes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most bytes that the content of a file may take in memory; default 1 GiB, or 64 times "
        "the file if that is more.",
    ),
]
MaxSeconds = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        help="How long a model from a file may take to be read, quantised and run; default 40, and "
        "one for every megabyte.",
    ),
]

_UNFOLDED = 4096  # columns of a pipe that holds sentences: each stays in one line
_WIDE = 100  # from so many columns on, a terminal has room for everything

_SHORT = {"bool": "bool", "bfloat16": "bf16"}

_EXTRAS = {
    "edge": "edge",
    "federation": "server",
    "fleet": "server",
    "node": "client",
    "release": "server",
    "serve": "server",
    "compress": "files",
    "decompress": "files",
    "inspect": "files",
    "prune": "files",
}
_USAGE = {"ScenarioError", "PolicyError", "StrategyError"}


# -- printing -------------------------------------------------------------------------------------


def make_console(*, stderr: bool = False) -> Console:
    """A console that neither cuts nor colours what goes into a pipe."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = 160
    return console


def show(document: object, as_json: bool = True, text: str = "") -> None:
    """Print a document as one line of JSON, or the text that says the same, at once."""
    print(json.dumps(document) if as_json else text, flush=True)  # noqa: T201


@dataclass(frozen=True)
class Column:
    """One column: its header, whether narrow terminals do without it, and whether it is folded."""

    name: str
    wide_only: bool = False
    long: bool = False


def print_table(
    console: Console,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    total: Sequence[str] = (),
    title: str = "",
) -> None:
    """Print rows; the first column and long ones to the left and folded where they do not fit."""
    chosen = [i for i, c in enumerate(columns) if console.width >= _WIDE or not c.wide_only]
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        pad_edge=False, show_footer=bool(total),
    )  # fmt: skip
    for i in chosen:
        footer = total[i] if total else ""
        if i and not columns[i].long:
            table.add_column(columns[i].name, footer, justify="right", no_wrap=True)
        else:
            table.add_column(columns[i].name, footer, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(row[i])) for i in chosen))
    if any(columns[i].long for i in chosen) and not console.is_terminal:
        console.width = _UNFOLDED
    console.print(table)


def say(*sentences: str) -> None:
    """Print sentences that may hold names from a file: no markup, no control codes."""
    console = make_console()
    for text in sentences:
        console.print(Text(printable(text)), soft_wrap=not console.is_terminal)


def warn(*sentences: str) -> None:
    """Print warnings on standard error, each in a line."""
    for text in sentences:
        typer.echo(f"warning: {printable(text)}", err=True)


def warn_of_exposure(*paths: Path | None) -> None:
    """Say which files with secrets others can read; what is not there is said by who reads it."""
    from prunecast.common.files import exposure

    for path in paths:
        with suppress(OSError):
            if path is not None and (exposed := exposure(path)):
                warn(exposed)


def printable(text: str) -> str:
    """Replace what is not printable (escape sequences, say) by its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shape_text(shape: Sequence[int]) -> str:
    """``64×32×5×5``; a scalar is ``–``."""
    return "×".join(map(str, shape)) or "–"


def short_dtype(dtype: str) -> str:
    """``f32`` for ``float32``."""
    kind = "f" if dtype.startswith("float") else dtype[0]
    return _SHORT.get(dtype, kind + dtype.lstrip("abcdefghijklmnopqrstuvwxyz"))


@contextmanager
def file_progress() -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on a terminal while work on a file goes on; nothing stays behind."""
    console = make_console(stderr=True)
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


def refuse_to_overwrite(path: Path, force: bool) -> None:
    """A usage error where a file would be lost.

    Raises:
        typer.BadParameter: it is there, and `force` is not given.
    """
    if path.exists() and not force:
        raise typer.BadParameter(f"{path} exists: give --force to overwrite it")


# -- errors ---------------------------------------------------------------------------------------


def is_usage(error: BaseException) -> bool:
    """Whether the caller gave something wrong, rather than something going wrong."""
    return type(error).__name__ in _USAGE and type(error).__module__.startswith("prunecast.")


def explain(error: BaseException, command: str | None) -> str:
    """One line: what went wrong and what to do.

    Args:
        error: what a subcommand raised.
        command: name of the subcommand.
    """
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("prunecast"):
        extra = _EXTRAS.get(command or "", "sim")
        if extra == "edge" and (error.name or "").partition(".")[0] in ("grpc", "google"):
            extra = "edge-fleet"
        return f"{error.name} is not installed: pip install 'prunecast[{extra}]'"
    if type(error).__module__.startswith("prunecast."):
        return text
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or text}"
    return f"{type(error).__name__}: {text} (run with prunecast --debug for the traceback)"
