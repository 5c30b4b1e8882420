"""Read and check scenario files."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from prunecast.simulations.arms import ARMS, Arm
from prunecast.simulations.data import DATA
from prunecast.simulations.kinds.tables import (
    NAME,
    Range,
    ScenarioError,
    as_table,
    build,
    choice,
)
from prunecast.simulations.partitions import PARTITIONS
from prunecast.simulations.scenarios.schema import SCHEMA, ReleaseSpec, Scenario
from prunecast.simulations.tasks import TASKS

__all__ = ["load_scenario", "packaged_scenarios", "scenario_from_mapping"]


def packaged_scenarios() -> list[str]:
    """Names of the scenarios that come with the package."""
    folder = files("prunecast.simulations.scenarios")
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def load_scenario(source: Path | str) -> Scenario:
    """Read a scenario.

    Args:
        source: path of a TOML file, or the name of a packaged scenario such as "demo".

    Raises:
        ScenarioError: there is no such file, it is no TOML, or a key of it is unusable.
    """
    if str(source) in packaged_scenarios():
        text = files("prunecast.simulations.scenarios").joinpath(f"{source}.toml").read_text()
        base = None
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            names = ", ".join(packaged_scenarios())
            raise ScenarioError(
                "", f"cannot read {source} ({reason})", f"give a TOML file, or one of: {names}"
            ) from error
        base = Path(source).parent
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError("", f"{source} is not TOML ({error})", "correct that line") from error
    scenario = scenario_from_mapping(table)
    if base is not None:
        scenario = dataclasses.replace(scenario, data=scenario.data.located(base))
    return scenario


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
    kinds: dict[str, Any] = {
        key: registry.read(table.pop(key, {}), key)
        for key, registry in (("data", DATA), ("partition", PARTITIONS), ("task", TASKS))
    }
    arms, release = table.pop("arms", None), table.pop("release", None)
    scenario = dataclasses.replace(build(Scenario, table, ""), **kinds)
    if arms is not None:
        scenario = dataclasses.replace(scenario, arms=_arms(arms))
    if release is not None:
        made = build(ReleaseSpec, release, "release")
        made = dataclasses.replace(made, metric=made.metric or scenario.task.metric)
        scenario = dataclasses.replace(scenario, release=made)
    _check(scenario)
    return scenario


def _arms(table: object) -> dict[str, Arm]:
    arms = {}
    for name, entry in as_table(table, "arms").items():
        if not NAME.fullmatch(name):
            raise ScenarioError(
                f"arms.{name}", "names files, so it cannot be used", "use a-z 0-9 . _ -"
            )
        arms[name] = ARMS.read(entry, f"arms.{name}")
    return arms


def _check(s: Scenario) -> None:
    if not NAME.fullmatch(s.name):
        raise ScenarioError("name", f"is {s.name!r}", "it names a folder: use a-z 0-9 . _ -")
    if ":" not in s.model.factory:
        raise ScenarioError(
            "model.factory", f"is {s.model.factory!r}", "write it as package.module:function"
        )
    s.data.check("data")
    if not s.trained_arms():
        kinds = ", ".join(name for name in ARMS.names() if ARMS.find(name).trains)
        raise ScenarioError("arms", "nothing is trained", f"add an arm of kind {kinds}")
    for name, arm in s.arms.items():
        arm.check(f"arms.{name}", s.arms)
    if s.release is not None:
        publishing = s.publishing_arms()
        if not publishing:
            raise ScenarioError("release", "there is no model to release", "add a prunecast arm")
        if s.release.arm:
            choice("release.arm", s.release.arm, publishing)
        if not NAME.fullmatch(s.release.name):
            raise ScenarioError("release.name", f"is {s.release.name!r}", "use a-z 0-9 . _ -")
        choice("release.metric", s.release.metric, (s.task.metric, "loss"))
        if s.release.improve is not None:
            Range(0, above=True).check("release.improve", s.release.improve)
