"""Run a scenario from its data to the files of its run folder."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunecast.common.files import write_atomically
from prunecast.common.text import quiet
from prunecast.simulations.kinds import ScenarioError, written
from prunecast.simulations.network_profiles.results import add_simulated_time, entries_of
from prunecast.simulations.runner import ResultError, SimulationError
from prunecast.simulations.runner.budgets import budget_figures
from prunecast.simulations.runner.engine import ENVIRONMENT, run_engine
from prunecast.simulations.runner.metrics import pruning_figures
from prunecast.simulations.runner.prepared import (
    PartitionedData,
    PreparedRun,
    partition_data,
    prepare,
)
from prunecast.simulations.scenarios import Scenario, save_scenario

if TYPE_CHECKING:
    from prunecast.server.federation import Tally
    from prunecast.server.federation.reporting.events import OnEvent
    from prunecast.server.federation.reporting.ledger import Direction

__all__ = [
    "SCENARIO",
    "SCHEMA",
    "build_arms",
    "check_scenario",
    "new_run_folder",
    "read_result",
    "run_scenario",
]

_MADE = "made.json"  # in the scratch folder: the folders that a run made, the innermost first

SCENARIO = "scenario.toml"
"""In a run's folder, the scenario in full: running it again gives the same."""

SCHEMA = 2
"""Of ``result.json``, every key of which docs/result.md explains."""


def new_run_folder(output: Path | str, name: str) -> Path:
    """Make ``<output>/<UTC time>-<name>``, a folder that did not exist.

    Raises:
        SimulationError: it cannot be made.
    """
    made = [parent for parent in Path(output, name).parents if not parent.exists()]
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    for suffix in ["", *(f"-{number}" for number in range(2, 100))]:
        folder = Path(output) / f"{stamp}-{name}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise SimulationError(
                f"cannot make {folder} ({error.strerror or error}): choose another output folder"
            ) from error
        (folder / "work").mkdir()
        text = json.dumps([str(path.absolute()) for path in (folder, *made)])
        (folder / "work" / _MADE).write_text(text, encoding="utf-8")
        return folder
    raise SimulationError(f"too many runs named {name!r} in one second")


def check_scenario(scenario: Scenario) -> PartitionedData:
    """Find out before anything is started whether a scenario can be run.

    Returns:
        Its data, spread over the clients.

    Raises:
        FederationError: a preset, knob, strategy, option or release rule is unknown or out of
            range, or a model cannot be pruned as its arm asks.
        ScenarioError: the model's factory cannot be imported, or makes no model.
        DataError: the data cannot be had, do not suit task and model, or cannot be partitioned.
    """
    for key, value in ENVIRONMENT.items():
        if key != "HF_HUB_OFFLINE" or not scenario.data.fetches:
            os.environ.setdefault(key, value)  # before flwr is imported
    from prunecast.server.federation import PolicyError
    from prunecast.simulations.runner.delivery import rule_of
    from prunecast.simulations.runner.federate import strategy_of

    for name, arm in scenario.trained_arms().items():
        if arm.missing():
            raise ScenarioError(f"arms.{name}", "is not installed", arm.missing())
        try:
            arm.grid_policy()
        except PolicyError as error:
            raise PolicyError(f"arms.{name}: {error}") from error
    with quiet("flwr"):  # making a strategy warns of what is the engine's to say
        strategy_of(scenario)
    for option in ("min_train_nodes", "min_available_nodes", "min_evaluate_nodes"):
        wanted = scenario.strategy.options.get(option, 0)
        if isinstance(wanted, int) and wanted > scenario.clients.count:
            raise ScenarioError(
                f"strategy.options.{option}",
                f"is {wanted}, and there are {scenario.clients.count} clients: no round begins",
                "lower it, or raise clients.count",
            )
    if scenario.network is not None:
        scenario.network.links()
    if scenario.release is not None:
        rule_of(scenario.release, scenario.task)
    scenario.model.network()
    from prunecast.simulations.runner.checks import check_data_and_model, check_pruning

    data = partition_data(scenario)
    check_data_and_model(scenario, data)
    check_pruning(scenario, data)
    return data


