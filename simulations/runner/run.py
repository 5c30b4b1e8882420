"""Run a scenario from its data to the files of its run folder."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prunecast.common.references import load_callable
from prunecast.common.text import quiet
from prunecast.simulations.runner import SimulationError
from prunecast.simulations.runner.engine import ENVIRONMENT, run_engine
from prunecast.simulations.runner.prepared import PartitionedData, partition_data, prepare
from prunecast.simulations.runner.result import SCHEMA, build_arms, write_result
from prunecast.simulations.scenarios import Scenario, ScenarioError

__all__ = ["check_scenario", "new_run_folder", "run_scenario"]

OnEvent = Callable[[Mapping[str, Any]], None]


def new_run_folder(output: Path | str, name: str) -> Path:
    """Make ``<output>/<UTC time>-<name>``, a folder that did not exist.

    Raises:
        SimulationError: it cannot be made.
    """
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
        return folder
    raise SimulationError(f"too many runs named {name!r} in one second")


def check_scenario(scenario: Scenario) -> PartitionedData:
    """Find out before anything is started whether a scenario can be run.

    Returns:
        Its data, spread over the clients.

    Raises:
        FederationError: a preset, knob, strategy, option or release rule is unknown or out of
            range.
        ScenarioError: the model's factory cannot be imported.
        DataError: the data cannot be had, do not suit the task, or cannot be partitioned.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)  # before flwr is imported
    from prunecast.simulations.runner.delivery import rule_of
    from prunecast.simulations.runner.federate import strategy_of

    for arm in scenario.trained_arms().values():
        arm.grid_policy()
    with quiet("flwr"):  # making a strategy warns of what is the engine's to say
        strategy_of(scenario)
    if scenario.release is not None:
        rule_of(scenario.release, scenario.task)
    try:
        load_callable(scenario.model.factory)
    except ValueError as error:
        raise ScenarioError(
            "model.factory",
            str(error),
            "name a function as package.module:function, installed or in the current folder",
        ) from error
    return partition_data(scenario)


def run_scenario(
    scenario: Scenario, folder: Path, *, on_event: OnEvent = lambda event: None
) -> dict[str, Any]:
    """Run every arm, deliver the release if there is one, and write ``result.json``.

    Args:
        scenario: what to run.
        folder: of the run, see `new_run_folder`.
        on_event: told of every arm's events, see docs/run.md, and of ``step`` (``text``); a
            ``round-finished`` also has ``score``, the task's metric as text.

    Returns:
        The content of ``result.json``.

    Raises:
        DataError, FederationError, ScenarioError: see `check_scenario`; the folder is removed.
        SimulationError: the engine or the device failed.
    """
    task = scenario.task
    started, clock = datetime.now(UTC), time.monotonic()
    try:
        on_event({"event": "step", "text": "checking the scenario and its data"})
        prepared = prepare(scenario, folder, check_scenario(scenario))
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
                "metric": task.metric,
                "percent": task.percent,
                "lower_is_better": task.lower_is_better,
                "verb": task.verb,
            },
            "data": {
                "partition": scenario.partition.text(),
                "training": sum(prepared.sizes),
                "held_out": scenario.data.held_out,
                "per_client": list(prepared.sizes),
            },
            "arms": build_arms(prepared, outcomes),
            "release": release,
        }
        write_result(folder, document)
    finally:
        shutil.rmtree(folder / "work", ignore_errors=True)
        with suppress(OSError):
            folder.rmdir()  # where the run failed before it wrote anything
    return json.loads(json.dumps(document))  # type: ignore[no-any-return]


def _software() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("prunecast", "flwr", "ray", "torch", "numpy", "onnxruntime", "tuf", "zstandard"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
