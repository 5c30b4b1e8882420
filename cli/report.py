"""`prunecast report`: render a run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prunecast.cli.simulate import AsJson

__all__ = ["report"]


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run, such as runs/<time>.")],
    as_json: AsJson = False,
) -> None:
    """Print a run's tables and draw its picture and page again, from result.json."""
    from prunecast.cli.simulate import show
    from prunecast.simulations.report import write_report
    from prunecast.simulations.runner.result import read_result

    result = read_result(folder)
    figure, page = write_report(folder, result)
    if as_json:
        files = {"folder": str(folder), "figure": str(figure), "page": str(page)}
        typer.echo(json.dumps({**files, **result}))
    else:
        show(folder, result)
