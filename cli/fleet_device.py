"""`prunecast fleet device`: enrol, look at and revoke devices."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from prunecast.cli.console import make_console
from prunecast.cli.fleet_common import (
    DEFAULT,
    AsJson,
    Database,
    DeviceName,
    OneGroup,
    actor,
    device_row,
    operate,
    service_of,
    show_rows,
    text_of,
    when,
)
from prunecast.cli.tables import say

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Enrol and revoke devices.")


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
    shown = json.dumps({"device": name, "group": group, "token": token}) if as_json else token
    print(shown)  # noqa: T201


@app.command(name="list")
def list_devices(
    group: OneGroup = None, database: Database = DEFAULT, as_json: AsJson = False
) -> None:
    """Show every device: what it was told, what it runs, what it answered, when."""
    with service_of(database) as service:
        devices = service.devices(group)
    columns = ("device", "group", "runs", "told", "answer", "rollout", "pin", "seen")
    show_rows([device_row(d) for d in devices], columns, as_json)


@app.command(name="revoke")
def revoke_device(name: DeviceName, database: Database = DEFAULT) -> None:
    """Refuse a device's token from now on; its name is not used again."""
    from prunecast.server.fleet.events import RevokeDevice

    operate(database, RevokeDevice(at=time.time(), actor=actor(), device=name))
    say(make_console(), f"revoked {name}; it keeps the release that it runs")


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
    from prunecast.server.fleet.events import MoveDevice

    operate(database, MoveDevice(at=time.time(), actor=actor(), device=name, group=group))
    say(make_console(), f"{name} is in group {group}")


@app.command(name="show")
def show_device(name: DeviceName, database: Database = DEFAULT, as_json: AsJson = False) -> None:
    """Show a device: what it was told, and how it last said it is."""
    from prunecast.server.fleet.errors import NotFound

    with service_of(database) as service:
        health = service.health(name)
        found = next((d for d in service.devices() if d.id == name), None)
    if found is None:
        raise NotFound(f"there is no device named {name!r}")
    document = device_row(found)
    if health is not None:
        said, at = health
        document |= {"reported": when(at), "problem": said.error, "figures": dict(said.figures)}
    if as_json:
        print(json.dumps(document))  # noqa: T201
        return
    figures = document.pop("figures", {})
    for key, value in [*document.items(), *sorted(figures.items())]:
        say(make_console(), f"{key:<20} {text_of(value)}")
