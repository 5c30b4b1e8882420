"""Run a scenario from its data to the files of its run folder."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prunecast.simulations.runner import SimulationError
from prunecast.simulations.runner.engine import ENVIRONMENT, run_engine
from prunecast.simulations.runner.prepared import prepare
from prunecast.simulations.runner.result import SCHEMA, build_arms, write_result
from prunecast.simulations.scenarios import Scenario

__all__ = ["new_run_folder", "run_scenario"]

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


def run_scenario(
    scenario: Scenario, folder: Path, *, on_event: OnEvent = lambda event: None
) -> dict[str, Any]:
    """Run every arm, deliver the release if there is one, and write ``result.json``.

    Args:
        scenario: what to run.
        folder: of the run, see `new_run_folder`.
        on_event: told of progress: mappings with a key ``event``: ``step`` (``text``), ``arm``
            (``arm``, ``rounds``), ``round`` (see `ArmOutcome`), ``arm-done``.

    Returns:
        The content of ``result.json``.

    Raises:
        DataError: the data cannot be had or partitioned.
        FederationError: a preset, knob, strategy or option is unknown.
        SimulationError: the engine or the device failed.
        ValueError: the model's factory cannot be imported.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)  # before flwr is imported
    started, clock = datetime.now(UTC), time.monotonic()
    on_event({"event": "step", "text": "checking the scenario"})
    from prunecast.simulations.runner.federate import check_scenario

    with _quiet_flower():
        check_scenario(scenario)
    on_event({"event": "step", "text": "loading and partitioning the data"})
    prepared = prepare(scenario, folder)
    try:
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
            "data": {
                "training": sum(prepared.sizes),
                "held_out": scenario.data.held_out,
                "per_client": list(prepared.sizes),
            },
            "arms": build_arms(prepared, outcomes),
            "release": release,
        }
        write_result(folder, document)
    finally:
        shutil.rmtree(prepared.work, ignore_errors=True)
    return json.loads(json.dumps(document))  # type: ignore[no-any-return]


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Making a strategy logs warnings that belong to the engine's log."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _software() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("prunecast", "flwr", "ray", "torch", "numpy", "onnxruntime", "tuf", "zstandard"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
