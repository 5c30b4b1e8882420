"""`prunecast fleet device`: enrol, look at and revoke devices."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from prunecast.cli.console import AsJson, print_json, say, show
from prunecast.cli.fleet_common import (
    DEFAULT,
    AfterDevice,
    Database,
    DeviceName,
    Limit,
    OneGroup,
    actor,
    operate,
    service_of,
    show_document,
    show_rows,
    stamp,
)
from prunecast.server.fleet import events
from prunecast.server.fleet.views import device_view, health_view

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
    with service_of(database) as service:
        devices = service.devices(group, after=after, limit=limit)
    columns = ("device", "group", "runs", "told", "answer", "rollout", "pin", "seen")
    show_rows([device_view(device) for device in devices], columns, as_json)


@app.command(name="revoke")
def revoke_device(name: DeviceName, database: Database = DEFAULT) -> None:
    """Refuse a device's token from now on; its name is not used again."""
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
    operate(database, events.MoveDevice(device=name, group=group, **stamp()))
    say(f"{name} is in group {group}")


@app.command(name="show")
def show_device(name: DeviceName, database: Database = DEFAULT, as_json: AsJson = False) -> None:
    """Show a device: what it was told, and how it last said it is."""
    with service_of(database) as service:
        document = device_view(service.device(name))
        if (health := service.health(name)) is not None:
            document |= health_view(*health)
    if as_json:
        print_json(document)
        return
    figures = document.pop("figures", {})
    show_document({**document, **dict(sorted(figures.items()))}, 20)
