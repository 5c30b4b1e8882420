"""`SecureStrategy`: what secure aggregation sums, brought back to the master weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.flower.internals import legacy_arrays, legacy_parameters
from prunecast.compression.versions import LatticeTensor
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.exchange.grid import CompressedGrid
from prunecast.server.federation.publishing.version import Version

__all__ = ["SecureStrategy"]


class SecureStrategy:
    """A strategy of Flower's legacy API, for `SecAggPlusWorkflow` over a grid that compresses.

    The workflow gives its strategy the mean of what the nodes trained, and the nodes trained the
    *published* model. Were that the next master, all that rounding to the lattice dropped would be
    lost in every round, and changes smaller than half a step would never add up. So the strategy is
    given ``master + (mean - published)``, where weights are kept, and the master elsewhere::

        grid = CompressedGrid(grid, "small")
        strategy = SecureStrategy(FedAvg(...), grid)
        legacy = LegacyContext(context, config=ServerConfig(num_rounds=20), strategy=strategy)
        DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(3, 2))(grid, legacy)

    It needs no more than the mean, so nobody learns more of a node than without. Vectors may be
    whole, or of the kept weights alone (`prunecast.client.shared_mask_mod`).

    Args:
        strategy: the one to wrap; everything but `aggregate_fit` is its own.
        grid: through which the workflow sends its messages.
    """

    def __init__(self, strategy: Any, grid: CompressedGrid) -> None:
        self._strategy, self._grid = strategy, grid
        grid.allow_secure_aggregation()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def aggregate_fit(
        self, server_round: int, results: Sequence[tuple[Any, Any]], failures: Sequence[Any]
    ) -> Any:
        """See `flwr.server.strategy.Strategy.aggregate_fit`; every result has the mean.

        Raises:
            FederationError: the mean is of another model than was sent.
        """
        version = self._grid.securely_trained
        if version is not None:
            made: dict[int, Any] = {}  # the workflow gives all of them the same object
            for _, result in results:
                key = id(result.parameters)
                if key not in made:
                    mean = legacy_arrays(result.parameters)
                    made[key] = result.parameters, legacy_parameters(restored(mean, version))
                result.parameters = made[key][1]
        return self._strategy.aggregate_fit(server_round, results, failures)


def restored(mean: Sequence[NDArray[Any]], version: Version) -> list[NDArray[Any]]:
    """What the master weights of a version become by a mean of what was trained from it.

    Args:
        mean: an array for each tensor, in the version's order: whole, or its kept weights.
        version: that the nodes trained.

    Raises:
        FederationError: the arrays are of another model.
    """
    tensors = version.model.tensors
    if len(mean) != len(tensors):
        raise FederationError(
            f"secure aggregation made {len(mean)} arrays of a model of {len(tensors)}: the nodes "
            "answered with another model than they were sent"
        )
    return [
        _restored(name, array, tensor, version.master)
        for (name, tensor), array in zip(tensors.items(), mean, strict=True)
    ]


def _restored(
    name: str, mean: NDArray[Any], tensor: Any, masters: Mapping[str, NDArray[Any]]
) -> NDArray[Any]:
    master, held, mask = masters[name], tensor.dense(), tensor.mask()
    whole = mean.astype(np.float64)
    if mask is not None and mean.shape == (np.count_nonzero(mask),):
        whole = held.astype(np.float64)
        whole[mask] = mean
    elif mean.shape != held.shape:
        raise FederationError(
            f"secure aggregation made an array of shape {mean.shape} of tensor {name!r}, which has "
            f"shape {held.shape}: give all nodes the same mods"
        )
    if isinstance(tensor, LatticeTensor):
        change = whole - held.astype(np.float64)
        whole = master + (change if mask is None else change * mask)
    if master.dtype.kind in "iu":
        whole = np.rint(whole)
    return whole.astype(master.dtype)
