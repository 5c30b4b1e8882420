"""`prunecast fleet`: devices, groups, and rollouts in stages."""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunecast.cli import fleet_devices, fleet_operators
from prunecast.cli.console import AsJson, say, show, warn
from prunecast.cli.fleet_devices import (
    DEFAULT,
    AfterDevice,
    Database,
    Limit,
    OneGroup,
    follow_repository,
    operate,
    repository_of,
    service_of,
    show_document,
    show_rows,
    stamp,
)

if TYPE_CHECKING:
    from prunecast.server.fleet import events

__all__ = ["app"]

GroupName = Annotated[str, typer.Argument(help="Name of the group.")]
RolloutName = Annotated[str, typer.Argument(help="Name of the rollout.")]
Reason = Annotated[str, typer.Option(help="For the audit log.")]
OneDevice = Annotated[str | None, typer.Option("--device", help="A single device.")]

app = typer.Typer(no_args_is_help=True, help="Control which device runs which release.")
group_app = typer.Typer(no_args_is_help=True, help="Groups of devices that follow one release.")
rollout_app = typer.Typer(no_args_is_help=True, help="Bring a release to groups, in stages.")
app.add_typer(fleet_devices.app, name="device")
app.add_typer(fleet_operators.app, name="operator")
app.add_typer(group_app, name="group")
app.add_typer(rollout_app, name="rollout")


