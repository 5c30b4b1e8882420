"""The named data sets, by name."""

from __future__ import annotations

from prunecast.simulations.data.named import graphs, images, plays, series, tables
from prunecast.simulations.data.named.definition import DataSet
from prunecast.simulations.kinds import ScenarioError

__all__ = ["CATALOGUE", "find"]

CATALOGUE: dict[str, DataSet] = {
    data.name: data for module in (images, series, plays, tables, graphs) for data in module.SETS
}
"""All of them, those first that need nothing."""


def find(name: str, key: str = "") -> DataSet:
    """A data set by its name.

    Args:
        name: of it.
        key: of the scenario, for messages.

    Raises:
        ScenarioError: there is none of that name.
    """
    if name not in CATALOGUE:
        problem = f"there is no data set {name!r}" if name else "no data set is named"
        raise ScenarioError(key, problem, f"choose one of {', '.join(CATALOGUE)}")
    return CATALOGUE[name]
