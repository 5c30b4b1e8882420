"""`prunecast federation`: what a federation on real machines is run with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunecast.cli.console import AsJson, Column, make_console, print_table, say, show

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Run a federation of Flower on real machines.")

_SOON_DAYS = 30


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(help="Where keys and certificates go.")],
    nodes: Annotated[int, typer.Option(help="How many SuperNodes there are.", min=0)] = 0,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address of the SuperLink; may be given several times."),
    ] = None,
    days: Annotated[int, typer.Option(help="That the certificate holds.", min=1)] = 397,
    renew: Annotated[
        bool, typer.Option("--renew", help="Make the SuperLink's key and certificate anew.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make the SuperLink's TLS certificate, its authority, and a key for each SuperNode.

    What is there already is kept: give a larger `--nodes` for more nodes. SuperNodes need `ca.crt`
    and their own file of `nodes/`; `flwr supernode register` is given the `.pub` beside it.
    """
    from prunecast.common.clock import utc_now
    from prunecast.server.federation.credentials import make_credentials

    found = make_credentials(folder, hosts=host or (), nodes=nodes, days=days, renew=renew)
    left = {one.path: (one.expires - utc_now()).days for one in found if one.expires}
    if as_json:
        show(
            [
                {
                    "path": str(one.path),
                    "state": one.state,
                    "expires": one.expires.isoformat() if one.expires else None,
                    "hosts": list(one.hosts),
                }
                for one in found
            ]
        )
        return
    rows = [
        (
            str(one.path),
            one.state,
            f"{one.expires:%Y-%m-%d}, {left[one.path]} days" if one.expires else "never",
            ", ".join(one.hosts) or "–",
        )
        for one in found
    ]
    columns = [Column("file"), Column("is"), Column("expires", long=True), Column("for", long=True)]
    print_table(make_console(), columns, rows)
    due = [str(path) for path, days_left in left.items() if days_left < _SOON_DAYS]
    if due:
        say(f"{' and '.join(due)} expires soon: run this again with --renew")
    say(f"keep {folder / 'ca.key'} off this machine until the certificate is to be renewed")
