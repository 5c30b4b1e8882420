"""Scenario files: what a simulation trains, on what data, with which arms.

Every class is one table of the TOML file, every field one key. The tables ``[data]``,
``[partition]``, ``[task]`` and ``[arms.<name>]`` name a kind of their registry, whose class has the
keys.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prunecast.common.files import write_atomically
from prunecast.simulations.arms import ARMS, Arm
from prunecast.simulations.data import DATA, DataSource
from prunecast.simulations.kinds import (
    NAME,
    Matches,
    Range,
    ScenarioError,
    build,
    choice,
    function_named,
    written,
)
from prunecast.simulations.network_profiles import NetworkSpec
from prunecast.simulations.partitions import PARTITIONS, Partition
from prunecast.simulations.scenarios.clients import ClientsSpec
from prunecast.simulations.sweeps import SweepSpec
from prunecast.simulations.tasks import TASKS, Task

if TYPE_CHECKING:
    from prunecast.client.training.client_app import LocalTraining

__all__ = [
    "PublishedSpec",
    "ReleaseSpec",
    "Scenario",
    "ScenarioError",
    "load_scenario",
    "packaged_scenarios",
    "save_scenario",
    "scenario_from_mapping",
]

SCHEMA = 1


@dataclass(frozen=True)
class ModelSpec:
    """``[model]``: what is trained.

    Attributes:
        factory: ``package.module:function`` that returns a torch module; called with torch's
            generator seeded. `prunecast.simulations.networks` has some.
        options: ``[model.options]``, keyword arguments of the factory.
        initial: "factory" starts from the weights the factory makes; "drawn" draws weights of
            the same means and spreads from the seed, so that a compressed arm's first keyframe
            is a few bytes. The others start from the weights that the first such arm draws, or the
            default policy where there is none.
    """

    factory: Annotated[str, Matches("(?s).*:.*", "write it as package.module:function")] = (
        "prunecast.simulations.networks.convolutional:digits_cnn"
    )
    options: Mapping[str, Any] = field(default_factory=dict)
    initial: Literal["factory", "drawn"] = "factory"

    def network(self) -> Callable[[], Any]:
        """The factory with its options: what makes the torch module.

        Raises:
            ScenarioError: it cannot be imported, or takes no such option.
        """
        factory = function_named(self.factory, "model.factory")
        if not self.options:
            return factory
        taken = inspect.signature(factory).parameters
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in taken.values()):
            for name in self.options:
                if name not in taken:
                    remedy = f"options: {', '.join(taken)}" if taken else "it takes none"
                    problem = f"means nothing to {self.factory}"
                    raise ScenarioError(f"model.options.{name}", problem, remedy)
        return partial(factory, **self.options)


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
        distillation: part of the loss that the last dense version is the teacher of, once the model
            is pruned; 0 for none.
        distillation_temperature: that outputs are divided by before they are compared.
    """

    epochs: Annotated[int, Range(1)] = 1
    batch_size: Annotated[int, Range(1)] = 32
    learning_rate: Annotated[float, Range(0, above=True)] = 0.05
    learning_rate_decay: Annotated[float, Range(0, 1, above=True)] = 1.0
    momentum: Annotated[float, Range(0)] = 0.9
    weight_decay: Annotated[float, Range(0)] = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    mixed_precision: Literal["auto", "on", "off"] = "auto"
    distillation: Annotated[float, Range(0, 1)] = 0.0
    distillation_temperature: Annotated[float, Range(0, above=True)] = 4.0


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
        concurrent: clients that train at the same time (ray); in a cluster that `address` names,
            as many as it has room for.
        cpus: CPUs for each of them (ray).
        gpus: GPUs, or a fraction of one, for each of them (ray).
        address: of a Ray cluster to join, ``HOST:PORT`` or "auto" for the one of this machine, all
            of whose machines have the run's folder; empty to start Ray here (ray).
        store_bytes: of all that the simulated nodes keep on disk between messages, see docs.
    """

    backend: Literal["ray", "inline"] = "ray"
    concurrent: Annotated[int, Range(1)] = 2
    cpus: Annotated[int, Range(1)] = 1
    gpus: Annotated[float, Range(0)] = 0.0
    address: Annotated[
        str, Matches(r"|auto|[^\s:/]+:[0-9]+", 'write it as HOST:PORT, or "auto"')
    ] = ""
    store_bytes: Annotated[int, Range(0)] = 10_000_000_000


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
class PublishedSpec:
    """``[published.<name>]``: what others measured in this setting, to stand beside ours.

    Attributes:
        value: of the task's metric; an accuracy is a fraction.
        source: where the figure stands.
        arm: of ours, or of `prunecast compare`, that does the same; empty for none.
        spread: standard deviation over their seeds; None where they state none.
        measured: "last" after the last round, "best" the best of all rounds.
        bytes: of both directions and all clients, as the source counts them; 0 where it does not.
    """

    value: float = 0.0
    source: str = ""
    arm: str = ""
    spread: Annotated[float | None, Range(0)] = None
    measured: Literal["last", "best"] = "last"
    bytes: Annotated[int, Range(0)] = 0

    def check(self, key: str) -> None:
        """Raise `ScenarioError` for a figure without a source."""
        if not self.source:
            raise ScenarioError(f"{key}.source", "is missing", "say where the figure stands")


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
        network: None when no time is simulated.
        published: what others measured in this setting; decides nothing.
        sweep: None when no key is varied; only `prunecast sweep` reads it.
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
    network: NetworkSpec | None = None
    published: Mapping[str, PublishedSpec] = field(default_factory=dict)
    sweep: SweepSpec | None = None

    def trained_arms(self) -> dict[str, Arm]:
        """The arms that train; the others only measure the messages of one of these."""
        return {name: arm for name, arm in self.arms.items() if arm.trains}

    def local_training(self) -> LocalTraining:
        """What a client does in a round, as the ready ClientApp takes it."""
        from prunecast.client.training.client_app import LocalTraining  # imports torch

        chosen = dataclasses.asdict(self.training)
        del chosen["batch_size"]  # of the loader
        return LocalTraining(local_epochs=chosen.pop("epochs"), seed=self.seed, **chosen)

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
        return {"schema": SCHEMA, **written(self)}


# -- reading --------------------------------------------------------------------------------------


def packaged_scenarios() -> list[str]:
    """Names of the scenarios that come with the package."""
    entries = files(__name__).iterdir()
    return sorted(e.name.removesuffix(".toml") for e in entries if e.name.endswith(".toml"))


def load_scenario(source: Path | str) -> Scenario:
    """Read a scenario.

    Args:
        source: path of a TOML file, or the name of a packaged scenario such as "demo".

    Raises:
        ScenarioError: there is no such file, it is no TOML, or a key of it is unusable.
    """
    packaged = str(source) in packaged_scenarios()
    try:
        path = files(__name__) / f"{source}.toml" if packaged else Path(source)
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError("", f"{source} is not TOML ({error})", "correct that line") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        names = ", ".join(packaged_scenarios())
        raise ScenarioError(
            "", f"cannot read {source} ({reason})", f"give a TOML file, or one of: {names}"
        ) from error
    scenario = scenario_from_mapping(table)
    if packaged:
        return scenario
    folder = Path(source).parent
    network = scenario.network and scenario.network.located(folder)
    return dataclasses.replace(scenario, data=scenario.data.located(folder), network=network)


def save_scenario(scenario: Scenario, path: Path) -> None:
    """Write a scenario as TOML that `load_scenario` reads from wherever it lies.

    Raises:
        StorageError: the file cannot be written.
    """
    import tomli_w

    here = Path.cwd()
    network = scenario.network and scenario.network.located(here)
    whole = dataclasses.replace(scenario, data=scenario.data.located(here), network=network)
    write_atomically(path, tomli_w.dumps(whole.to_mapping()).encode())


def scenario_from_mapping(table: Mapping[str, Any]) -> Scenario:
    """Build a scenario from parsed TOML (or JSON), checking every key.

    Raises:
        ScenarioError: names the key, what is wrong with it, and the remedy.
    """
    # in JSON, null says that there is none
    table = {
        k: v
        for k, v in table.items()
        if v is not None or k not in ("arms", "release", "network", "sweep")
    }
    schema = table.pop("schema", None)
    if schema != SCHEMA:
        found = "is missing" if schema is None else f"is {schema!r}"
        raise ScenarioError("schema", found, f"this version reads schema = {SCHEMA}")
    scenario = build(Scenario, table, "")
    if (release := scenario.release) is not None:
        release = dataclasses.replace(release, metric=release.metric or scenario.task.metric)
        scenario = dataclasses.replace(scenario, release=release)
    _check(scenario)
    return scenario


def _check(s: Scenario) -> None:
    """What more than one table decides."""
    s.data.check("data")
    if s.network is not None:
        s.network.check("network")
    for name, figure in s.published.items():
        figure.check(f"published.{name}")
    s.clients.check("clients")
    if s.sweep is not None:
        s.sweep.check("sweep")
    if s.training.distillation and not s.task.classes:
        raise ScenarioError(
            "training.distillation",
            f"needs outputs that are classes, and task.kind = {s.task.kind()!r} has none",
            "set it to 0",
        )
    if not s.trained_arms():
        kinds = ", ".join(name for name in ARMS.names() if ARMS.find(name).trains)
        raise ScenarioError("arms", "nothing is trained", f"add an arm of kind {kinds}")
    for name, arm in s.arms.items():
        if not re.fullmatch(NAME, name):
            raise ScenarioError(
                f"arms.{name}", "names files, so it cannot be used", "use a-z 0-9 . _ -"
            )
        arm.check(f"arms.{name}", s.arms)
        arm.check_widths(f"arms.{name}", s.clients.classes())
    if s.release is not None:
        publishing = s.publishing_arms()
        if not publishing:
            raise ScenarioError("release", "there is no model to release", "add a prunecast arm")
        if s.release.arm:
            choice("release.arm", s.release.arm, publishing)
        choice("release.metric", s.release.metric, (s.task.metric, "loss"))
