"""What a run needs on disk before it starts, written once and read by every process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.data import Examples, load_examples
from prunecast.simulations.scenarios import Scenario, scenario_from_mapping

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PartitionedData", "PreparedRun", "partition_data", "prepare", "tensors"]


PartitionedData = tuple[Examples, Examples, list[NDArray[np.int64]]]
"""Examples to train on, held-out ones, and the numbers of those that each client holds."""


def partition_data(scenario: Scenario) -> PartitionedData:
    """Load the data of a scenario, hold examples out, and spread the others.

    Raises:
        DataError: the data cannot be had, do not suit the task, or cannot be partitioned.
    """
    training, held_out = load_examples(scenario.data, scenario.task, seed=scenario.seed)
    groups = scenario.partition.groups(training, scenario.task)
    clients = scenario.partition.split(groups, clients=scenario.clients.count, seed=scenario.seed)
    return training, held_out, clients


@dataclass(frozen=True)
class PreparedRun:
    """A run whose data lie on disk.

    Attributes:
        folder: of the run; results stay here.
        scenario: what to run.
        sizes: examples per client.
    """

    folder: Path
    scenario: Scenario
    sizes: tuple[int, ...]

    @property
    def work(self) -> Path:
        """Scratch files, removed after the run."""
        return self.folder / "work"

    @property
    def store(self) -> Path:
        """What the simulated nodes keep between messages."""
        return self.work / "store"

    @property
    def held_out(self) -> Path:
        """File of the examples that no client sees; `Examples.load` reads it."""
        return self.work / "held-out.npz"

    def client(self, number: int) -> Path:
        """File of the examples of one client."""
        return self.work / f"client-{number}.npz"

    def ledger(self, arm: str) -> Path:
        """Ledger of a trained arm; the first one that publishes versions has the plain name."""
        main = arm == next(iter(self.scenario.publishing_arms()), None)
        return self.folder / ("ledger.jsonl" if main else f"ledger-{arm}.jsonl")

    def checkpoint(self, arm: str) -> Path:
        """Newest checkpoint of an arm that is being trained."""
        return self.work / f"arm-{arm}.safetensors"

    def outcome(self, arm: str) -> Path:
        """What training an arm gave, once it is over."""
        return self.work / f"arm-{arm}.json"

    @property
    def resumable(self) -> bool:
        """Whether something of what was trained is left to go on from."""
        return any(
            path.exists()
            for arm in self.scenario.trained_arms()
            for path in (self.outcome(arm), self.checkpoint(arm))
        )

    @classmethod
    def open(cls, folder: Path) -> PreparedRun:
        """Read what `prepare` wrote."""
        document = json.loads((folder / "work" / "prepared.json").read_text(encoding="utf-8"))
        scenario = scenario_from_mapping(document["scenario"])
        return cls(folder, scenario, tuple(document["sizes"]))


def prepare(scenario: Scenario, folder: Path, data: PartitionedData | None = None) -> PreparedRun:
    """Write the data of a run into ``<folder>/work``.

    Args:
        scenario: what to run.
        folder: of the run.
        data: what `partition_data` gave for the scenario; None loads them.

    Raises:
        DataError: see `partition_data`.
    """
    training, held_out, clients = data or partition_data(scenario)
    sizes = tuple(len(chosen) for chosen in clients)
    prepared = PreparedRun(folder, scenario, sizes)
    prepared.work.mkdir(parents=True, exist_ok=True)
    held_out.save(prepared.held_out)
    for number, chosen in enumerate(clients):
        training.take(chosen).save(prepared.client(number))
    document = {"scenario": scenario.to_mapping(), "sizes": sizes}
    (prepared.work / "prepared.json").write_text(json.dumps(document), encoding="utf-8")
    return prepared


@lru_cache(maxsize=64)
def tensors(path: Path) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs and targets of a file of examples, kept in the process that uses them."""
    import torch

    found = Examples.load(path)
    inputs = tuple(torch.from_numpy(values) for values in found.inputs.values())
    return inputs, torch.from_numpy(found.targets)
