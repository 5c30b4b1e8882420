"""What runs inside an engine: the nodes, and the server that trains one arm after the other."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from logging import WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import nn

from prunecast.client.training.client_app import DISTILLED, Loader, build_client_app
from prunecast.client.training.mod import compression_mod
from prunecast.client.training.trainer import TensorBatches
from prunecast.common.files import write_atomically
from prunecast.common.text import first_line
from prunecast.compression.flower import array_record, dense_arrays
from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.counting import parameter_count
from prunecast.compression.pruning.structure.channels import (
    ChannelPlan,
    channels_beside,
    current_channels,
)
from prunecast.compression.versions import PublishedModel, save_model
from prunecast.server.federation import CompressedGrid, NodesFailed, Policy, Run
from prunecast.server.federation.publishing.widths import leading_slices
from prunecast.server.federation.reporting.events import OnEvent
from prunecast.server.federation.run import EVENTS, initial_arrays
from prunecast.server.federation.shrinking.choosing import FittedModule, module_chooser
from prunecast.server.federation.state.resuming import AUTO
from prunecast.server.federation.strategies import build_strategy
from prunecast.simulations.arms import Arm
from prunecast.simulations.runner import EngineFailed
from prunecast.simulations.runner.interrupted import interrupted_arm, save_rows
from prunecast.simulations.runner.metrics import model_figures
from prunecast.simulations.runner.nodes import (
    OrderedGrid,
    StoreBound,
    client_number_mod,
    number_nodes,
)
from prunecast.simulations.runner.prepared import PreparedRun, tensors
from prunecast.simulations.scenarios import Scenario

__all__ = ["run_arms", "simulated_client", "strategy_of"]


# -- nodes ----------------------------------------------------------------------------------------


def simulated_client(prepared: PreparedRun) -> ClientApp:
    """The client of a prepared run; picklable, and small: data stay on disk."""
    scenario = prepared.scenario
    distils = scenario.training.distillation > 0
    prepared = replace(prepared, sizes=())  # it goes along with every message
    client = build_client_app(
        partial(_model, prepared),
        partial(_data, prepared),
        scenario.local_training(),
        loss_fn=scenario.task.training_loss,
        mods=[client_number_mod(prepared), compression_mod(prepared.store, teacher=distils)],
    )
    for arm in scenario.trained_arms().values():
        arm.equip(client, partial(_model, prepared), partial(_data, prepared), scenario)
    return client


def _model(prepared: PreparedRun, context: Context) -> nn.Module:
    torch.set_num_threads(prepared.scenario.engine.cpus)  # for each client, no more
    module: nn.Module = prepared.scenario.model.network()()
    return module


def _data(prepared: PreparedRun, context: Context) -> tuple[Loader, Loader | None]:
    inputs, targets = tensors(prepared.client(int(context.node_config["partition-id"])))
    batch_size = prepared.scenario.training.batch_size
    return TensorBatches(inputs, targets, batch_size=batch_size, shuffle=True), None


# -- the server -----------------------------------------------------------------------------------


def strategy_of(scenario: Scenario, count: int | None = None) -> Any:
    """The strategy of a scenario: every arm gets a new one.

    Args:
        scenario: whose strategy.
        count: of the clients that take part; None for all.

    Raises:
        StrategyError: unknown name or option.
    """
    count = scenario.clients.count if count is None else count
    trained = max(1, int(count * scenario.clients.fraction))
    options = {
        "fraction_train": scenario.clients.fraction,
        # the held-out examples measure; messages that only evaluate would flatter the ratio
        "fraction_evaluate": 0.0,
        "min_train_nodes": trained,
        "min_available_nodes": count,
    }
    return build_strategy(scenario.strategy.name, {**options, **scenario.strategy.options})


def run_arms(grid: Grid, prepared: PreparedRun, emit: OnEvent) -> list[dict[str, Any]]:
    """Train every arm, with the same seeds, on the nodes of `grid`.

    Returns:
        For each arm its ``name``, the ``seconds`` it took, its ``rounds`` (0 for the initial model;
        the task's metric, loss, sparsity, cumulative bytes in each direction, seconds since it
        began, what nodes measured), the ``releases`` it made meanwhile (round, version, reason,
        metrics), the ids of the ``nodes`` in the order of their clients, what these kept, see
        `StoreBound`, figures of its final ``model``, see `model_figures`, and of making masks.

    Raises:
        EngineFailed: clients failed in a round.
    """
    nodes = number_nodes(grid, prepared)
    outcomes: list[dict[str, Any]] = []
    for name, arm in prepared.scenario.trained_arms().items():
        path = prepared.outcome(name)
        if path.exists():  # of a run that is resumed
            outcomes.append(json.loads(path.read_text(encoding="utf-8")))
            continue
        outcomes.append(_run_arm(grid, nodes, prepared, name, arm, emit))
        write_atomically(path, json.dumps(outcomes[-1]).encode())
    return outcomes


class _HeldOut:
    """Measures models on the held-out examples and keeps the latest two published ones.

    Args:
        prepared: the run, with the examples.
        module: one that has the model's shapes.
        classes: how many width classes train slices of it.

    Attributes:
        module: has the weights that were measured last.
    """

    def __init__(self, prepared: PreparedRun, module: nn.Module, classes: int) -> None:
        self._task, self.module = prepared.scenario.task, module
        self._fitted = FittedModule(prepared.scenario.model.network(), module, 1 + classes)
        inputs, targets = tensors(prepared.held_out)
        self._targets = targets.numpy()
        self._batches = TensorBatches(inputs, targets, batch_size=250)
        self._latest: list[tuple[PublishedModel, ChannelPlan | None, NDArray[Any], float]] = []

    @property
    def is_new(self) -> bool:
        """Whether no published model was measured yet."""
        return not self._latest

    def measure(
        self,
        arrays: ArrayRecord,
        model: PublishedModel | None,
        removed: ChannelPlan | None = None,
    ) -> tuple[float, float]:
        """The task's metric and the loss of arrays, which are those of `model` if it is given.

        Args:
            arrays: weights.
            model: what is published of them.
            removed: the channels that are gone.
        """
        self.module, outputs, score, loss = self._measured(arrays, removed)
        if model is not None:
            self._latest = [*self._latest[-1:], (model, removed, outputs, score)]
        return score, loss

    def measure_slice(self, arrays: ArrayRecord, plan: ChannelPlan) -> tuple[float, float]:
        """The task's metric and the loss of what a width class trains; nothing of it is kept."""
        return self._measured(arrays, plan)[2:]

    def _measured(
        self, arrays: ArrayRecord, plan: ChannelPlan | None
    ) -> tuple[nn.Module, NDArray[Any], float, float]:
        module = self._fitted.of(plan)
        state = {k: torch.from_numpy(np.array(v)) for k, v in dense_arrays(arrays).items()}
        module.load_state_dict(state)
        module.eval()
        parts, total = [], 0.0
        with torch.inference_mode():
            for inputs, targets in self._batches:
                parts.append(module(*inputs))
                total += float(self._task.training_loss(parts[-1], targets)) * len(targets)
        outputs = torch.cat(parts).numpy()
        score = self._task.score(outputs, self._targets)
        return module, outputs, score, total / len(self._targets)

    def save(self, prepared: PreparedRun, arm: str) -> None:
        """Leave the latest published models, and what they answered, to the delivery."""
        for place, (model, removed, outputs, score) in enumerate(self._latest, start=1):
            target = prepared.work / f"{arm}-{place}"
            save_model(model, target.with_suffix(".model"))
            if removed is not None:
                removed.save(channels_beside(target.with_suffix(".model")))
            np.savez(target.with_suffix(".npz"), outputs=outputs, score=score)


