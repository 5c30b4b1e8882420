"""Data sets by name, which `prunecast data` brings into the user's cache; none is bundled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunecast.simulations.data import DataSource, Examples
from prunecast.simulations.data.idx import pictures

__all__ = ["Named"]


@dataclass(frozen=True)
class Named(DataSource):
    """A data set of the catalogue; nothing is fetched here.

    Images of bytes become (1, height, width) float32 in [0, 1], other whole numbers int64.

    Attributes:
        name: as `prunecast data list` shows it.
    """

    name: str = ""

    unused = ("path",)

    def check(self, key: str) -> None:
        """There is such a data set."""
        from prunecast.simulations.data.named.catalogue import find

        find(self.name, f"{key}.name")

    def read(self) -> Examples:
        """What the data set gives to train on."""
        found = self._part("train")
        assert found is not None
        return found

    def read_test(self) -> Examples | None:
        """What it sets apart to measure with."""
        return self._part("test")

    def _part(self, part: str) -> Examples | None:
        from prunecast.simulations.data.named.cache import load
        from prunecast.simulations.data.named.catalogue import find

        data = find(self.name, "data.name")
        end = f"_{part}"
        found = {k.removesuffix(end): v for k, v in load(data).items() if k.endswith(end)}
        if not found:
            return None
        targets, identities = found.pop("y"), found.pop("id", None)
        for name, values in found.items():
            if data.pictures:
                found[name] = pictures(values)
            elif values.dtype.kind in "iu":
                found[name] = values.astype(np.int64)
        if targets.dtype.kind in "iu":
            targets = targets.astype(np.int64)
        whose = None if identities is None else identities.astype(np.int64)
        return Examples(found, targets, whose)
