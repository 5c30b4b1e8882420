"""`prunecast node`: what the nodes of this machine keep of federations, and away with it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.console import AsJson, Column, make_console, print_table, say, show
from prunecast.common.text import bytes_text, count_text, duration_text

if TYPE_CHECKING:
    from prunecast.client.training.housekeeping import Kept

__all__ = ["app"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_COLUMNS = (
    Column("job"),
    Column("node"),
    Column("bytes"),
    Column("last use"),
    Column("state"),
    Column("folder", wide_only=True, long=True),
)

Store = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the store, as prunecast-store of the node config; default "
        "$PRUNECAST_STORE, else prunecast/nodes in the user's cache folder."
    ),
]

app = typer.Typer(
    no_args_is_help=True,
    help="What the nodes of this machine keep between messages: models, and what updates dropped.",
)


@app.command()
def status(store: Store = None, as_json: AsJson = False) -> None:
    """Show jobs, nodes, bytes and last use, and what `clean` would remove."""
    from prunecast.client.training.housekeeping import default_root, kept_in

    root = store or default_root()
    found = kept_in(root)
    if as_json:
        show({"store": str(root), "bytes": _bytes(found), "kept": [_document(k) for k in found]})
        return
    if not found:
        say(f"{root}: nothing is kept")
        return
    _print(found)
    left = [kept for kept in found if kept.is_left()]
    if left:
        say(f"`prunecast node clean` would remove {_text(left)}: its jobs are over")


@app.command()
def clean(
    store: Store = None,
    job: Annotated[
        list[str] | None,
        typer.Option(help="Only this job, a name or Flower's run id, whether it is over or not."),
    ] = None,
    older_than: Annotated[
        str, typer.Option(help="Only what no message used for so long: 12h, 30d, 4w.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what jobs that are over left: finished ones, and those not used for 30 days.

    What a message is being handled with stays in any case. A node whose files are gone gets the
    whole model with its next message, and what its updates had dropped is lost.
    """
    from prunecast.client.training.housekeeping import default_root, kept_in, remove

    root = store or default_root()
    seconds = _seconds(older_than) if older_than else None
    found = kept_in(root)
    if job and (missing := set(job) - {kept.job for kept in found}):
        raise typer.BadParameter(f"{root} has no job {sorted(missing)[0]!r}")
    chosen = [kept for kept in found if _is_chosen(kept, job or [], seconds)]
    if not chosen:
        show({"store": str(root), "removed": [], "kept": []}, as_json, f"{root}: nothing to remove")
        return
    if not yes:
        if as_json:
            raise typer.BadParameter("give --yes with --json: nobody can be asked")
        _print(chosen)
        typer.confirm(f"Remove {_text(chosen)}?", abort=True)
    removed = [kept for kept in chosen if remove(kept)]
    stayed = [kept for kept in chosen if kept not in removed]
    document = {
        "store": str(root),
        "removed": [_document(kept) for kept in removed],
        "kept": [_document(kept) for kept in stayed],
    }
    text = f"removed {_text(removed)}"
    if stayed:
        text += f"; {_text(stayed)} stayed, as a message uses it or it cannot be written"
    show(document, as_json, text)


def _is_chosen(kept: Kept, jobs: list[str], seconds: float | None) -> bool:
    if kept.in_use or (jobs and kept.job not in jobs):
        return False
    if seconds is not None:
        return time.time() - kept.used > seconds
    return bool(jobs) or kept.is_left()


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no time: 12h, 30d, 4w", param_hint="--older-than")
    return float(found[1]) * _UNITS[found[2]]


def _bytes(found: list[Kept]) -> int:
    return sum(kept.size for kept in found)


def _text(found: list[Kept]) -> str:
    return f"{bytes_text(_bytes(found))} of {count_text(len(found), 'node')}"


def _state(kept: Kept) -> str:
    if kept.in_use:
        return "in use"
    return "finished" if kept.finished else "stale" if kept.is_left() else "kept"


def _print(found: list[Kept]) -> None:
    rows = [
        [
            *(kept.job, kept.node, bytes_text(kept.size)),
            f"{duration_text(max(0.0, time.time() - kept.used))} ago",
            *(_state(kept), str(kept.folder)),
        ]
        for kept in found
    ]
    total = ["", count_text(len(found), "node"), bytes_text(_bytes(found)), "", "", ""]
    print_table(make_console(), _COLUMNS, rows, total=total)


def _document(kept: Kept) -> dict[str, Any]:
    return {
        "job": kept.job,
        "node": kept.node,
        "bytes": kept.size,
        "last_use": kept.used,
        "state": _state(kept),
        "folder": str(kept.folder),
    }
