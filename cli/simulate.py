"""`prunecast simulate`, `demo` and `report`: run a scenario file, and show what a run gave."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from prunecast.cli.console import Column, make_console, print_table
from prunecast.common.text import bytes_text

if TYPE_CHECKING:
    from prunecast.simulations.scenarios import Scenario

__all__ = ["RunProgress", "demo", "report", "simulate"]

_LINES_PER_ARM = 6

# so that the table fits 80 columns
_SHORT = {"sparsity": "zeros", "bytes up": "up", "bytes down": "down", "reduction": "ratio"}
_SHORT["simulated time"] = "simulated"

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


def _list_scenarios(wanted: bool) -> None:
    if not wanted:
        return
    from prunecast.simulations.scenarios import load_scenario, packaged_scenarios

    rows = [[name, load_scenario(name).description] for name in packaged_scenarios()]
    print_table(make_console(), [Column("scenario"), Column("what it trains", long=True)], rows)
    raise typer.Exit


def demo(
    seed: Seed = None, rounds: Rounds = None, output: Output = None, as_json: AsJson = False
) -> None:
    """Train on real digits, dense and compressed, and deliver the result to a device.

    Ten simulated clients train a convolutional network on 4,000 MNIST images, once with plain
    Flower and once through Prunecast, with the same seeds. Then two versions are released, signed
    and served, and an edge agent in a process of its own downloads the first, patches itself to
    the second and classifies the held-out images. Takes under three minutes on two cores and
    needs no network.
    """
    _run_and_show(_load("demo", seed, rounds, output), as_json)


def simulate(
    scenario: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a packaged scenario: see --list.")
    ],
    seed: Seed = None,
    rounds: Rounds = None,
    output: Output = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only check scenario and data; print it in full."),
    ] = False,
    names: Annotated[
        bool,
        typer.Option(
            "--list", callback=_list_scenarios, is_eager=True, help="Name packaged scenarios."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a scenario: every arm on Flower's simulation engine, then the figures.

    A scenario names data, partition, clients, model, training, strategy and the arms to compare;
    docs/scenarios.md explains every key. The run's folder gets result.json, a ledger with one
    line per message, a picture and a page.
    """
    if "" not in sys.path:  # a model of the current folder, as `python -m` finds it
        sys.path.insert(0, "")
    chosen = _load(scenario, seed, rounds, output)
    if check:
        from prunecast.simulations.runner.run import check_scenario

        check_scenario(chosen)
        typer.echo(json.dumps(chosen.to_mapping(), indent=None if as_json else 2))
    else:
        _run_and_show(chosen, as_json)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run, such as runs/<time>.")],
    network: Annotated[
        str, typer.Option(help="Simulate its time over a network: a profile, or a CSV trace.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Print a run's tables and draw its picture and page again, from result.json."""
    from prunecast.simulations.report import write_report
    from prunecast.simulations.runner.run import read_result

    result = read_result(folder)
    if network:
        from prunecast.simulations.network_profiles import NetworkSpec
        from prunecast.simulations.network_profiles.results import add_simulated_time

        add_simulated_time(result, folder, NetworkSpec(network))
    figure, page = write_report(folder, result)
    _show(folder, result, as_json, {"figure": str(figure), "page": str(page)})


def _load(source: str, seed: int | None, rounds: int | None, output: Path | None) -> Scenario:
    """A scenario with what the command line replaces."""
    from prunecast.simulations.scenarios import load_scenario

    changes = {"seed": seed, "rounds": rounds, "output": str(output) if output else None}
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    return dataclasses.replace(load_scenario(source), **given)


def _run_and_show(scenario: Scenario, as_json: bool) -> None:
    from prunecast.simulations.report import write_report
    from prunecast.simulations.runner.run import new_run_folder, run_scenario

    folder = new_run_folder(scenario.output, scenario.name)
    with RunProgress(make_console(stderr=as_json)) as progress:
        result = run_scenario(scenario, folder, on_event=progress)
        progress({"event": "step", "text": "drawing the report"})
        write_report(folder, result)
    _show(folder, result, as_json, {})


def _show(folder: Path, result: dict[str, Any], as_json: bool, files: dict[str, str]) -> None:
    """Print a run's tables, or its result and the files that were written as JSON."""
    from prunecast.simulations.report import PAGE, arm_rows, release_rows, score_text

    if as_json:
        typer.echo(json.dumps({"folder": str(folder), **files, **result}))
        return
    console = make_console()
    scenario = result["scenario"]
    seconds = f"{result['seconds']:.0f} s"
    title = f"{scenario['name']}: {scenario['rounds']} rounds, seed {scenario['seed']}, {seconds}"
    for heading, (header, rows) in (
        (title, arm_rows(result)),
        ("To the edge", release_rows(result)),
    ):
        if rows:
            console.print()
            columns = [Column(_SHORT.get(name, name)) for name in header]
            print_table(console, columns, rows, title=heading)
    release, task = result["release"], result["task"]
    if release:
        reached = score_text(result, release[f"device_{task['metric']}"])
        console.print(
            f"The device (onnxruntime; no torch, no Flower) {task['verb']} "
            f"{release['identical_examples']} of {release['examples']} examples exactly as the "
            f"server: {task['metric']} {reached} on both."
        )
    console.print(f"\n{folder}  (open {folder / PAGE})", soft_wrap=True)


class RunProgress(Progress):
    """Shows the events of `run_scenario` on a terminal, or as plain lines in a log."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._name, self._rounds = "", 0
        self._arm: TaskID | None = None
        self._step: TaskID | None = None

    def stop(self) -> None:
        """Leave the arms' bars behind."""
        self._end_step()
        super().stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take in one event."""
        kind = event["event"]
        if kind == "step":
            self._end_step()
            self._step = self.add_task("", total=None, detail=event["text"])
            self._line(event["text"])
        elif kind == "run-started":
            self._end_step()
            self._name, self._rounds = event["name"], event["rounds"]
            self._arm = self.add_task(self._name, total=self._rounds, detail="")
        elif kind == "round-finished" and self._arm is not None:
            number, spent = event["round"], bytes_text(event["bytes_up"] + event["bytes_down"])
            detail = f"round {number:>2}/{self._rounds}  {event['score']:>6}  {spent:>8}"
            self.update(self._arm, completed=number, detail=detail)
            if number % max(1, self._rounds // _LINES_PER_ARM) == 0 or number == self._rounds:
                self._line(f"{self._name:<12} {detail}")

    def _end_step(self) -> None:
        if self._step is not None:
            self.remove_task(self._step)
            self._step = None

    def _line(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(text)
