"""What the commands of `prunecast fleet` share: options, the service, tables."""

from __future__ import annotations

import getpass
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.console import Column, make_console, print_json, print_table, say

if TYPE_CHECKING:
    from prunecast.server.fleet.events import AnyEvent
    from prunecast.server.fleet.service import FleetService

__all__ = [
    "DEFAULT",
    "AfterDevice",
    "Database",
    "DeviceName",
    "GroupName",
    "Limit",
    "OneDevice",
    "OneGroup",
    "Reason",
    "RolloutName",
    "actor",
    "operate",
    "repository_of",
    "service_of",
    "show_document",
    "show_rows",
    "stamp",
]

Database = Annotated[
    str,
    typer.Option(
        envvar="PRUNECAST_FLEET",
        help="Database: sqlite:///fleet.db or postgresql://user@host/name.",
    ),
]
DeviceName = Annotated[str, typer.Argument(help="Name of the device.")]
GroupName = Annotated[str, typer.Argument(help="Name of the group.")]
RolloutName = Annotated[str, typer.Argument(help="Name of the rollout.")]
Reason = Annotated[str, typer.Option(help="For the audit log.")]
OneDevice = Annotated[str | None, typer.Option("--device", help="A single device.")]
OneGroup = Annotated[str | None, typer.Option("--group", help="All devices of a group.")]
AfterDevice = Annotated[
    str | None, typer.Option("--after", help="Begin after this device: the last one shown before.")
]
Limit = Annotated[int | None, typer.Option(help="How many at most; default all.", min=1)]

DEFAULT = "sqlite:///fleet.db"


def service_of(database: str) -> FleetService:
    """The service, with the live releases of the repository that `init` was given."""
    from prunecast.server.fleet.model import Release
    from prunecast.server.fleet.service import FleetService
    from prunecast.server.repository import RepositoryReader

    live: list[Release] = []
    service = FleetService(database, lambda: live)
    try:
        found = RepositoryReader(repository_of(service, database)).releases()
        live += [Release(e.name, e.version) for e in found]
    except BaseException:
        service.close()
        raise
    return service


def actor() -> str:
    """Who calls, for the audit log."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "operator"


def repository_of(service: FleetService, database: str) -> Path:
    """The repository that `init` was given.

    Raises:
        FleetError: none was.
    """
    from prunecast.server.fleet.errors import FleetError

    folder = service.settings().get("repository")
    if folder is None:
        raise FleetError(f"{database} names no release repository: make it with --repository")
    return Path(folder)


def stamp() -> dict[str, Any]:
    """When and by whom, as every event says."""
    return {"at": time.time(), "actor": actor()}


def operate(database: str, event: AnyEvent) -> None:
    """Apply what an operator wants."""
    with service_of(database) as service:
        service.operate(event)


def show_rows(rows: list[dict[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Print rows as a table with some columns, or all of them as JSON."""
    if as_json:
        print_json(rows)
        return
    texts = [[_text(row[name]) for name in columns] for row in rows]
    print_table(make_console(), [Column(name.replace("_", " ")) for name in columns], texts)


def show_document(document: Mapping[str, Any], width: int) -> None:
    """Print one thing, a line for each of its properties."""
    say(*(f"{key:<{width}} {_text(value)}" for key, value in document.items()))


def _text(value: object) -> str:
    if value is None or value == "" or value == []:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:g}"
    return str(value)