def run_scenario(
    scenario: Scenario,
    folder: Path,
    *,
    on_event: OnEvent = lambda event: None,
    resume: bool = False,
) -> dict[str, Any]:
    """Run every arm, deliver the release if there is one, and write ``result.json``.

    Args:
        scenario: what to run.
        folder: of the run, see `new_run_folder`.
        on_event: told of every arm's events, see docs/run.md, and of ``step`` (``text``); a
            ``round-finished`` also has ``score``, the task's metric as text.
        resume: go on with a run in this folder that was stopped: arms that were trained are not
            trained again, and the one that was being trained goes on after its last checkpoint.

    Returns:
        The content of ``result.json``.

    Raises:
        DataError, FederationError, ScenarioError: see `check_scenario`; the folder is removed.
        SimulationError: the engine or the device failed, or there is nothing to resume. What was
            trained stays in the folder then, to be gone on with.
    """
    task = scenario.task
    started, clock = datetime.now(UTC), time.monotonic()
    try:
        on_event({"event": "step", "text": "checking the scenario and its data"})
        data = check_scenario(scenario)
        held_out = len(data[1])
        prepared = _resumable(folder) if resume else prepare(scenario, folder, data)
        del data
        save_scenario(scenario, folder / SCENARIO)
        on_event({"event": "step", "text": "starting the engine"})
        outcomes: list[dict[str, Any]] = []
        for event in run_engine(prepared, folder / "engine.log"):
            if event["event"] == "outcome":
                outcomes = event["arms"]
            else:
                on_event(event)
        release = None
        if scenario.release is not None:
            from prunecast.simulations.runner.delivery import deliver

            release = deliver(prepared, lambda text: on_event({"event": "step", "text": text}))
            by_name = {outcome["name"]: outcome for outcome in outcomes}
            release["automatic"] = by_name[release["arm"]]["releases"]
        document = {
            "schema": SCHEMA,
            "scenario": scenario.to_mapping(),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 3),
            "software": _software(),
            "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
            "task": {
                key: getattr(task, key) for key in ("metric", "percent", "lower_is_better", "verb")
            },
            "data": {
                "partition": scenario.partition.text(),
                "training": sum(prepared.sizes),
                "held_out": held_out,
                "per_client": list(prepared.sizes),
            },
            "arms": build_arms(prepared, outcomes),
            "release": release,
        }
        if scenario.network is not None:
            add_simulated_time(document, folder, scenario.network)
        text = json.dumps(document, indent=2) + "\n"
        write_atomically(folder / "result.json", text.encode())
    except BaseException:
        if _is_resumable(folder):
            again = f"prunecast simulate {folder} --resume"
            on_event({"event": "step", "text": f"stopped; to go on: {again}"})
        else:
            (folder / SCENARIO).unlink(missing_ok=True)  # of a run that left nothing
            _clean(folder)
        raise
    _clean(folder)
    return json.loads(text)  # type: ignore[no-any-return]


def _is_resumable(folder: Path) -> bool:
    with suppress(OSError, ValueError, KeyError):
        return PreparedRun.open(folder).resumable
    return False


def _resumable(folder: Path) -> PreparedRun:
    """What a run that was stopped has left.

    Raises:
        SimulationError: it has finished, or stopped before anything was trained.
    """
    if not _is_resumable(folder):
        raise SimulationError(
            f"{folder} has nothing to go on from: it has finished, or was stopped before the first "
            "round was over. Run the scenario again, without --resume"
        )
    return PreparedRun.open(folder)


def _clean(folder: Path) -> None:
    """Remove scratch files, and the folders that were made for a run that wrote nothing."""
    made: list[str] = []
    with suppress(OSError, ValueError):
        made = json.loads((folder / "work" / _MADE).read_text(encoding="utf-8"))
    shutil.rmtree(folder / "work", ignore_errors=True)
    with suppress(OSError):  # one that holds something stays, and so do those around it
        for path in made:
            Path(path).rmdir()


