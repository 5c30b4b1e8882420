"""`prunecast compare`: one scenario under many arms."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from prunecast.cli.console import Column, make_console, print_table
from prunecast.cli.simulate import Log, RunProgress

__all__ = ["compare"]


def compare(
    scenario: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a packaged scenario: demo.")
    ],
    more_seeds: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    arms: Annotated[
        str, typer.Option(help="Arms to compare, such as dense,stc,small; default: all peers.")
    ] = "",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds instead of the scenario's.")
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds, such as 1 2 3 or 1,2,3; default: the scenario's.")
    ] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File that also gets the figures as JSON.")
    ] = None,
    network: Annotated[
        str,
        typer.Option(help="Simulate time over a network: a profile, or a CSV trace."),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the comparison; what is finished there is kept."),
    ] = None,
    log: Log = None,
) -> None:
    """Compare a scenario's model under peers and presets: bytes of both directions, accuracy.

    Every arm has the same data, seeds, strategy and ledger. Arms run one after the other; those
    that were finished in the folder before, with the same scenario, are kept. docs/compare.md
    says what each arm is.
    """
    from prunecast.common.files import write_atomically
    from prunecast.simulations.comparison import Comparison, compared_rows, published_lines
    from prunecast.simulations.live import Told, loggers_of
    from prunecast.simulations.report import gather, write_studies
    from prunecast.simulations.scenarios import load_scenario

    if "" not in sys.path:  # a model of the current folder, as `python -m` finds it
        sys.path.insert(0, "")
    if more_seeds and not seeds:
        raise typer.BadParameter(f"got {more_seeds[0]!r} besides the scenario")
    comparison = Comparison.of(
        load_scenario(scenario),
        names=_names(arms),
        seeds=_numbers(" ".join([seeds, *(more_seeds or [])])),
        rounds=rounds,
        folder=out,
        network=network,
    )
    console = make_console()
    progress = RunProgress(make_console(stderr=True))
    with Told(loggers_of(log or ()), comparison.folder) as listener, progress:

        def hear(event: Mapping[str, Any]) -> None:
            progress({**event, "event": "step"} if event["event"] in ("kept", "failed") else event)
            listener(event)

        document = comparison.run(hear)
    if json_file is not None:
        write_atomically(json_file, (json.dumps(document, indent=2) + "\n").encode())
    header, rows = compared_rows(document)
    told = ", ".join(map(str, document["seeds"]))
    title = f"{document['scenario']['name']}: {document['rounds']} rounds, seed {told}"
    console.print()
    print_table(console, [Column(name) for name in header], rows, title=title)
    metric, last = document["task"]["metric"], document["last_rounds"]
    mean = "after the last round" if last == 1 else f"mean of the last {last} rounds"
    console.print(f"{metric}: {mean}, ± standard deviation over seeds")
    if document["network"]:
        profile = document["network"]["profile"]
        console.print(f"simulated: what the bytes would take over {profile}; not measured")
    for line in published_lines(document):
        console.print(line, soft_wrap=True)
    for name, why in document["left_out"].items():
        console.print(f"{name} was left out: {why}", soft_wrap=True)
    page = write_studies(comparison.folder, gather([comparison.folder]))["page"]
    console.print(f"\n{comparison.folder}  (open {page})", soft_wrap=True)


def _names(text: str) -> list[str]:
    return [name for name in re.split(r"[\s,]+", text) if name]


def _numbers(text: str) -> list[int]:
    found = _names(text)
    for number in found:
        if not re.fullmatch(r"[0-9]{1,15}", number):
            raise typer.BadParameter(f"a seed is {number!r}: give whole numbers, such as 1 2 3")
    return [int(number) for number in found]
