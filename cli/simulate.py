"""`prunecast simulate`, `demo` and `report`: run a scenario file, and show what a run gave."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from prunecast.cli.console import Column, make_console, print_table
from prunecast.common.text import bytes_text

if TYPE_CHECKING:
    from prunecast.simulations.report import Study
    from prunecast.simulations.scenarios import Scenario

__all__ = ["Log", "RunProgress", "demo", "report", "simulate"]

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
Log = Annotated[
    list[str] | None,
    typer.Option(
        help="Also tell tensorboard, wandb or mlflow while it runs; may be repeated.",
        metavar="TOOL",
    ),
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
    seed: Seed = None,
    rounds: Rounds = None,
    output: Output = None,
    log: Log = None,
    as_json: AsJson = False,
) -> None:
    """Train on real digits, dense and compressed, and deliver the result to a device.

    Ten simulated clients train a convolutional network on 4,000 MNIST images, once with plain
    Flower and once through Prunecast, with the same seeds. Then two versions are released, signed
    and served, and an edge agent in a process of its own downloads the first, patches itself to
    the second and classifies the held-out images. Takes under three minutes on two cores and
    needs no network.
    """
    _run_and_show(_load("demo", seed, rounds, output), as_json, log or ())


def simulate(
    scenario: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a packaged scenario: see --list.")
    ],
    seed: Seed = None,
    rounds: Rounds = None,
    output: Output = None,
    log: Log = None,
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
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a run that was stopped: give its folder."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a scenario: every arm on Flower's simulation engine, then the figures.

    A scenario names data, partition, clients, model, training, strategy and the arms to compare;
    docs/scenarios.md explains every key. The run's folder gets result.json, a ledger with one
    line per message, a picture and a page. A run that was stopped, however it was, goes on exactly
    where it was: `prunecast simulate FOLDER --resume`.
    """
    if "" not in sys.path:  # a model of the current folder, as `python -m` finds it
        sys.path.insert(0, "")
    if resume:
        if check or (seed, rounds, output) != (None, None, None):
            raise typer.BadParameter(
                "goes on with the run as it was begun, without --check, --seed, --rounds, --output",
                param_hint="--resume",
            )
        _go_on(Path(scenario), as_json, log or ())
        return
    chosen = _load(scenario, seed, rounds, output)
    if check:
        from prunecast.simulations.runner.run import check_scenario

        check_scenario(chosen)
        typer.echo(json.dumps(chosen.to_mapping(), indent=None if as_json else 2))
    else:
        _run_and_show(chosen, as_json, log or ())


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of runs, of comparisons, or of ServerApps' runs; several go together.",
            metavar="FOLDER...",
        ),
    ],
    network: Annotated[
        str, typer.Option(help="Simulate time over a network: a profile, or a CSV trace.")
    ] = "",
    target: Annotated[
        list[float] | None,
        typer.Option(help="Tell the bytes to this value of the metric; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the report (default: the run's; of several, ./report)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Report on runs: one page that stands alone, Markdown and CSV of the same numbers.

    Runs of one scenario are put together: arms side by side, seeds as mean and spread. What a run
    did not record is said to be missing. docs/report.md says what is shown.
    """
    from prunecast.simulations.network_profiles import NetworkSpec
    from prunecast.simulations.report import gather, write_studies

    studies = gather(folders, NetworkSpec(network) if network else None)
    written = write_studies(_report_folder(folders, output), studies, targets=target or ())
    files = {name: str(path) for name, path in written.items()}
    if len(folders) == 1 and (folders[0] / "result.json").is_file():
        _show(folders[0], dict(studies[0].result), as_json, files)
    elif as_json:
        typer.echo(json.dumps(files))
    else:
        _show_studies(studies, written["page"])


def _report_folder(folders: Sequence[Path], output: Path | None) -> Path:
    folder = output or (folders[0] if len(folders) == 1 else Path("report"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        from prunecast.common.files import StorageError

        raise StorageError(
            f"cannot make {folder} ({error.strerror or error}): choose another with --output"
        ) from error
    return folder


def _load(source: str, seed: int | None, rounds: int | None, output: Path | None) -> Scenario:
    """A scenario with what the command line replaces."""
    from prunecast.simulations.scenarios import load_scenario

    changes = {"seed": seed, "rounds": rounds, "output": str(output) if output else None}
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    return dataclasses.replace(load_scenario(source), **given)


def _go_on(folder: Path, as_json: bool, log: Sequence[str]) -> None:
    """Resume the run of a folder, with the scenario that lies there."""
    from prunecast.simulations.runner.run import SCENARIO
    from prunecast.simulations.scenarios import load_scenario

    if not (folder / SCENARIO).is_file():
        raise typer.BadParameter(f"{folder} is no folder of a run", param_hint="--resume")
    _run_and_show(load_scenario(str(folder / SCENARIO)), as_json, log, folder)


def _run_and_show(
    scenario: Scenario, as_json: bool, log: Sequence[str], stopped: Path | None = None
) -> None:
    from prunecast.simulations.live import Told, loggers_of
    from prunecast.simulations.report import write_report
    from prunecast.simulations.runner.run import new_run_folder, run_scenario

    loggers = loggers_of(log)
    folder = stopped or new_run_folder(scenario.output, scenario.name)
    progress = RunProgress(make_console(stderr=as_json))
    with progress, Told(loggers, folder) as told:

        def hear(event: Mapping[str, Any]) -> None:
            progress(event)
            told(event)

        result = run_scenario(scenario, folder, on_event=hear, resume=stopped is not None)
        progress({"event": "step", "text": "drawing the report"})
        write_report(folder, result)
    _show(folder, result, as_json, {})


def _show_studies(studies: Sequence[Study], page: Path) -> None:
    """Print the arms of every study."""
    from prunecast.simulations.report import sections_of

    console = make_console()
    for study in studies:
        [table] = sections_of(study)[0].tables
        console.print()
        title = f"{study.scenario['name']}: seeds {', '.join(map(str, study.seeds))}"
        print_table(console, [Column(name) for name in table.header], table.rows, title=title)
    console.print(f"\nopen {page}", soft_wrap=True)


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
