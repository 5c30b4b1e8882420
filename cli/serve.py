"""`prunecast serve`: a release repository over HTTP(S)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunecast.cli.console import show

__all__ = ["serve"]


def serve(
    repository: Annotated[Path, typer.Argument(help="Folder of the release repository.")],
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port; 0 lets the system choose.", min=0, max=65535)
    ] = 8443,
    certificate: Annotated[
        Path | None, typer.Option(help="PEM file with the TLS certificate chain.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file with its private key.")] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Port of `/metrics`, plain HTTP; none by default.", min=0, max=65535),
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of `/metrics`.")] = "127.0.0.1",
    connections: Annotated[
        int, typer.Option(help="Connections at the same time; further ones get 503.", min=1)
    ] = 1024,
    connections_per_client: Annotated[
        int, typer.Option(help="Of them, of one address; more behind a proxy.", min=1)
    ] = 512,
    header_bytes: Annotated[
        int, typer.Option(help="Bytes of a request's headers together.", min=256)
    ] = 16 * 1024,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds for a request to arrive, and for a handshake.", min=0.1)
    ] = 30.0,
    idle_timeout: Annotated[
        float, typer.Option(help="Seconds between two requests of a connection.", min=0.1)
    ] = 75.0,
    stall_timeout: Annotated[
        float, typer.Option(help="Seconds for a slow client to take the next 16 KiB.", min=0.1)
    ] = 60.0,
    requests_per_second: Annotated[
        float | None,
        typer.Option(
            help="Of one address on average; above it gets 429. Any by default.", min=0.01
        ),
    ] = None,
    bytes_per_second: Annotated[
        float | None, typer.Option(help="Likewise, of files' content.", min=1.0)
    ] = None,
    drain: Annotated[
        float, typer.Option(help="Seconds for downloads in progress when it is ended.", min=0.0)
    ] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the URL as JSON.")] = False,
) -> None:
    """Serve the files of a release repository until interrupted.

    Any web server can do the same: the files are static, and trust comes from signatures. Without
    a certificate the transfer is readable by others, though never forgeable. `/healthz` answers
    200 when the metadata verify and are in force, else 503 and why.
    """
    from prunecast.server.repository.serving import ReleaseServer, ServingLimits

    def ready(url: str) -> None:
        found = {"url": url, "port": server.port, "metrics_port": server.metrics_port}
        show(found, as_json, f"serving {url}")

    limits = ServingLimits(
        connections=connections,
        connections_per_client=connections_per_client,
        header_bytes=header_bytes,
        request_timeout=request_timeout,
        idle_timeout=idle_timeout,
        stall_timeout=stall_timeout,
        drain=drain,
        requests_per_second=requests_per_second,
        bytes_per_second=bytes_per_second,
    )
    server = ReleaseServer(
        repository,
        host=host,
        port=port,
        certificate=certificate,
        key=key,
        limits=limits,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
    )
    server.run(ready)
