"""The command `prunecast`."""

from __future__ import annotations

import os
from importlib.metadata import version as distribution_version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

# these modules import nothing beyond the base installation until a command runs
from prunecast.cli import data, edge, federation, fleet, node, release
from prunecast.cli.compare import compare
from prunecast.cli.console import explain, is_usage
from prunecast.cli.files import compress, decompress, inspect
from prunecast.cli.prune import prune
from prunecast.cli.serve import serve
from prunecast.cli.signals import end_cleanly
from prunecast.cli.simulate import demo, report, simulate
from prunecast.cli.sweep import sweep

__all__ = ["app", "run"]


class _Group(TyperGroup):
    """Turns exceptions into one line that names the remedy, and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand: 0 done, 1 failed, 2 wrongly called."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            asked = _asked_to_end(error)
            if asked is not None:
                raise SystemExit(asked) from None
            debugging = ctx.params.get("debug") or os.environ.get("PRUNECAST_DEBUG") == "1"
            click_shows_it = hasattr(error, "exit_code") and hasattr(error, "show")
            if debugging or click_shows_it or isinstance(error, typer.Exit | typer.Abort):
                raise
            typer.echo(f"error: {explain(error, ctx.invoked_subcommand)}", err=True)
            raise typer.Exit(2 if is_usage(error) else 1) from error


def _asked_to_end(error: BaseException) -> int | None:
    """The exit status of a signal that came before an error: of cleaning up, which it began."""
    earlier = error.__context__
    while earlier is not None:
        if isinstance(earlier, KeyboardInterrupt):
            return 130
        if isinstance(earlier, SystemExit):
            return earlier.code if isinstance(earlier.code, int) else 1
        earlier = earlier.__context__
    return None


app = typer.Typer(
    name="prunecast",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated learning and edge delivery that are cheap in bytes.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prunecast {distribution_version('prunecast')}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks (or set PRUNECAST_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Federated learning and edge delivery that are cheap in bytes."""


_COMMANDS = (demo, simulate, compare, sweep, report, serve, compress, decompress, inspect, prune)
for _command in _COMMANDS:
    app.command()(_command)
_GROUPS = {
    "data": data,
    "release": release,
    "edge": edge,
    "fleet": fleet,
    "node": node,
    "federation": federation,
}
for _name, _group in _GROUPS.items():
    app.add_typer(_group.app, name=_name)


def run() -> None:
    """Entry point of the console script."""
    end_cleanly()
    app()
