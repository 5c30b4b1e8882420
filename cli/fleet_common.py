"""What the commands of `prunecast fleet` share: options, the service, tables."""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.console import make_console
from prunecast.cli.tables import Column, print_table

if TYPE_CHECKING:
    from prunecast.server.fleet.machine import AnyEvent
    from prunecast.server.fleet.model import Device
    from prunecast.server.fleet.service import FleetService

__all__ = [
    "DEFAULT",
    "AsJson",
    "Database",
    "DeviceName",
    "GroupName",
    "OneDevice",
    "OneGroup",
    "Reason",
    "RolloutName",
    "actor",
    "device_row",
    "operate",
    "service_of",
    "show_rows",
    "text_of",
    "when",
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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DEFAULT = "sqlite:///fleet.db"


def service_of(database: str) -> FleetService:
    """The service, with the live releases of the repository that `init` was given."""
    from prunecast.server.fleet.errors import FleetError
    from prunecast.server.fleet.model import Release
    from prunecast.server.fleet.service import FleetService
    from prunecast.server.repository import RepositoryReader

    live: list[Release] = []
    service = FleetService(database, lambda: live)
    try:
        folder = service.settings().get("repository")
        if folder is None:
            raise FleetError(f"{database} names no release repository: make it with --repository")
        live += [Release(e.name, e.version) for e in RepositoryReader(folder).releases()]
    except BaseException:
        service.close()
        raise
    return service


def operate(database: str, event: AnyEvent) -> None:
    """Apply what an operator wants."""
    with service_of(database) as service:
        service.operate(event)


def actor() -> str:
    """Who calls, for the audit log."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "operator"


def when(at: float | None) -> str | None:
    """A time in UTC, ISO 8601."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def device_row(device: Device) -> dict[str, Any]:
    """A device as tables and JSON show it."""
    return {
        "device": device.id,
        "group": device.group,
        "runs": device.running,
        "told": device.told.version,
        "answer": "revoked" if device.revoked else device.told.outcome,
        "rollout": device.told.rollout,
        "pin": device.pin,
        "refused": sorted(device.refused),
        "agent": device.agent,
        "seen": when(device.last_seen),
    }


def show_rows(rows: list[dict[str, Any]], columns: Iterable[str], as_json: bool) -> None:
    """Print rows as a table with some columns, or all of them as JSON."""
    if as_json:
        print(json.dumps(rows))  # noqa: T201
        return
    shown = tuple(columns)
    texts = [[text_of(row[name]) for name in shown] for row in rows]
    print_table(make_console(), [Column(name) for name in shown], texts)


def text_of(value: object) -> str:
    """A value in a table."""
    if value is None or value == "" or value == []:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(text_of, value))
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:g}"
    return str(value)
