"""What the subcommands of `prunecast release` share: arguments, and how results are shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from prunecast.cli.console import make_console

__all__ = ["AsJson", "Folder", "Keys", "Name", "show_result"]

Folder = Annotated[Path, typer.Argument(help="Folder of the release repository.")]
Keys = Annotated[
    list[Path],
    typer.Option(
        "--keys", help="Folder with private keys; give it twice if offline keys lie apart."
    ),
]
Name = Annotated[str, typer.Argument(help="Name of the release.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def show_result(result: dict[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    """Print `result` as JSON, or `text()`."""
    if as_json:
        print(json.dumps(result))  # noqa: T201
    else:
        make_console().print(text(), markup=False)
