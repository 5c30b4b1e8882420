"""`prunecast federation`: what a federation on real machines is run with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from prunecast.cli.console import (
    AsJson,
    Column,
    Force,
    make_console,
    print_table,
    printable,
    refuse_to_overwrite,
    say,
    show,
)

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
    from prunecast.server.federation.operating.credentials import make_credentials

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
    from prunecast.server.federation.reporting.events import read_events
    from prunecast.server.federation.reporting.nodes import status_of

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
                *map(str, (node["node"], node["state"], node["seen"] or "never")),
                *(_or_dash(node[name]) for name in ("version", "behind")),
                *map(str, (node["errors"], node.get("reason", ""))),
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

    from prunecast.server.federation.reporting.events import EventTail
    from prunecast.server.federation.reporting.metrics import MetricsServer, RunMetrics

    told, tail = RunMetrics(nodes), EventTail(_events(folder))

    def text() -> bytes:
        for event in tail.read():
            told(event)
        return told.text()

    with MetricsServer(text, host=host, port=port) as server:
        show({"url": server.url, "port": server.port}, as_json, f"serving {server.url}")
        threading.Event().wait()


@app.command()
def watch(
    command: Annotated[
        list[str], typer.Argument(help="What to run, after `--`.", metavar="-- COMMAND...")
    ],
    pulse: Annotated[
        Path | None,
        typer.Option(help="File for `federation health`.", envvar="PRUNECAST_PULSE"),
    ] = None,
    health: Annotated[
        str, typer.Option(help="URL that the command answers; of Flower's, by its options.")
    ] = "",
    authority: Annotated[
        Path | None, typer.Option(help="PEM file of the authority of that URL.")
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 5.0,
    start: Annotated[float, typer.Option(help="Seconds to answer at first.", min=0.0)] = 180.0,
    silence: Annotated[
        float, typer.Option(help="Seconds without an answer after which it hangs.", min=0.1)
    ] = 60.0,
    quiet: Annotated[
        float,
        typer.Option(
            help="Seconds after which a SuperNode hangs that does not move, or exchanges nothing "
            "with a SuperLink that answers.",
            min=0.1,
        ),
    ] = 120.0,
    stalled: Annotated[
        float | None,
        typer.Option(help="Seconds after which a ClientApp hangs that computes nothing.", min=1.0),
    ] = None,
    drain: Annotated[
        float, typer.Option(help="Seconds for a ClientApp that runs, when it is to end.", min=0.0)
    ] = 0.0,
) -> None:
    """Run a SuperNode or SuperLink, and end it when it hangs: its service manager starts it again.

    The exit status is the command's, or 75 where it hung. systemd's watchdog is fed.
    """
    from dataclasses import replace

    from prunecast.common.pulse import Limits
    from prunecast.common.watching import Watch, target_of

    target = target_of(command)
    if health:
        target = replace(target, health=health, authority=authority)
    limits = Limits(start=start, silence=silence, quiet=quiet, stalled=stalled)
    watching = Watch(command, target, limits=limits, interval=interval, file=pulse, drain=drain)
    raise typer.Exit(watching.run(lambda text: typer.echo(f"prunecast: {text}", err=True)))


@app.command()
def health(
    pulse: Annotated[
        Path, typer.Argument(help="File that `federation watch` writes.", envvar="PRUNECAST_PULSE")
    ],
    reachable: Annotated[
        bool, typer.Option("--reachable", help="Fail, too, where the SuperLink is not reached.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say how a watched SuperNode or SuperLink is; the exit status is 1 where it is not well."""
    from prunecast.common.pulse import read_pulse
    from prunecast.common.text import duration_text

    found = read_pulse(pulse, reachable=reachable)
    if as_json:
        show(found)
    else:
        state = found.get("state", "not well") if found["well"] else "not well"
        say(": ".join([state, *found["problems"]]))
        for name, said in (("answered", "answered"), ("exchanged", "last exchange")):
            if found.get(name) is not None:
                say(f"{said} {duration_text(max(0.0, time.time() - found[name]))} ago")
    raise typer.Exit(0 if found["well"] else 1)


@app.command()
def backup(
    database: Annotated[Path, typer.Argument(help="Of the SuperLink, which may run.")],
    file: Annotated[Path, typer.Argument(help="The copy; one that is there is replaced.")],
) -> None:
    """Copy a SuperLink's database while it runs."""
    from prunecast.common.text import bytes_text
    from prunecast.server.federation.operating.backups import back_up

    say(f"{file}: {bytes_text(back_up(database, file))}, whole")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A copy that `backup` made.")],
    database: Annotated[Path, typer.Argument(help="Of the SuperLink, which must have ended.")],
    force: Force = False,
) -> None:
    """Put a copy in the place of a SuperLink's database."""
    from prunecast.server.federation.operating.backups import restore

    refuse_to_overwrite(database, force)
    restore(file, database)
    say(f"{database} is as {file} has it")


def _events(folder: Path) -> Path:
    from prunecast.server.federation.run import EVENTS

    return folder / EVENTS if folder.is_dir() else folder


def _numbers(metrics: dict[str, object]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in metrics.items() if isinstance(value, int | float)]


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)


@app.command()
def supervise(
    command: Annotated[
        list[str],
        typer.Argument(
            help="What `flwr run` is to be given, behind `--`.", metavar="-- flwr run ..."
        ),
    ],
    restarts: Annotated[
        int, typer.Option(help="How often a failed run is submitted again.", min=0)
    ] = 10,
    wait: Annotated[
        float, typer.Option(help="Seconds before the first time; then twice as many.", min=0)
    ] = 5.0,
    every: Annotated[float, typer.Option(help="Seconds between looks at the run.", min=0.1)] = 5.0,
    silent: Annotated[
        float, typer.Option(help="Seconds for which the SuperLink may not answer.", min=0)
    ] = 3600.0,
    as_json: AsJson = False,
) -> None:
    """Submit a run of Flower, and again whenever it has failed, until it has completed.

    Set `resume = "auto"` and a folder in the run config, so that each goes on where the one before
    was. Exits with 0 once a run has completed, with 1 where it was stopped or failed too often.
    Ended by Ctrl-C it leaves the run alone.
    """
    from prunecast.server.federation.operating import supervising

    flower = supervising.FlowerCommand(command)
    runs = supervising.supervise(
        flower.submit,
        flower.status,
        restarts=restarts,
        wait=wait,
        every=every,
        silent=silent,
        say=lambda text: typer.echo(printable(text), err=as_json),
    )
    done = runs[-1].status if runs else "failed"
    if as_json:
        show({"status": done, "runs": [vars(run) for run in runs]})
    if done != "completed":
        raise typer.Exit(1)
