"""`prunecast sweep`: which keys of a scenario give which accuracy for how many bytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from prunecast.cli.console import Column, make_console, print_table
from prunecast.common.text import bytes_text, percent

__all__ = ["sweep"]


def sweep(
    scenario: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a packaged scenario: demo.")
    ],
    space: Annotated[
        Path | None, typer.Option(help="TOML file with the table [sweep], where it is not there.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials instead of the table's.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds instead of the scenario's.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the sampling instead of the table's.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=0, help="Trials at the same time; 0: as the cores have room for.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the sweep; one that is there goes on.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check scenario, data and space.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print all trials as JSON; progress goes to standard error."),
    ] = False,
) -> None:
    """Vary keys of a scenario: a grid, at random, or towards few bytes and much accuracy.

    The table [sweep] says which keys are varied, docs/sweeps.md how. Every point is a run of the
    scenario's arm. The folder gets trials.parquet and pareto.png; a sweep that was interrupted
    goes on there, with the same points as without the interruption.
    """
    from prunecast.simulations.scenarios import load_scenario
    from prunecast.simulations.sweeps import load_spec
    from prunecast.simulations.sweeps.results import PLOT, TABLE, front_rows
    from prunecast.simulations.sweeps.study import Sweep

    if "" not in sys.path:  # a model of the current folder, as `python -m` finds it
        sys.path.insert(0, "")
    chosen = Sweep.of(
        load_scenario(scenario),
        spec=load_spec(space) if space else None,
        trials=trials,
        rounds=rounds,
        seed=seed,
        folder=out,
    )
    if check:
        chosen.check()
        typer.echo(json.dumps({"trials": chosen.spec.count, **chosen.definition()}, indent=2))
        return
    console, task = make_console(stderr=as_json), chosen.scenario.task
    with SweepProgress(console, chosen.spec.count, task) as progress:
        document = chosen.run(progress, jobs=jobs)
    if as_json:
        typer.echo(json.dumps({"folder": str(chosen.folder), **document}))
        return
    console = make_console()
    header, rows = front_rows(document)
    done = [row for row in document["trials"] if row["state"] == "complete"]
    title = f"{document['scenario']}, {document['arm']}: the front of {len(done)} trials"
    console.print()
    print_table(console, [Column(name) for name in header], rows, title=title)
    failed = [row for row in document["trials"] if row["state"] == "fail"]
    if failed:
        console.print(
            f"{len(failed)} were not trained, such as trial {failed[0]['trial']}: "
            f"{failed[0]['reason']}",
            soft_wrap=True,
        )
    console.print(f"{chosen.folder}  ({TABLE}: every trial; {PLOT}: the picture)", soft_wrap=True)


class SweepProgress(Progress):
    """Shows the events of `Sweep.run` on a terminal, or as plain lines in a log."""

    def __init__(self, console: Console, trials: int, task: Any) -> None:
        super().__init__(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = task
        self._points: dict[int, str] = {}
        self._bars: dict[int, TaskID] = {}
        self._all = self.add_task("trials", total=trials, detail="")

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take in one event."""
        kind, trial = event["event"], event.get("trial", 0)
        if kind == "step":
            self.update(self._all, detail=event["text"])
            self._line(event["text"])
        elif kind == "trial-started":
            point = event["point"]
            self._points[trial] = " ".join(f"{_last(k)}={_text(v)}" for k, v in point.items())
            detail = self._points[trial]
            self._bars[trial] = self.add_task(_name(trial), total=None, detail=detail)
            self.update(self._all, detail="")
        elif kind == "trial-round" and trial in self._bars:
            detail = f"{self._points[trial]}  {event.get('score', '')}"
            self.update(self._bars[trial], completed=event["round"], detail=detail)
            if "rounds" in event:
                self.update(self._bars[trial], total=event["rounds"])
        elif kind == "trial-finished":
            self._finished(trial, event)

    def _finished(self, trial: int, event: Mapping[str, Any]) -> None:
        if trial in self._bars:
            self.remove_task(self._bars.pop(trial))
        if trial >= 0:
            self.advance(self._all)
        said = event.get("reason", "")
        if not said:
            spent = bytes_text(event["bytes_down"] + event["bytes_up"])
            reached = event["reached"]
            said = f"{percent(reached) if self._task.percent else f'{reached:.4g}'}  {spent}"
        if "same_as" in event:
            said += f"  (as trial {event['same_as']})"
        text = f"{_name(trial):<10} {said}  {self._points.pop(trial, '')}"
        self.console.print(text.rstrip(), markup=False, soft_wrap=True)

    def _line(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(text)


def _name(trial: int) -> str:
    return "baseline" if trial < 0 else f"trial {trial}"


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
