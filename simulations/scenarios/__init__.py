"""Scenario files: what a simulation trains, on what data, with which arms."""

from prunecast.simulations.kinds.tables import ScenarioError
from prunecast.simulations.scenarios.load import (
    load_scenario,
    packaged_scenarios,
    scenario_from_mapping,
)
from prunecast.simulations.scenarios.schema import ReleaseSpec, Scenario

__all__ = [
    "ReleaseSpec",
    "Scenario",
    "ScenarioError",
    "load_scenario",
    "packaged_scenarios",
    "scenario_from_mapping",
]
