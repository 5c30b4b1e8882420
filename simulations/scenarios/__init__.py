"""Scenario files: what a simulation trains, on what data, with which arms."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from prunecast.simulations.arms import ARMS
from prunecast.simulations.kinds import NAME, ScenarioError, build, choice
from prunecast.simulations.scenarios.schema import SCHEMA, ReleaseSpec, Scenario

__all__ = [
    "ReleaseSpec",
    "Scenario",
    "ScenarioError",
    "load_scenario",
    "packaged_scenarios",
    "scenario_from_mapping",
]


def packaged_scenarios() -> list[str]:
    """Names of the scenarios that come with the package."""
    entries = files(__name__).iterdir()
    return sorted(e.name.removesuffix(".toml") for e in entries if e.name.endswith(".toml"))


def load_scenario(source: Path | str) -> Scenario:
    """Read a scenario.

    Args:
        source: path of a TOML file, or the name of a packaged scenario such as "demo".

    Raises:
        ScenarioError: there is no such file, it is no TOML, or a key of it is unusable.
    """
    packaged = str(source) in packaged_scenarios()
    try:
        path = files(__name__) / f"{source}.toml" if packaged else Path(source)
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError("", f"{source} is not TOML ({error})", "correct that line") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        names = ", ".join(packaged_scenarios())
        raise ScenarioError(
            "", f"cannot read {source} ({reason})", f"give a TOML file, or one of: {names}"
        ) from error
    scenario = scenario_from_mapping(table)
    if packaged:
        return scenario
    return dataclasses.replace(scenario, data=scenario.data.located(Path(source).parent))


def scenario_from_mapping(table: Mapping[str, Any]) -> Scenario:
    """Build a scenario from parsed TOML (or JSON), checking every key.

    Raises:
        ScenarioError: names the key, what is wrong with it, and the remedy.
    """
    table = dict(table)
    schema = table.pop("schema", None)
    if schema != SCHEMA:
        found = "is missing" if schema is None else f"is {schema!r}"
        raise ScenarioError("schema", found, f"this version reads schema = {SCHEMA}")
    scenario = build(Scenario, table, "")
    if (release := scenario.release) is not None:
        release = dataclasses.replace(release, metric=release.metric or scenario.task.metric)
        scenario = dataclasses.replace(scenario, release=release)
    _check(scenario)
    return scenario


def _check(s: Scenario) -> None:
    """What more than one table decides."""
    s.data.check("data")
    if not s.trained_arms():
        kinds = ", ".join(name for name in ARMS.names() if ARMS.find(name).trains)
        raise ScenarioError("arms", "nothing is trained", f"add an arm of kind {kinds}")
    for name, arm in s.arms.items():
        if not re.fullmatch(NAME, name):
            raise ScenarioError(
                f"arms.{name}", "names files, so it cannot be used", "use a-z 0-9 . _ -"
            )
        arm.check(f"arms.{name}", s.arms)
    if s.release is not None:
        publishing = s.publishing_arms()
        if not publishing:
            raise ScenarioError("release", "there is no model to release", "add a prunecast arm")
        if s.release.arm:
            choice("release.arm", s.release.arm, publishing)
        choice("release.metric", s.release.metric, (s.task.metric, "loss"))
