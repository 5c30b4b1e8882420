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


Run = Annotated[str | None, typer.Option(help="Id or name of the run; default the last one.")]
RunFolder = Annotated[
    Path, typer.Argument(help="Folder of the run, or its `events.jsonl`.", exists=True)
]


@app.command()
def status(folder: RunFolder, run: Run = None, as_json: AsJson = False) -> None:
    """Show how far a run is, and of each node when it answered, what it holds and what failed."""
    from prunecast.common.files import is_locked
    from prunecast.server.federation.events import read_events
    from prunecast.server.federation.nodes import status_of

    path = _events(folder)
    found = status_of(read_events(path, run))
    # a run that was killed has no last event; its file is let go all the same
    if found["state"] == "running" and not is_locked(path):
        found["state"] = "cut off"
    if as_json:
        show(found)
        return
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in _numbers(found["metrics"]))
    states = ", ".join(f"{count} {state}" for state, count in found["states"].items())
    say(
        f"{found['name'] or found['run']}: {found['state']}, round {found['round']} of "
        f"{found['rounds']}" + (f", {metrics}" if metrics else ""),
        *([found["reason"]] if found["reason"] else []),
        f"last event {found['last_event']}; nodes: {states or 'none asked yet'}",
    )
    if found["nodes"]:
        names = ("node", "state", "last seen", "holds version", "behind", "errors")
        columns = [*map(Column, names), Column("last error", long=True)]
        rows = [
            [
                *(node["node"], node["state"], node["seen"] or "never"),
                *(_or_dash(node[name]) for name in ("version", "behind")),
                *(str(node["errors"]), node.get("reason", "")),
            ]
            for node in found["nodes"]
        ]
        print_table(make_console(), columns, rows)


@app.command()
def metrics(
    folder: RunFolder,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port; 0 lets the system choose.", min=0, max=65535)
    ] = 9464,
    nodes: Annotated[
        int, typer.Option(help="Most nodes that have metrics of their own.", min=0)
    ] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print the URL as JSON.")] = False,
) -> None:
    """Serve the metrics of a folder's runs to Prometheus, between runs too, until interrupted."""
    import threading

    from prunecast.server.federation.events import EventTail
    from prunecast.server.federation.metrics import MetricsServer, RunMetrics

    told, tail = RunMetrics(nodes), EventTail(_events(folder))

    def text() -> bytes:
        for event in tail.read():
            told(event)
        return told.text()

    with MetricsServer(text, host=host, port=port) as server:
        show({"url": server.url, "port": server.port}, as_json, f"serving {server.url}")
        threading.Event().wait()


def _events(folder: Path) -> Path:
    from prunecast.server.federation.run import EVENTS

    return folder / EVENTS if folder.is_dir() else folder


def _numbers(metrics: dict[str, object]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in metrics.items() if isinstance(value, int | float)]


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)
