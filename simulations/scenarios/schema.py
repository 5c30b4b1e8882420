"""What a scenario consists of. Every class is one table of the TOML file, every field one key.

The tables ``[data]``, ``[partition]``, ``[task]`` and ``[arms.<name>]`` name a kind of their
registry, whose class has the keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from prunecast.simulations.arms import ARMS, Arm
from prunecast.simulations.data import DATA, DataSource
from prunecast.simulations.kinds import NAME, Kind, Matches, Range
from prunecast.simulations.partitions import PARTITIONS, Partition
from prunecast.simulations.tasks import TASKS, Task

__all__ = [
    "SCHEMA",
    "ClientsSpec",
    "EngineSpec",
    "ModelSpec",
    "ReleaseSpec",
    "Scenario",
    "StrategySpec",
    "TrainingSpec",
]

SCHEMA = 1


@dataclass(frozen=True)
class ClientsSpec:
    """``[clients]``: who trains.

    Attributes:
        count: number of clients.
        fraction: of them that train in a round.
    """

    count: Annotated[int, Range(1)] = 10
    fraction: Annotated[float, Range(0, 1, above=True)] = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """``[model]``: what is trained.

    Attributes:
        factory: ``package.module:function`` that returns a torch module; called without
            arguments, with torch's generator seeded.
        initial: "factory" starts from the weights the factory makes; "drawn" draws weights of
            the same means and spreads from the seed, so that a compressed arm's first keyframe
            is a few bytes. The others start from the weights of the first such arm.
    """

    factory: Annotated[str, Matches("(?s).*:.*", "write it as package.module:function")] = (
        "prunecast.simulations.scenarios.models:digits_cnn"
    )
    initial: Literal["factory", "drawn"] = "factory"


@dataclass(frozen=True)
class TrainingSpec:
    """``[training]``: what a client does in a round (SGD).

    Attributes:
        epochs: passes over the client's examples.
        batch_size: examples in a mini-batch.
        learning_rate: of SGD, in the first round.
        learning_rate_decay: factor from round to round, above 0 and at most 1.
        momentum: of SGD.
        weight_decay: of SGD.
        device: "auto" (CUDA where present), "cpu" or "cuda".
        mixed_precision: "auto" (on CUDA), "on" or "off".
    """

    epochs: Annotated[int, Range(1)] = 1
    batch_size: Annotated[int, Range(1)] = 32
    learning_rate: Annotated[float, Range(0, above=True)] = 0.05
    learning_rate_decay: Annotated[float, Range(0, 1, above=True)] = 1.0
    momentum: Annotated[float, Range(0)] = 0.9
    weight_decay: Annotated[float, Range(0)] = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    mixed_precision: Literal["auto", "on", "off"] = "auto"


@dataclass(frozen=True)
class StrategySpec:
    """``[strategy]``: how the server aggregates.

    Attributes:
        name: one of Flower's, see `prunecast.server.federation.strategies`.
        options: ``[strategy.options]``, keyword arguments of the Flower class.
    """

    name: str = "fedavg"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineSpec:
    """``[engine]``: what runs the clients.

    Attributes:
        backend: "ray", Flower's simulation engine, or "inline", one client after the other
            in one process (small tests, notebooks, machines without Ray).
        concurrent: clients that train at the same time (ray).
        cpus: CPUs for each of them (ray).
        gpus: GPUs, or a fraction of one, for each of them (ray).
    """

    backend: Literal["ray", "inline"] = "ray"
    concurrent: Annotated[int, Range(1)] = 2
    cpus: Annotated[int, Range(1)] = 1
    gpus: Annotated[float, Range(0)] = 0.0


@dataclass(frozen=True)
class ReleaseSpec:
    """``[release]``: deliver the last two published models to an edge device afterwards.

    With `every`, `reach` or `improve`, the arm also releases while it trains.

    Attributes:
        name: of the release.
        arm: whose published models are released; empty for the first that publishes any.
        selftest_images: held-out examples (images or not) that the device tests itself with.
        every: release after every so many rounds; 0 for never.
        metric: of the published model on the held-out examples: "loss", or the task's own, which
            empty stands for.
        reach: release when the metric gets as good as this.
        improve: release when the metric is better by this than in the last release.
    """

    name: Annotated[str, Matches(NAME, "use a-z 0-9 . _ -")] = "model"
    arm: str = ""
    selftest_images: Annotated[int, Range(1)] = 8
    every: Annotated[int, Range(0)] = 0
    metric: str = ""
    reach: float | None = None
    improve: Annotated[float | None, Range(0, above=True)] = None


@dataclass(frozen=True)
class Scenario:
    """A simulation from data to figures.

    Attributes:
        name: also names the run's folder.
        description: one line for the report.
        seed: of partition, initial weights, sampling and local training.
        rounds: of training.
        output: folder that gets a folder per run.
        release: None when nothing is to be released.
    """

    name: Annotated[str, Matches(NAME, "it names a folder: use a-z 0-9 . _ -")] = "scenario"
    description: str = ""
    seed: Annotated[int, Range(0)] = 1
    rounds: Annotated[int, Range(1)] = 30
    output: str = "runs"
    data: DataSource = field(default_factory=DATA.make)
    partition: Partition = field(default_factory=PARTITIONS.make)
    task: Task = field(default_factory=TASKS.make)
    clients: ClientsSpec = field(default_factory=ClientsSpec)
    model: ModelSpec = field(default_factory=ModelSpec)
    training: TrainingSpec = field(default_factory=TrainingSpec)
    strategy: StrategySpec = field(default_factory=StrategySpec)
    engine: EngineSpec = field(default_factory=EngineSpec)
    arms: Mapping[str, Arm] = field(
        default_factory=lambda: {name: ARMS.make(name) for name in ("dense", "prunecast")}
    )
    release: ReleaseSpec | None = None

    def trained_arms(self) -> dict[str, Arm]:
        """The arms that train; the others only measure the messages of one of these."""
        return {name: arm for name, arm in self.arms.items() if arm.trains}

    def recodings_of(self, trained: str) -> dict[str, Arm]:
        """The arms that measure the messages of the arm `trained` again."""
        return {
            name: arm
            for name, arm in self.arms.items()
            if not arm.trains and arm.source(name) == trained
        }

    def publishing_arms(self) -> dict[str, Arm]:
        """The arms that publish versions; the first one is the run's main arm."""
        return {name: arm for name, arm in self.arms.items() if arm.publishes}

    def released_arm(self) -> str | None:
        """The arm whose models are released."""
        if self.release is None:
            return None
        return self.release.arm or next(iter(self.publishing_arms()))

    def to_mapping(self) -> dict[str, Any]:
        """As a mapping that `scenario_from_mapping` reads, with every default filled in."""
        mapping = {"schema": SCHEMA, **dataclasses.asdict(self)}
        for key, value in vars(self).items():
            if isinstance(value, Kind):
                mapping[key] = value.registry.write(value)
        mapping["arms"] = {name: ARMS.write(arm) for name, arm in self.arms.items()}
        if self.release is None:
            del mapping["release"]
        else:
            mapping["release"] = {k: v for k, v in mapping["release"].items() if v is not None}
        return mapping
