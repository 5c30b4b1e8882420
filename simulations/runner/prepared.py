"""What a run needs on disk before it starts, written once and read by every process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.data import load_dataset, partition
from prunecast.simulations.scenarios import Scenario, scenario_from_mapping

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PreparedRun", "held_out", "prepare", "training_tensors"]


@dataclass(frozen=True)
class PreparedRun:
    """A prepared run.

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

    def ledger(self, arm: str) -> Path:
        """Ledger of a trained arm; the first prunecast arm has the plain name."""
        compressed = [n for n, a in self.scenario.arms.items() if a.kind == "prunecast"]
        main = arm == (compressed[0] if compressed else "")
        return self.folder / ("ledger.jsonl" if main else f"ledger-{arm}.jsonl")

    @classmethod
    def open(cls, folder: Path) -> PreparedRun:
        """Read what `prepare` wrote."""
        document = json.loads((folder / "work" / "prepared.json").read_text(encoding="utf-8"))
        scenario = scenario_from_mapping(document["scenario"])
        return cls(folder, scenario, tuple(document["sizes"]))


def prepare(scenario: Scenario, folder: Path) -> PreparedRun:
    """Load and partition the data and write them into ``<folder>/work``.

    Raises:
        DataError: the data cannot be had or cannot be partitioned.
    """
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    data = load_dataset(scenario.data, seed=scenario.seed)
    indices = partition(
        data.y, scenario.partition, clients=scenario.clients.count, seed=scenario.seed
    )
    arrays: dict[str, NDArray[np.generic]] = {"x": data.held_out_x, "y": data.held_out_y}
    np.savez(work / "held-out.npz", **arrays)  # type: ignore[arg-type]
    for number, chosen in enumerate(indices):
        np.savez(work / f"client-{number}.npz", x=data.x[chosen], y=data.y[chosen])
    sizes = tuple(len(chosen) for chosen in indices)
    document = {"scenario": scenario.to_mapping(), "sizes": sizes}
    (work / "prepared.json").write_text(json.dumps(document), encoding="utf-8")
    return PreparedRun(folder, scenario, sizes)


def held_out(prepared: PreparedRun) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Inputs and labels that no client sees."""
    with np.load(prepared.work / "held-out.npz") as file:
        return file["x"], file["y"]


@lru_cache(maxsize=64)
def training_tensors(work: str, number: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of one client, kept in the process that trains it."""
    import torch

    with np.load(Path(work) / f"client-{number}.npz") as file:
        return torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