@app.command()
def serve(
    certificate: Annotated[Path, typer.Option(help="PEM file with the TLS certificate chain.")],
    key: Annotated[Path, typer.Option(help="PEM file with its private key.")],
    client_ca: Annotated[
        Path | None,
        typer.Option(
            help="PEM file with the authorities that issue devices' certificates; "
            "without, devices authenticate by their tokens."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port; 0 lets the system choose.", min=0, max=65535)
    ] = 8444,
    keep_alive: Annotated[
        float, typer.Option(help="Seconds between signs of life to devices.", min=1.0)
    ] = 30.0,
    interval: Annotated[
        float, typer.Option(help="Seconds between looks at the fleet.", min=0.1)
    ] = 1.0,
    fetch_limit: Annotated[
        int, typer.Option(help="Bytes of the largest file handed out to devices.", min=0)
    ] = 64 * 2**20,
    drain: Annotated[
        float, typer.Option(help="Seconds that calls may take when the server ends.", min=0.0)
    ] = 10.0,
    connections: Annotated[
        int | None,
        typer.Option(help="Connections at a time; default a third of `ulimit -Hn`.", min=1),
    ] = None,
    connections_per_client: Annotated[
        int | None,
        typer.Option(help="Of one address, those without a credential; default half.", min=1),
    ] = None,
    database: Database = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Bring directives to agents and their reports back, over gRPC and TLS, until interrupted.

    It also honours the deadlines of rollouts, so that silent devices pause them. The release
    repository is the one that `prunecast fleet init` was given.
    """
    # gRPC reads it when it is imported; its own default writes a line for each failed handshake
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from prunecast.common.service_manager import ServiceManager
    from prunecast.server.control import ControlLimits, ControlServer
    from prunecast.server.fleet.service import FleetService

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")

    with FleetService(database, list) as service:
        repository = repository_of(service, database)

    def ready(address: str) -> None:
        show({"address": address, "port": server.port}, as_json, f"serving {address}")

    server = ControlServer(
        database,
        repository,
        certificate=certificate,
        key=key,
        client_ca=client_ca,
        host=host,
        port=port,
        limits=ControlLimits(
            keep_alive=keep_alive,
            fetch_bytes=fetch_limit,
            drain=drain,
            connections=connections,
            connections_per_client=connections_per_client,
        ),
        interval=interval,
        manager=ServiceManager(),
    )
    server.run(ready)


@app.command()
def init(
    repository: Annotated[
        Path, typer.Option(help="Folder of the release repository; versions are checked in it.")
    ],
    database: Database = DEFAULT,
) -> None:
    """Make the tables of a fleet in an empty database."""
    from prunecast.server.fleet.service import FleetService
    from prunecast.server.repository import RepositoryReader

    RepositoryReader(repository)
    FleetService.create(database, list, repository=repository).close()
    follow_repository(repository, database)
    say(f"created {database}; next: prunecast fleet group add NAME --release NAME")


@app.command()
def upgrade(database: Database = DEFAULT) -> None:
    """Bring the tables of an earlier version up to date; do so before the services start."""
    from prunecast.server.fleet.database import Database as Opened
    from prunecast.server.fleet.service import FleetService

    Opened.upgrade(database).close()
    with FleetService(database, list) as service:
        if folder := service.settings().get("repository"):
            follow_repository(Path(folder), database)
    say(f"{database} is up to date")


@group_app.command(name="add")
def add_group(
    name: GroupName,
    release: Annotated[str, typer.Option(help="Name of the release that its devices follow.")],
    stable: Annotated[
        int | None,
        typer.Option(help="Version for its devices at once; default none until a rollout."),
    ] = None,
    database: Database = DEFAULT,
) -> None:
    """Make a group."""
    from prunecast.server.fleet import events

    operate(database, events.AddGroup(group=name, release=release, stable=stable, **stamp()))
    say(f"group {name} follows {release}")


@group_app.command(name="list")
def list_groups(database: Database = DEFAULT, as_json: AsJson = False) -> None:
    """Show every group and the version in force."""
    from prunecast.server.fleet.views import group_view

    with service_of(database) as service:
        service.tick(time.time())
        counts, fleet = service.device_counts(), service.overview()
    found = [group_view(fleet, group, counts.get(group.id, 0)) for group in fleet.groups.values()]
    columns = ("group", "release", "stable", "pin", "last_rollout", "devices", "problem")
    show_rows(found, columns, as_json)


@rollout_app.command(name="start")
def start_rollout(
    release: Annotated[str, typer.Argument(help="Name of the release.")],
    version: Annotated[int, typer.Argument(help="Its number.")],
    group: Annotated[list[str], typer.Option(help="Where to; give it again for more groups.")],
    stages: Annotated[str, typer.Option(help="Rising percentages.")] = "5,25,100",
    max_error_rate: Annotated[
        float, typer.Option(help="Pause when a larger share of the reports are failures.")
    ] = 0.1,
    max_silent_rate: Annotated[
        float, typer.Option(help="Pause when a larger share of devices say nothing.")
    ] = 0.5,
    min_reports: Annotated[int, typer.Option(help="So many reports decide a stage.")] = 5,
    deadline: Annotated[
        str, typer.Option(help="A device that was told and says nothing for so long is silent.")
    ] = "1h",
    soak: Annotated[
        str | None,
        typer.Option(
            help="A stage lasts at least so long; default 2m, or the timeout if that is shorter: a "
            "crash loop shows in that time."
        ),
    ] = None,
    timeout: Annotated[
        str, typer.Option(help="Then a stage is decided by the reports that are there.")
    ] = "1d",
    manual: Annotated[
        bool, typer.Option("--manual", help="Go on only by `prunecast fleet promote`.")
    ] = False,
    roll_back_on_error: Annotated[
        bool, typer.Option("--roll-back-on-error", help="Abort on the error rate, do not pause.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the rollout; default made up.")] = None,
    database: Database = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Start to bring a release to groups: a few devices first, more when they report success."""
    from prunecast.server.fleet import events
    from prunecast.server.fleet.model import SOAK_SECONDS, Release, RolloutPolicy
    from prunecast.server.fleet.views import rollout_view

    longest = _seconds(timeout, "--timeout")
    policy = RolloutPolicy(
        max_error_rate=max_error_rate,
        max_silent_rate=max_silent_rate,
        min_reports=min_reports,
        report_deadline=_seconds(deadline, "--deadline"),
        soak=min(SOAK_SECONDS, longest) if soak is None else _seconds(soak, "--soak"),
        timeout=longest,
        automatic=not manual,
        roll_back_on_error=roll_back_on_error,
    )
    try:
        percentages = tuple(float(part) for part in stages.split(","))
    except ValueError:
        raise typer.BadParameter("must be numbers, as in 5,25,100", param_hint="--stages") from None
    event = events.StartRollout(
        rollout=name or f"{release[:40]}-{version}-{secrets.token_hex(3)}",
        release=Release(release, version),
        groups=tuple(group),
        stages=percentages,
        policy=policy,
        **stamp(),
    )
    with service_of(database) as service:
        warnings = service.operate(event)
        fleet, rollout = service.overview(), service.rollout(event.rollout)
    warn(*warnings)
    text = f"started {rollout.id}: {rollout.expected} of {sum(rollout.cohorts)} devices first"
    document = rollout_view(fleet, rollout, event.at)
    show({**document, "warnings": list(warnings)}, as_json, text)


@rollout_app.command(name="list")
def list_rollouts(database: Database = DEFAULT, as_json: AsJson = False) -> None:
    """Show every rollout, oldest first."""
    from prunecast.server.fleet.views import rollout_view

    with service_of(database) as service:
        service.tick(now := time.time())
        fleet = service.overview()
        rows = [rollout_view(fleet, found, now) for found in service.rollouts()]
    columns = ("rollout", "release", "version", "status", "percent", "told", "next", "reason")
    show_rows(rows, columns, as_json)


@rollout_app.command(name="show")
def show_rollout(
    name: RolloutName,
    after: AfterDevice = None,
    limit: Limit = None,
    database: Database = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Show how far a rollout is, device by device."""
    from prunecast.server.fleet.views import device_view, rollout_view

    with service_of(database) as service:
        service.tick(now := time.time())
        document = rollout_view(service.overview(), service.rollout(name), now)
        members = service.devices(rollout=name, after=after, limit=limit)
    version = document["version"]
    rows = [device_view(device, version) for device in members]
    if as_json:
        show({**document, "members": rows})
        return
    show_document(document, 10)
    rows.sort(key=lambda row: (row["stage"], row["device"]))
    columns = ("device", "stage", "progress", "runs", "told", "answer", "seen", "failure")
    show_rows(rows, columns, False)


@app.command()
def promote(rollout: RolloutName, database: Database = DEFAULT) -> None:
    """Begin the next stage at once, paused or not; after the last one the release is stable."""
    from prunecast.server.fleet import events

    _steer(database, events.Promote(rollout=rollout, **stamp()))


@app.command()
def pause(
    rollout: RolloutName, reason: Reason = "by an operator", database: Database = DEFAULT
) -> None:
    """Tell nobody new; devices that were told stay told."""
    from prunecast.server.fleet import events

    _steer(database, events.Pause(rollout=rollout, reason=reason, **stamp()))


@app.command()
def resume(rollout: RolloutName, database: Database = DEFAULT) -> None:
    """Go on with the stage and count anew: accept failures so far, wait again for the silent."""
    from prunecast.server.fleet import events

    _steer(database, events.Resume(rollout=rollout, **stamp()))


@app.command()
def abort(
    rollout: RolloutName, reason: Reason = "by an operator", database: Database = DEFAULT
) -> None:
    """End a rollout and roll back: devices that were told are told the previous release.

    The exit code is 1 if some of them have nothing to go back to: the rollout is aborted, and they
    keep what they run.
    """
    from prunecast.server.fleet import events

    _steer(database, events.Abort(rollout=rollout, reason=reason, **stamp()))


@app.command()
def pin(
    version: Annotated[int, typer.Argument(help="Number of the release.")],
    device: OneDevice = None,
    group: OneGroup = None,
    database: Database = DEFAULT,
) -> None:
    """Keep a device or a group on one version, whatever is rolled out."""
    _pin(database, device, group, version)
    say(f"{device or group} stays on version {version}")


@app.command()
def unpin(device: OneDevice = None, group: OneGroup = None, database: Database = DEFAULT) -> None:
    """Let a device or a group follow rollouts again."""
    _pin(database, device, group, None)
    say(f"{device or group} follows rollouts again")


@app.command()
def audit(
    subject: Annotated[
        str | None, typer.Option(help="Only what concerns this device, group or rollout.")
    ] = None,
    limit: Annotated[
        int, typer.Option(help="How many: the last ones, or the first after --after.", min=1)
    ] = 100,
    after: Annotated[
        int | None, typer.Option(help="Begin after the entry of this number.", min=0)
    ] = None,
    database: Database = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Show who did what and when, oldest first."""
    from prunecast.server.fleet.views import audit_view

    with service_of(database) as service:
        entries = service.audit(subject=subject, after=after, limit=limit)
    rows = [audit_view(entry) for entry in entries]
    show_rows(rows, ("number", "at", "actor", "action", "subject", "detail"), as_json)


def _steer(database: str, event: events.Steering) -> None:
    with service_of(database) as service:
        warnings = service.operate(event)
        rollout = service.rollout(event.rollout)
    percent = rollout.stages[rollout.stage]
    say(f"{rollout.id} ({rollout.release}) is {rollout.status} at {percent:g} %")
    warn(*warnings)
    if warnings:
        raise typer.Exit(1)


def _pin(database: str, device: str | None, group: str | None, version: int | None) -> None:
    from prunecast.server.fleet import events

    if device is not None and group is None:
        operate(database, events.PinDevice(device=device, version=version, **stamp()))
    elif group is not None and device is None:
        operate(database, events.PinGroup(group=group, version=version, **stamp()))
    else:
        raise typer.BadParameter("give either --device or --group")


def _seconds(text: str, option: str) -> float:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"{text!r}: give 90s, 30m, 2h or 1d", param_hint=option)
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
