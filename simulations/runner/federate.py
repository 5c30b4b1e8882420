"""The server's side of a simulation: one arm after the other on one grid."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import nn

from prunecast.client.training.trainer import TensorBatches
from prunecast.common.references import load_callable
from prunecast.compression.flower import dense_arrays
from prunecast.compression.versions import PublishedModel, save_model
from prunecast.server.federation import CompressedGrid, NodesFailed, Run
from prunecast.server.federation.events import OnEvent
from prunecast.server.federation.run import EVENTS, initial_arrays
from prunecast.server.federation.strategies import build_strategy
from prunecast.simulations.arms import Arm
from prunecast.simulations.data import Examples
from prunecast.simulations.runner import EngineFailed
from prunecast.simulations.runner.delivery import automatic_releases
from prunecast.simulations.runner.nodes import OrderedGrid, nodes_by_partition
from prunecast.simulations.runner.prepared import PreparedRun
from prunecast.simulations.scenarios import Scenario

__all__ = ["ArmOutcome", "run_arms", "strategy_of"]


@dataclass
class ArmOutcome:
    """What training one arm gave.

    Attributes:
        name: of the arm.
        rounds: per round, 0 for the initial model: the task's metric, loss, sparsity,
            cumulative bytes in each direction, seconds since the arm began.
        seconds: that the arm took.
        releases: that it made while it trained: round, version, reason, metrics.
    """

    name: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    releases: list[dict[str, Any]] = field(default_factory=list)


def strategy_of(scenario: Scenario) -> Any:
    """The strategy of a scenario: every arm gets a new one.

    Raises:
        StrategyError: unknown name or option.
    """
    trained = max(1, int(scenario.clients.count * scenario.clients.fraction))
    options = {
        "fraction_train": scenario.clients.fraction,
        # the held-out examples measure; messages that only evaluate would flatter the ratio
        "fraction_evaluate": 0.0,
        "min_train_nodes": trained,
        "min_available_nodes": scenario.clients.count,
    }
    return build_strategy(scenario.strategy.name, {**options, **scenario.strategy.options})


def run_arms(grid: Grid, prepared: PreparedRun, emit: OnEvent) -> list[ArmOutcome]:
    """Train every arm, with the same seeds, on the nodes of `grid`.

    Raises:
        EngineFailed: clients failed in a round.
    """
    nodes = nodes_by_partition(grid, prepared.scenario.clients.count)
    return [
        _run_arm(grid, nodes, prepared, name, arm, emit)
        for name, arm in prepared.scenario.trained_arms().items()
    ]


class _HeldOut:
    """Measures models on the held-out examples and keeps the latest two published ones."""

    def __init__(self, prepared: PreparedRun, module: nn.Module) -> None:
        self._task, self._module = prepared.scenario.task, module
        examples = Examples.load(prepared.held_out)
        self._targets = examples.targets
        self._batches = TensorBatches(
            [torch.from_numpy(values) for values in examples.inputs.values()],
            torch.from_numpy(examples.targets),
            batch_size=250,
        )
        self._latest: list[tuple[PublishedModel, NDArray[Any], float]] = []

    def measure(self, arrays: ArrayRecord, model: PublishedModel | None) -> tuple[float, float]:
        """The task's metric and the loss of arrays, which are those of `model` if it is given."""
        state = {k: torch.from_numpy(np.array(v)) for k, v in dense_arrays(arrays).items()}
        self._module.load_state_dict(state)
        self._module.eval()
        parts, total = [], 0.0
        with torch.inference_mode():
            for inputs, targets in self._batches:
                parts.append(self._module(*inputs))
                total += float(self._task.training_loss(parts[-1], targets)) * len(targets)
        outputs = torch.cat(parts).numpy()
        score = self._task.score(outputs, self._targets)
        if model is not None:
            self._latest = [*self._latest[-1:], (model, outputs, score)]
        return score, total / len(self._targets)

    def save(self, prepared: PreparedRun, arm: str) -> None:
        """Leave the latest published models, and what they answered, to the delivery."""
        for place, (model, outputs, score) in enumerate(self._latest, start=1):
            target = prepared.work / f"{arm}-{place}"
            save_model(model, target.with_suffix(".model"))
            np.savez(target.with_suffix(".npz"), outputs=outputs, score=score)


def _run_arm(
    grid: Grid, nodes: list[int], prepared: PreparedRun, name: str, arm: Arm, emit: OnEvent
) -> ArmOutcome:
    scenario, task = prepared.scenario, prepared.scenario.task
    shutil.rmtree(prepared.store, ignore_errors=True)  # nothing is carried over from another arm
    module, arrays = initial_arrays(load_callable(scenario.model.factory), seed=scenario.seed)
    drawn = scenario.model.initial == "drawn"
    if drawn and not arm.publishes:
        arrays, drawn = _drawn(grid, scenario, arrays), False
    outcome, held_out = ArmOutcome(name), _HeldOut(prepared, module)
    measured: dict[str, float] = {}

    def evaluate_fn(server_round: int, received: ArrayRecord) -> MetricRecord:
        score, loss = held_out.measure(received, run.published)
        measured.update({task.metric: score, "loss": loss})
        return MetricRecord(dict(measured))

    def hear(event: Mapping[str, Any]) -> None:
        if event["event"] == "round-finished":
            same = ("sparsity", "bytes_up", "bytes_down", "seconds")
            row = {"round": event["round"], **measured, **{key: event[key] for key in same}}
            outcome.rounds.append(row)
            event = {**event, "score": task.text(measured[task.metric])}
        emit(event)

    compressed = CompressedGrid(
        grid,
        arm.grid_policy(),
        seed=scenario.seed,
        alternatives={n: other.recode() for n, other in scenario.recodings_of(name).items()},
        poll_interval=0.05,  # nodes are near
    )
    run = Run(
        OrderedGrid(compressed, nodes),
        strategy_of(scenario),
        evaluate_fn=evaluate_fn,
        releases=automatic_releases(prepared, name),
        seed=scenario.seed,
        name=name,
        ledger=prepared.ledger(name),
        events=prepared.folder / EVENTS,
        on_event=hear,
        stop_on_failure=True,  # a client left out silently would make the arms differ
    )
    started = time.monotonic()
    try:
        run.start(arrays, scenario.rounds, drawn=drawn)
    except NodesFailed as error:
        raise EngineFailed(f"arm {name!r}, {error}") from None
    outcome.seconds = time.monotonic() - started
    outcome.releases = [asdict(made) for made in run.releases.made] if run.releases else []
    held_out.save(prepared, name)
    return outcome


def _drawn(grid: Grid, scenario: Scenario, like: ArrayRecord) -> ArrayRecord:
    """The weights that an arm which publishes draws, for one that does not."""
    publishing = list(scenario.publishing_arms().values())
    if not publishing:
        return like
    unused = CompressedGrid(grid, publishing[0].grid_policy())  # sends nothing
    return unused.draw_initial(like, scenario.seed)