def _run_arm(
    grid: Grid, nodes: list[int], prepared: PreparedRun, name: str, arm: Arm, emit: OnEvent
) -> dict[str, Any]:
    from prunecast.simulations.runner.delivery import automatic_releases  # nodes need none of it

    scenario, task = prepared.scenario, prepared.scenario.task
    stated = zip(nodes, scenario.clients.classes(), strict=True)
    taking_part = [node for node, width in stated if width not in arm.without]
    past = interrupted_arm(prepared, name, taking_part)
    if past is None:  # nothing is carried over from another arm
        shutil.rmtree(prepared.store, ignore_errors=True)
    module, arrays = initial_arrays(scenario.model.network(), seed=scenario.seed)
    drawn = scenario.model.initial == "drawn"
    if drawn and arm.grid_policy().down == "dense":
        drawn = False
        policies = [other.grid_policy() for other in scenario.publishing_arms().values()]
        unused = CompressedGrid(grid, [*policies, Policy()][0])  # sends nothing
        arrays = unused.draw_initial(arrays, scenario.seed)
    arrays = arm.initial(arrays, scenario)
    rounds = [] if past is None else past.rows
    original = parameter_count(module)
    held_out = _HeldOut(prepared, module, len(arm.grid_policy().widths))
    measured: dict[str, float] = {}

    def evaluate_fn(server_round: int, received: ArrayRecord) -> MetricRecord:
        if (plan := current_channels()) is not None:
            score, loss = held_out.measure_slice(received, plan)
            return MetricRecord({task.metric: score, "loss": loss})
        weights = arm.weights(received, scenario, server_round)
        removed = run.grid.channels()
        score, loss = held_out.measure(weights, run.published, removed)
        measured.update({task.metric: score, "loss": loss})
        return MetricRecord(dict(measured))

    def example() -> tuple[torch.Tensor, ...]:
        return tuple(values[:2] for values in tensors(prepared.held_out)[0])

    def hear(event: Mapping[str, Any]) -> None:
        if event["event"] == "round-begun" and run.published is not None and held_out.is_new:
            # of a run that is resumed: the release may want what it reached before
            held_out.measure(
                array_record(run.published.arrays()), run.published, run.grid.channels()
            )
        if event["event"] == "round-finished":
            same = ("sparsity", "bytes_up", "bytes_down", "seconds")
            row = {"round": event["round"], **measured, **{k: event[k] for k in same}}
            row["parameters"] = parameter_count(held_out.module)
            if widths := event.get("widths"):
                row["widths"] = {
                    name: {**found, **found.pop("metrics")}
                    for name, found in ((name, dict(entry)) for name, entry in widths.items())
                }
            row |= {key: event[key] for key in ("classes", "budget") if event.get(key)}
            trained = event["client_metrics"].get("train", {})
            row |= {DISTILLED: trained[DISTILLED]} if DISTILLED in trained else {}
            if found := event["node_metrics"]:
                row["nodes"] = found
            rounds.append(row)
            save_rows(prepared, name, rounds)
            event = {**event, "score": task.text(measured[task.metric])}
        emit(event)

    compressed = CompressedGrid(
        grid,
        arm.grid_policy(),
        seed=scenario.seed,
        alternatives={n: other.recode() for n, other in scenario.recodings_of(name).items()},
        poll_interval=0.05,  # nodes are near
    )
    policy = compressed.policy
    bound = StoreBound(
        *(prepared.store, grid.run.run_id if past is None else past.job),
        most=scenario.engine.store_bytes,
        # what older versions take in memory bounds them, and not their number
        history=sys.maxsize if policy.history_bytes else policy.history,
        numbers={node: number for number, node in enumerate(nodes, start=1)},
    )
    if past is not None:
        bound.after(nodes)
    run = Run(
        OrderedGrid(compressed, taking_part, bound),
        arm.strategy(strategy_of(scenario, len(taking_part))),
        evaluate_fn=evaluate_fn,
        releases=automatic_releases(prepared, name),
        seed=scenario.seed,
        name=name,
        ledger=prepared.ledger(name),
        events=prepared.folder / EVENTS,
        on_event=hear,
        channels=module_chooser(scenario.model.network(), example),
        slices=leading_slices(scenario.model.network(), example),
        checkpoint=prepared.checkpoint(name),
        resume=AUTO,
        stop_on_failure=True,  # a client left out silently would make the arms differ
    )
    try:
        run.start(arrays, scenario.rounds, drawn=drawn)
    except NodesFailed as error:
        told = str(error)
        for number, node in enumerate(nodes):  # ids of nodes are drawn at random
            told = told.replace(f"node {node}:", f"client {number}:")
        raise EngineFailed(f"arm {name!r}, {told}") from None
    seconds = rounds[-1]["seconds"]
    held_out.save(prepared, name)
    releases = [asdict(made) for made in run.releases.made] if run.releases else []
    made = {"name": name, "seconds": seconds, "rounds": rounds, "releases": releases}
    made["model"] = _counted(held_out.module, tensors(prepared.held_out)[0], original)
    made["mask_cost"] = compressed.mask_cost() if policy.target else None
    return {**made, "nodes": nodes, "store_bytes": bound.peak, "forgotten": bound.forgotten}


def _counted(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], original: int
) -> dict[str, Any] | None:
    """Figures of a model; None for one that cannot be run on a single example."""
    try:
        return model_figures(module, inputs, original)
    except Exception as error:  # of the user's module; what it has learned is not lost for that
        log(WARNING, "What the model computes is not counted: %s", first_line(error))
        return None
