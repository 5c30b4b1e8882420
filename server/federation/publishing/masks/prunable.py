"""Whether a model can be pruned as a policy says, and what people are told of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from logging import INFO, WARNING
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from prunecast.compression.flower import dense_arrays, set_apart
from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.masks import Masks
from prunecast.compression.pruning.plan import (
    PlanError,
    PruningPlan,
    is_named,
    is_weight,
    low_rank_factors,
)
from prunecast.server.federation.errors import PolicyError
from prunecast.server.federation.policy import Policy

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "check_model",
    "check_prunable",
    "frozen_parameters",
    "say_emptied",
    "say_left_alone",
    "say_unmeasured",
]

Arrays = Mapping[str, NDArray[Any]]

_HARDLY = 0.05  # of the share that a model keeps: a layer that keeps less passes nothing on


def check_prunable(
    policy: Policy,
    plan: PruningPlan,
    arrays: Arrays,
    *,
    trained: bool = False,
    frozen: Collection[str] = (),
) -> None:
    """Refuse a model that cannot be pruned as a policy asks.

    Args:
        policy: that asks for it; nothing is refused where it prunes no weights.
        plan: of the policy.
        arrays: of the whole model, of which those without a lattice are left out.
        trained: whether equal weights are tied, not only not trained yet.
        frozen: names of parameters that nobody trains. A model of which all that may be pruned is
            frozen cannot recover.

    Raises:
        PolicyError: nothing can be pruned, a pattern does not divide a tensor, a layer would
            vanish, or tied weights would be pruned apart; names the key and the remedy.
    """
    if not policy.target:
        return
    lattice = {n: a for n, a in arrays.items() if _on_lattice(policy, n, a)}
    weights = plan.prunable(lattice)
    if not weights or all(name in frozen for name in weights):
        key, value, off = _asked(policy)
        raise PolicyError(
            f"prunecast.{key} (policy {key.replace('-', '_')}) = {value!r}, and nothing of the "
            f"model can be pruned: {_why(plan, lattice, frozen)}, or set prunecast.{key} = {off!r}"
        )
    try:
        plan.check(lattice, trained=trained)
    except PlanError as error:
        raise PolicyError(f"the model cannot be pruned as the policy says: {error}") from error


def check_model(
    policy: Policy,
    arrays: ArrayRecord,
    rounds: int,
    *,
    key: str = "arrays",
    frozen: Collection[str] = (),
) -> None:
    """Refuse the first weights of a run that cannot be pruned as its policy asks.

    Args:
        policy: of the run.
        arrays: the first weights.
        rounds: how many there will be in all.
        key: of the record in the strategy's messages.
        frozen: see `check_prunable`.

    Raises:
        PolicyError: see `check_prunable`; or the policy prunes records other than this.
    """
    if not policy.target:
        return
    if key not in policy.pruning_records:
        raise PolicyError(
            f"prunecast.pruning-records (policy pruning_records) = {policy.pruning_records!r}, and "
            f"the model's record is {key!r}: nothing of it would be pruned; name it there"
        )
    weights = dense_arrays(set_apart(arrays)[0])
    check_prunable(policy, policy.pruning(rounds), weights, frozen=frozen)


def say_left_alone(plan: PruningPlan, arrays: Arrays) -> None:
    """Tell of low-rank factors that are not pruned."""
    adapters = low_rank_factors({name: array.shape for name, array in arrays.items()})
    if adapters and not plan.adapters:
        log(
            INFO,
            "Not pruned: %d low-rank factors such as %r, whose products would lose whole rows; "
            "prunecast.pruning-adapters = true prunes them.",
            *(len(adapters), min(adapters)),
        )


def frozen_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters that need no gradient."""
    return {n for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def _on_lattice(policy: Policy, name: str, array: NDArray[Any]) -> bool:
    # one that holds infinity from the start travels exactly
    return not policy.is_lossless(name, array.dtype, array.size) and bool(np.isfinite(array).all())


def _asked(policy: Policy) -> tuple[str, Any, Any]:
    """The key by which the policy asks for zeros, what it says, and what asks for none."""
    if policy.is_automatic:
        return "pruning-schedule", policy.pruning_schedule, "cubic"
    if policy.thins:
        return "budget-knobs", ", ".join(policy.budget_knobs), "lattice"
    if policy.sparsity:
        return "sparsity", policy.sparsity, 0.0
    return "pruning-pattern", policy.pruning_pattern, ""


def _why(plan: PruningPlan, lattice: Arrays, frozen: Collection[str]) -> str:
    """What keeps the largest matrix or kernel from being pruned, and how to change that."""
    matrices = {name: array.size for name, array in lattice.items() if is_weight(name, array.shape)}
    if not matrices:
        return "it has no matrix or kernel of floats; prune another record"
    name = max(matrices, key=lambda n: matrices[n])
    what = f"its largest matrix or kernel, {name!r},"
    if is_named(name, plan.exclude):
        return f"{what} is named by prunecast.pruning-exclude; name less there"
    if matrices[name] < plan.min_size:
        return (
            f"{what} has {matrices[name]} elements, below prunecast.pruning-min-size = "
            f"{plan.min_size}; lower that"
        )
    if name in frozen:
        return f"{what} is frozen, so nothing would recover; train it"
    return f"{what} is a low-rank factor; set prunecast.pruning-adapters = true"


def say_emptied(masks: Masks) -> None:
    """Warn of tensors that keep hardly any weights, though masks that are held bring none back."""
    kept = {name: int(np.count_nonzero(mask)) for name, mask in masks.items()}
    share = sum(kept.values()) / max(1, sum(mask.size for mask in masks.values()))
    emptied = [n for n, mask in masks.items() if kept[n] < _HARDLY * share * mask.size]
    if emptied:
        log(
            WARNING,
            "%d layers such as %r, of which %d of %d weights are kept, are as good as gone, and "
            "held masks bring nothing back: one ranking over layers of different scale does that. "
            "Set prunecast.pruning-scope = 'erk' or 'layer'.",
            *(len(emptied), emptied[0], kept[emptied[0]], masks[emptied[0]].size),
        )


def say_unmeasured(policy: Policy) -> None:
    """Warn that automatic pruning waits for a metric that nobody measures."""
    log(
        WARNING,
        "Nobody measures a metric named *%s of the published model, so automatic pruning "
        "waits: let nodes evaluate, give Run an evaluate_fn, or name another as "
        "prunecast.pruning-metric.",
        policy.pruning_metric,
    )
