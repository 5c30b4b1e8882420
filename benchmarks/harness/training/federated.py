"""Federated averaging, first dense, then on a lattice while it is pruned; with snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..lattice import Floats, Integers, Lattice, cubic, is_prunable, masked_update
from .tasks import CLIENTS, Task

__all__ = ["DENSE_ROUNDS", "PRUNED_ROUNDS", "SPARSITY", "train"]

DENSE_ROUNDS, PRUNED_ROUNDS, SPARSITY = 12, 10, 0.9
_CLIP = 5.0
_MID, _LATE = "mid", "late"

Snapshots = dict[str, NDArray[Any]]


def _weights(model: nn.Module) -> Floats:
    return {k: v.detach().numpy().copy() for k, v in model.state_dict().items()}


def _load(model: nn.Module, weights: Floats) -> None:
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in weights.items()})


def _local(task: Task, model: nn.Module, start: Floats, client: int, seed: list[int]) -> Floats:
    """A client's weights after one round."""
    _load(model, start)
    rng = np.random.default_rng([*seed, client])
    optimiser = task.optimiser(model)
    for _ in range(task.steps):
        optimiser.zero_grad()
        torch.autograd.backward(task.loss(model, client, rng))
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimiser.step()
    return _weights(model)


def _mean(parts: list[Floats]) -> Floats:
    return {k: np.mean([p[k] for p in parts], axis=0, dtype=np.float32) for k in parts[0]}


def _minus(a: Floats, b: Floats) -> Floats:
    return {k: a[k] - b[k] for k in a}


def train(task: Task, seed: int, report: Callable[[str, float], None]) -> Snapshots:
    """Train and return tensors under keys ``part-when.what/tensor``.

    ``dense-mid`` and ``dense-late`` hold float32: ``before`` and ``after`` a round the global
    weights, ``update`` the change of client 0. ``pruned-mid`` (sparsity still growing) and
    ``pruned-late`` hold integers: ``held`` and ``next`` two published versions, ``update`` the
    quantised change that client 0 sends against ``held``, zero wherever ``held`` is.

    Args:
        task: what to train.
        seed: of initial weights and minibatches.
        report: told the name of every round and the score after it.
    """
    torch.manual_seed(seed)
    model = task.build()
    weights = _weights(model)
    out: Snapshots = {}
    for name, values in _dense(task, model, weights, seed, report):
        out |= {f"{name}/{k}": v for k, v in values.items()}
        if name == f"dense-{_LATE}.after":
            weights = values
    for name, integers in _pruned(task, model, weights, seed, report):
        out |= {f"{name}/{k}": v for k, v in integers.items()}
    return out


def _score(task: Task, model: nn.Module, weights: Floats) -> float:
    _load(model, weights)
    with torch.no_grad():
        return task.score(model)


def _dense(
    task: Task, model: nn.Module, weights: Floats, seed: int, report: Callable[[str, float], None]
) -> Iterator[tuple[str, Floats]]:
    for r in range(1, DENSE_ROUNDS + 1):
        parts = [_local(task, model, weights, c, [seed, 0, r]) for c in range(CLIENTS)]
        after = _mean(parts)
        when = {DENSE_ROUNDS // 2: _MID, DENSE_ROUNDS: _LATE}.get(r)
        if when:
            yield f"dense-{when}.before", weights
            yield f"dense-{when}.after", after
            yield f"dense-{when}.update", _minus(parts[0], weights)
        weights = after
        report(f"dense round {r}/{DENSE_ROUNDS}", _score(task, model, weights))


def _pruned(
    task: Task, model: nn.Module, master: Floats, seed: int, report: Callable[[str, float], None]
) -> Iterator[tuple[str, Integers]]:
    lattice = Lattice(master)
    ramp = PRUNED_ROUNDS - 3  # then the sparsity stays
    left = [{k: np.zeros_like(v) for k, v in master.items()} for _ in range(CLIENTS)]
    held = lattice.publish(master, 0.0)
    for r in range(1, PRUNED_ROUNDS + 1):
        sparsity = cubic(SPARSITY, r - 1, ramp)
        start = lattice.values(held)
        mask = {k: q != 0 for k, q in held.items() if r > 1 and is_prunable(q)}
        sent, changes = [], []
        for c in range(CLIENTS):
            trained = _local(task, model, start, c, [seed, 1, r])
            change = _minus(trained, start)
            wanted = {k: change[k] + left[c][k] for k in change}
            integers, left[c] = masked_update(wanted, mask)
            kept = {k: wanted[k] * mask[k] if k in mask else wanted[k] for k in wanted}
            changes.append(_minus(kept, left[c]))
            sent.append(integers)
        total = _mean(changes)
        master = {k: master[k] + total[k] for k in master}
        following = lattice.publish(master, cubic(SPARSITY, r, ramp))
        when = {ramp // 2: _MID, PRUNED_ROUNDS: _LATE}.get(r)
        if when:
            yield f"pruned-{when}.held", held
            yield f"pruned-{when}.next", following
            yield f"pruned-{when}.update", sent[0]
        held = following
        report(
            f"pruned round {r}/{PRUNED_ROUNDS} (sparsity {sparsity:.2f})",
            _score(task, model, lattice.values(held)),
        )
