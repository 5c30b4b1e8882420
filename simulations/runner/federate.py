"""The server's side of a simulation: one arm after the other on one grid."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import nn

from prunecast.client.training.trainer import TensorBatches, evaluate
from prunecast.common.references import load_callable
from prunecast.compression.flower import dense_arrays
from prunecast.compression.versions import PublishedModel, save_model
from prunecast.server.federation import CompressedGrid, Ledger, Policy
from prunecast.server.federation.grid import Recode
from prunecast.server.federation.run import initial_arrays
from prunecast.server.federation.strategies import build_strategy
from prunecast.simulations.runner import EngineFailed
from prunecast.simulations.runner.automatic import automatic_releases, rule_of
from prunecast.simulations.runner.nodes import OrderedGrid, nodes_by_partition
from prunecast.simulations.runner.prepared import PreparedRun, held_out
from prunecast.simulations.scenarios import ArmSpec, Scenario, ScenarioError

__all__ = ["ArmOutcome", "Emit", "check_scenario", "policy_of", "run_arms", "strategy_of"]

Emit = Callable[[dict[str, Any]], None]
"""Told of progress: mappings of plain values with a key ``event``."""
_POLL_SECONDS = 0.05


@dataclass
class ArmOutcome:
    """What training one arm gave.

    Attributes:
        name: of the arm.
        rounds: per round, 0 for the initial model: accuracy, loss, sparsity, cumulative bytes
            in each direction, seconds since the arm began.
        seconds: that the arm took.
        releases: that it made while it trained: round, version, reason, metrics.
    """

    name: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    releases: list[dict[str, Any]] = field(default_factory=list)


def policy_of(arm: ArmSpec) -> Policy:
    """The policy of an arm that trains.

    Raises:
        PolicyError: unknown preset or knob, or a value outside its range.
    """
    if arm.kind == "dense":
        return Policy.preset("dense")
    if arm.kind == "scheme":
        return Policy.preset("dense", up=arm.scheme, up_options=arm.options)
    knobs = {k: tuple(v) if isinstance(v, list) else v for k, v in arm.policy.items()}
    return Policy.preset(arm.preset, **knobs)


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


def check_scenario(scenario: Scenario) -> None:
    """Find out before anything is started whether all names in a scenario mean something.

    Raises:
        FederationError: a preset, knob, strategy, option or release rule is unknown or out of
            range.
        ScenarioError: the model's factory cannot be imported.
    """
    for arm in scenario.arms.values():
        if arm.kind == "prunecast":
            policy_of(arm)
    strategy_of(scenario)
    if scenario.release is not None:
        rule_of(scenario.release)
    try:
        load_callable(scenario.model.factory)
    except ValueError as error:
        raise ScenarioError(
            "model.factory",
            str(error),
            "name a function as package.module:function, installed or in the current folder",
        ) from error


def run_arms(grid: Grid, prepared: PreparedRun, emit: Emit) -> list[ArmOutcome]:
    """Train every arm, with the same seeds, on the nodes of `grid`.

    Raises:
        EngineFailed: clients failed in a round.
    """
    nodes = nodes_by_partition(grid, prepared.scenario.clients.count)
    return [
        _run_arm(grid, nodes, prepared, name, arm, emit)
        for name, arm in prepared.scenario.trained_arms().items()
    ]


class _Measure:
    """Evaluates models on the held-out examples and keeps the latest two published ones."""

    def __init__(self, prepared: PreparedRun, module: nn.Module) -> None:
        inputs, targets = held_out(prepared)
        self._module = module
        self._batches = TensorBatches(
            torch.from_numpy(inputs), torch.from_numpy(targets), batch_size=250
        )
        self.latest: list[tuple[PublishedModel, NDArray[np.int64], float]] = []

    def __call__(self, arrays: ArrayRecord, model: PublishedModel | None) -> tuple[float, float]:
        """Accuracy and loss of the published model, or of plain arrays where there is none."""
        dense = model.arrays() if model else dense_arrays(arrays)
        state = {k: torch.from_numpy(np.array(v)) for k, v in dense.items()}
        self._module.load_state_dict(state)
        found = evaluate(self._module, self._batches, device="cpu")
        if model is not None:
            self.latest = [*self.latest[-1:], (model, self._predict(), found.accuracy)]
        return found.accuracy, found.loss

    def _predict(self) -> NDArray[np.int64]:
        self._module.eval()
        with torch.inference_mode():
            parts = [self._module(inputs).argmax(1) for inputs, _ in self._batches]
        return np.asarray(torch.cat(parts).numpy(), dtype=np.int64)


def _run_arm(
    grid: Grid, nodes: list[int], prepared: PreparedRun, name: str, arm: ArmSpec, emit: Emit
) -> ArmOutcome:
    scenario, started = prepared.scenario, time.monotonic()
    shutil.rmtree(prepared.store, ignore_errors=True)  # nothing is carried over from another arm
    random.seed(scenario.seed)  # Flower samples nodes with it
    module, arrays = initial_arrays(load_callable(scenario.model.factory), seed=scenario.seed)
    outcome, measure = ArmOutcome(name), _Measure(prepared, module)
    ledger = Ledger(prepared.ledger(name), name=name, seed=scenario.seed)
    wrapped = CompressedGrid(
        grid,
        policy_of(arm),
        ledger=ledger,
        seed=scenario.seed,
        alternatives={n: _recode(spec) for n, spec in scenario.recodings_of(name).items()},
        poll_interval=_POLL_SECONDS,
    )
    published = wrapped.policy.down == "lattice"
    if scenario.model.initial == "drawn":
        arrays = _drawn(grid, wrapped, scenario, arrays)
    emit({"event": "arm", "arm": name, "rounds": scenario.rounds})

    def evaluate_fn(server_round: int, received: ArrayRecord) -> MetricRecord:
        _refuse_failures(ledger, server_round, name)
        model = wrapped.published(received) if published else None
        accuracy, loss = measure(received, model)
        totals = ledger.totals()
        row = {
            "round": server_round,
            "accuracy": accuracy,
            "loss": loss,
            "sparsity": model.sparsity() if model else 0.0,
            "bytes_up": totals.bytes_up,
            "bytes_down": totals.bytes_down,
            "seconds": round(time.monotonic() - started, 3),
        }
        outcome.rounds.append(row)
        emit({"event": "round", "arm": name, **row})
        return MetricRecord({"accuracy": accuracy, "loss": loss})

    strategy = strategy_of(scenario)
    watched: Callable[[int, ArrayRecord], MetricRecord | None] = evaluate_fn
    releases = automatic_releases(prepared, name)
    if releases is not None and published:
        watched = releases.watch(strategy, wrapped, evaluate_fn)
    try:
        strategy.start(
            grid=OrderedGrid(wrapped, nodes),
            initial_arrays=arrays,
            num_rounds=scenario.rounds,
            evaluate_fn=watched,
        )
    finally:
        ledger.close()
    outcome.releases = [asdict(made) for made in releases.made] if releases else []
    outcome.seconds = time.monotonic() - started
    for place, (model, predictions, accuracy) in enumerate(measure.latest, start=1):
        target = prepared.work / f"{name}-{place}"
        save_model(model, target.with_suffix(".model"))
        np.savez(target.with_suffix(".npz"), predictions=predictions, accuracy=accuracy)
    emit({"event": "arm-done", "arm": name, "seconds": outcome.seconds})
    return outcome


def _drawn(
    grid: Grid, wrapped: CompressedGrid, scenario: Scenario, like: ArrayRecord
) -> ArrayRecord:
    if wrapped.policy.down != "lattice":
        compressed = [arm for arm in scenario.arms.values() if arm.kind == "prunecast"]
        if not compressed:
            return like
        # never used to send anything: this arm gets the same weights, in plain messages
        wrapped = CompressedGrid(grid, policy_of(compressed[0]))
    return wrapped.draw_initial(like, scenario.seed)


def _refuse_failures(ledger: Ledger, server_round: int, arm: str) -> None:
    """A client that fails would be left out silently, and the arms would differ."""
    rounds = range(server_round, server_round + 1)
    failed = ledger.totals(rounds=rounds, kind="error").messages
    if failed:
        raise EngineFailed(
            f"arm {arm!r}, round {server_round}: {failed} clients answered with an error"
        )


def _recode(spec: ArmSpec) -> Recode:
    import zstandard

    compressor = zstandard.ZstdCompressor(level=spec.level)
    return lambda data: len(compressor.compress(data))
