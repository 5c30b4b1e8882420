"""`prunecast simulate`: run a scenario file."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.console import make_console

if TYPE_CHECKING:
    from rich.console import JustifyMethod

    from prunecast.simulations.scenarios import Scenario

__all__ = ["load", "run_and_show", "show", "simulate"]

# so that the table fits 80 columns
_SHORT = {"sparsity": "zeros", "bytes up": "up", "bytes down": "down", "reduction": "ratio"}

Seed = Annotated[
    int | None, typer.Option(min=0, help="Seed instead of the scenario's: partition, weights, all.")
]
Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds instead of the scenario's.")]
Output = Annotated[
    Path | None, typer.Option(help="Folder that gets a folder for this run (default: runs).")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON; progress goes to standard error.")
]


def simulate(
    scenario: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a packaged scenario: demo.")
    ],
    seed: Seed = None,
    rounds: Rounds = None,
    output: Output = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only check scenario and data; print it in full."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a scenario: every arm on Flower's simulation engine, then the figures.

    A scenario names data, partition, clients, model, training, strategy and the arms to compare;
    docs/scenarios.md explains every key. The run's folder gets result.json, a ledger with one
    line per message, a picture and a page.
    """
    _import_from_here()
    chosen = load(scenario, seed, rounds, output)
    if check:
        from prunecast.simulations.runner.run import check_scenario

        check_scenario(chosen)
        typer.echo(json.dumps(chosen.to_mapping(), indent=None if as_json else 2))
        return
    run_and_show(chosen, as_json=as_json)


def _import_from_here() -> None:
    """Find modules of the current folder, as `python -m` does; the engine inherits the path."""
    if "" not in sys.path:
        sys.path.insert(0, "")


def load(source: str, seed: int | None, rounds: int | None, output: Path | None) -> Scenario:
    """A scenario with what the command line replaces."""
    from prunecast.simulations.scenarios import load_scenario

    loaded = load_scenario(source)
    changes: dict[str, Any] = {"seed": seed, "rounds": rounds}
    changes["output"] = str(output) if output else None
    return dataclasses.replace(loaded, **{k: v for k, v in changes.items() if v is not None})


def run_and_show(scenario: Scenario, *, as_json: bool) -> None:
    """Run a scenario, write its report, print tables or JSON."""
    from prunecast.cli.progress import RunProgress
    from prunecast.simulations.report import write_report
    from prunecast.simulations.runner.run import new_run_folder, run_scenario

    folder = new_run_folder(scenario.output, scenario.name)
    with RunProgress(make_console(stderr=as_json)) as progress:
        result = run_scenario(scenario, folder, on_event=progress)
        progress({"event": "step", "text": "drawing the report"})
        write_report(folder, result)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), **result}))
    else:
        show(folder, result)


def show(folder: Path, result: dict[str, Any]) -> None:
    """Print the tables of a run."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from prunecast.simulations.report import PAGE, arm_rows, release_rows, score_text

    console = make_console()
    scenario = result["scenario"]
    seconds = f"{result['seconds']:.0f} s"
    title = f"{scenario['name']}: {scenario['rounds']} rounds, seed {scenario['seed']}, {seconds}"
    for heading, (header, rows) in (
        (title, arm_rows(result)),
        ("To the edge", release_rows(result)),
    ):
        if not rows:
            continue
        table = Table(
            title=heading, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
        )
        for number, name in enumerate(header):
            justify: JustifyMethod = "right" if number else "left"
            table.add_column(_SHORT.get(name, name), justify=justify, no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print()
        console.print(table)
    release, task = result["release"], result["task"]
    if release:
        reached = score_text(result, release[f"device_{task['metric']}"])
        console.print(
            f"The device (onnxruntime; no torch, no Flower) {task['verb']} "
            f"{release['identical_examples']} of {release['examples']} examples exactly as the "
            f"server: {task['metric']} {reached} on both."
        )
    console.print(f"\n{folder}  (open {folder / PAGE})", soft_wrap=True)
