"""`prunecast fleet serve`: the control server that agents talk to."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from prunecast.cli.fleet_common import DEFAULT, AsJson, Database, repository_of

__all__ = ["serve"]


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
    database: Database = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Bring directives to agents and their reports back, over gRPC and TLS, until interrupted.

    It also honours the deadlines of rollouts, so that silent devices pause them. The release
    repository is the one that `prunecast fleet init` was given.
    """
    from prunecast.server.control import ControlLimits, ControlServer
    from prunecast.server.fleet.service import FleetService

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")

    with FleetService(database, list) as service:
        repository = repository_of(service, database)

    def ready(address: str) -> None:
        shown = json.dumps({"address": address, "port": server.port}) if as_json else address
        print(shown if as_json else f"serving {shown}", flush=True)  # noqa: T201

    server = ControlServer(
        database,
        repository,
        certificate=certificate,
        key=key,
        client_ca=client_ca,
        host=host,
        port=port,
        limits=ControlLimits(keep_alive=keep_alive, fetch_bytes=fetch_limit, drain=drain),
        interval=interval,
    )
    server.run(ready)
