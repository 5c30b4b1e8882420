"""`prunecast fleet device`, and what all commands of `prunecast fleet` share."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.console import (
    AsJson,
    Column,
    make_console,
    print_table,
    say,
    show,
    warn,
    warn_of_exposure,
)

if TYPE_CHECKING:
    from prunecast.server.fleet import events
    from prunecast.server.fleet.service import FleetService

__all__ = [
    "DEFAULT",
    "AfterDevice",
    "Database",
    "Limit",
    "OneGroup",
    "actor",
    "app",
    "follow_repository",
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
OneGroup = Annotated[str | None, typer.Option("--group", help="All devices of a group.")]
AfterDevice = Annotated[
    str | None, typer.Option("--after", help="Begin after this device: the last one shown before.")
]
Limit = Annotated[int | None, typer.Option(help="How many at most; default all.", min=1)]

DEFAULT = "sqlite:///fleet.db"
_LONG = ("detail", "failure", "next", "problem", "reason")  # columns of sentences

app = typer.Typer(no_args_is_help=True, help="Enrol and revoke devices.")


# -- shared ---------------------------------------------------------------------------------------


def service_of(database: str) -> FleetService:
    """The service, with the live releases of the repository that `init` was given."""
    from prunecast.server.fleet.model import Release
    from prunecast.server.fleet.service import FleetService
    from prunecast.server.repository import RepositoryReader

    with FleetService(database, list) as service:
        reader = RepositoryReader(repository_of(service, database))

    def live() -> list[Release]:
        return [Release(e.name, e.version) for e in reader.releases()]

    live()  # a repository that is damaged is no matter of one operation
    return FleetService(database, live, guard=reader.held, operator=_operator_token())


def actor() -> str:
    """Who calls, for the audit log: not what the environment says, which anybody can set."""
    user = os.getuid()
    try:
        return f"user:{pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"user:{user}"


def _operator_token() -> str | None:
    """The token in the file that ``PRUNECAST_OPERATOR`` names."""
    named = os.environ.get("PRUNECAST_OPERATOR")
    if not named:
        return None
    warn_of_exposure(Path(named))
    return Path(named).read_text(encoding="utf-8").strip()


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


def follow_repository(repository: Path, database: str) -> None:
    """Let the repository ask this fleet before it withdraws a release."""
    from prunecast.common.files import StorageError
    from prunecast.server.repository import RepositoryError, RepositoryReader
    from prunecast.server.repository.fleets import remember_fleet

    try:
        with RepositoryReader(repository).held():
            remember_fleet(repository, database)
    except (RepositoryError, StorageError) as error:
        warn(
            f"{repository} does not know of this fleet ({error}), so releases that it stands "
            "on can be retired: let the repository's owner run "
            f"`prunecast release fleets {repository} --remember URL`"
        )


def stamp() -> dict[str, Any]:
    """When and by whom, as every event says."""
    return {"at": time.time(), "actor": actor()}


def operate(database: str, event: events.AnyEvent) -> None:
    """Apply what an operator wants, and say what the operator ought to know about it."""
    with service_of(database) as service:
        warn(*service.operate(event))


def show_rows(rows: list[dict[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Print rows as a table with some columns, or all of them as JSON."""
    if as_json:
        show(rows)
        return
    texts = [[_text(row[name]) for name in columns] for row in rows]
    headers = [Column(name.replace("_", " "), long=name in _LONG) for name in columns]
    print_table(make_console(), headers, texts)


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


# -- devices --------------------------------------------------------------------------------------


@app.command(name="add")
def add_device(
    name: DeviceName,
    group: Annotated[str, typer.Option(help="Group that it joins.")],
    database: Database = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Enrol a device and print its token, once: only a hash is kept."""
    with service_of(database) as service:
        token = service.enrol(name, group, now=time.time(), actor=actor())
    show({"device": name, "group": group, "token": token}, as_json, token)


@app.command(name="list")
def list_devices(
    group: OneGroup = None,
    after: AfterDevice = None,
    limit: Limit = None,
    database: Database = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Show every device: what it was told, what it runs, what it answered, when."""
    from prunecast.server.fleet.views import device_view

    with service_of(database) as service:
        devices = service.devices(group, after=after, limit=limit)
    columns = ("device", "group", "runs", "told", "answer", "rollout", "pin", "seen", "failure")
    show_rows([device_view(device) for device in devices], columns, as_json)


@app.command(name="revoke")
def revoke_device(name: DeviceName, database: Database = DEFAULT) -> None:
    """Refuse a device's token from now on; its name is not used again."""
    from prunecast.server.fleet import events

    operate(database, events.RevokeDevice(device=name, **stamp()))
    say(f"revoked {name}; it keeps the release that it runs")


@app.command(name="token")
def renew_token(name: DeviceName, database: Database = DEFAULT) -> None:
    """Replace a device's token, if it was lost or has leaked, and print the new one."""
    with service_of(database) as service:
        print(service.renew_token(name, now=time.time(), actor=actor()))  # noqa: T201


@app.command(name="move")
def move_device(
    name: DeviceName,
    group: Annotated[str, typer.Option(help="Group that it goes to.")],
    database: Database = DEFAULT,
) -> None:
    """Put a device into another group; in a rollout there it is a late joiner."""
    from prunecast.server.fleet import events

    operate(database, events.MoveDevice(device=name, group=group, **stamp()))
    say(f"{name} is in group {group}")


@app.command(name="show")
def show_device(name: DeviceName, database: Database = DEFAULT, as_json: AsJson = False) -> None:
    """Show a device: what it was told, and how it last said it is."""
    from prunecast.server.fleet.views import device_view, health_view

    with service_of(database) as service:
        document = device_view(service.device(name))
        if (health := service.health(name)) is not None:
            document |= health_view(*health)
    if as_json:
        show(document)
        return
    figures, failures = document.pop("figures", {}), document.pop("failures")
    lines = {f"failed {failed['version']}": failed["text"] for failed in failures}
    show_document({**document, **lines, **dict(sorted(figures.items()))}, 20)