def _software() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("prunecast", "flwr", "ray", "torch", "numpy", "onnxruntime", "tuf", "zstandard"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# -- the result ----------------------------------------------------------------------------------


def build_arms(
    prepared: PreparedRun, outcomes: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The ``arms`` part of the result: what every arm reached, and what it cost.

    Args:
        prepared: the finished run, with its ledgers.
        outcomes: what training each arm gave, as the engine reports it.
    """
    from prunecast.server.federation import Tally

    arms: dict[str, dict[str, Any]] = {}
    by_name = {outcome["name"]: outcome for outcome in outcomes}
    metric = prepared.scenario.task.metric
    for name, arm in prepared.scenario.arms.items():
        source = arm.source(name)
        outcome, path = by_name[source], prepared.ledger(source)
        tally = Tally(entries_of(path, None if arm.trains else name))
        rounds = [dict(row) for row in outcome["rounds"]]
        for row in rounds:
            so_far = tally.totals(rounds=range(row["round"] + 1))
            row.update(bytes_up=so_far.bytes_up, bytes_down=so_far.bytes_down)
        total = tally.totals()
        last = rounds[-1]
        arms[name] = {
            **written(arm),
            "label": arm.label(name),
            "text": arm.text(),
            "trained": arm.trains,
            "published": arm.publishes,
            "baseline": arm.baseline,
            metric: last[metric],
            "loss": last["loss"],
            "sparsity": last["sparsity"],
            "bytes_up": total.bytes_up,
            "bytes_down": total.bytes_down,
            "messages": total.messages,
            "wire": total.wire(),
            "encode_ms": round(total.encode_ms, 3),
            "decode_ms": round(total.decode_ms, 3),
            "seconds": round(outcome["seconds"], 3) if arm.trains else None,
            "ledger": path.name,
            "store_bytes": outcome["store_bytes"] if arm.trains else None,
            "forgotten": outcome["forgotten"] if arm.trains else None,
            "pruning": _pruning(outcome, rounds, prepared) if arm.trains else None,
            "nodes": [str(node) for node in outcome["nodes"]],
            "by_kind": _by_kind(tally),
            "widths": last.get("widths") if arm.trains else None,
            "classes": last.get("classes") if arm.trains else None,
            "budget": budget_figures(rounds) if arm.trains else None,
            "rounds": rounds,
        }
    baseline = next((n for n, a in arms.items() if a["baseline"]), None)
    if baseline is not None:
        base = arms[baseline]["bytes_up"] + arms[baseline]["bytes_down"]
        for figures in arms.values():
            spent = figures["bytes_up"] + figures["bytes_down"]
            figures["reduction"] = round(base / spent, 3)
    return arms


def _pruning(
    outcome: Mapping[str, Any], rounds: list[dict[str, Any]], prepared: PreparedRun
) -> dict[str, Any] | None:
    if outcome["model"] is None:
        return None
    task = prepared.scenario.task
    return pruning_figures(outcome["model"], rounds, task, outcome["mask_cost"])


def _by_kind(tally: Tally) -> dict[str, dict[str, dict[str, int]]]:
    sums: dict[str, dict[str, dict[str, int]]] = {"down": {}, "up": {}}
    directions: tuple[Direction, ...] = ("down", "up")
    for direction in directions:
        for kind in tally.kinds(direction):
            found = tally.totals(direction=direction, kind=kind)
            sums[direction][kind] = {"messages": found.messages, "bytes": found.payload_bytes}
    return sums


def read_result(folder: Path) -> dict[str, Any]:
    """Read ``result.json`` of a run folder.

    Raises:
        ResultError: missing, damaged, or of another schema.
    """
    path = Path(folder) / "result.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(
            f"cannot read {path} ({error.strerror or error}): give the folder of a finished run"
        ) from error
    except ValueError as error:
        raise ResultError(f"{path} is damaged ({error}): run the scenario again") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ResultError(f"{path} is not of schema {SCHEMA}: render it with the version it is of")
    missing = [key for key in ("scenario", "task", "arms", "seconds") if key not in document]
    if missing:
        raise ResultError(f"{path} has no {missing[0]!r}: run the scenario again")
    return document
