"""Scenario files: what a simulation trains, on what data, with which arms."""

from prunecast.simulations.scenarios.errors import ScenarioError
from prunecast.simulations.scenarios.load import (
    load_scenario,
    packaged_scenarios,
    scenario_from_mapping,
)
from prunecast.simulations.scenarios.schema import (
    SCHEMA,
    ArmSpec,
    ClientsSpec,
    DataSpec,
    EngineSpec,
    ModelSpec,
    PartitionSpec,
    ReleaseSpec,
    Scenario,
    StrategySpec,
    TrainingSpec,
)

__all__ = [
    "SCHEMA",
    "ArmSpec",
    "ClientsSpec",
    "DataSpec",
    "EngineSpec",
    "ModelSpec",
    "PartitionSpec",
    "ReleaseSpec",
    "Scenario",
    "ScenarioError",
    "StrategySpec",
    "TrainingSpec",
    "load_scenario",
    "packaged_scenarios",
    "scenario_from_mapping",
]
