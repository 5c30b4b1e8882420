"""`prunecast fleet operator`: who may change the fleet, by a token and not by a user's name."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from prunecast.cli.console import AsJson, say, show
from prunecast.cli.fleet_devices import DEFAULT, Database, actor, service_of

__all__ = ["app"]

OperatorName = Annotated[str, typer.Argument(help="Name of the operator.")]

app = typer.Typer(
    no_args_is_help=True,
    help="Operators, who show a token; PRUNECAST_OPERATOR names the file that holds it.",
)


@app.command(name="add")
def add_operator(name: OperatorName, database: Database = DEFAULT, as_json: AsJson = False) -> None:
    """Add an operator and print the token, once; from the first one on, changes need a token."""
    with service_of(database) as service:
        token = service.operators.add(name, now=time.time(), actor=actor())
    show({"operator": name, "token": token}, as_json, token)


@app.command(name="list")
def list_operators(database: Database = DEFAULT, as_json: AsJson = False) -> None:
    """Show who may change the fleet; nobody: whoever can open the database."""
    with service_of(database) as service:
        names = service.operators.names()
    if as_json:
        show(names)
    else:
        say(*(names or ["no operators: whoever can open the database may change the fleet"]))


@app.command(name="remove")
def remove_operator(name: OperatorName, database: Database = DEFAULT) -> None:
    """Refuse an operator's token from now on; without the last one, tokens are not needed."""
    with service_of(database) as service:
        service.operators.remove(name, now=time.time(), actor=actor())
    say(f"removed {name}")
