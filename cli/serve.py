"""`prunecast serve`: a release repository over HTTP(S)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

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
    as_json: Annotated[bool, typer.Option("--json", help="Print the URL as JSON.")] = False,
) -> None:
    """Serve the files of a release repository until interrupted.

    Any web server can do the same: the files are static, and trust comes from signatures. Without
    a certificate the transfer is readable by others, though never forgeable.
    """
    from prunecast.server.releases import ReleaseServer

    def ready(url: str) -> None:
        shown = json.dumps({"url": url, "port": server.port}) if as_json else f"serving {url}"
        print(shown, flush=True)  # noqa: T201

    server = ReleaseServer(repository, host=host, port=port, certificate=certificate, key=key)
    server.run(ready)
