"""What must hold of a policy's knobs, each alone and together, and what to do where it does not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from prunecast.compression.pruning.allocation import ALLOCATIONS
from prunecast.compression.pruning.automatic import KNOBS
from prunecast.compression.pruning.criteria import CRITERIA
from prunecast.compression.pruning.schedules import AUTOMATIC, HELD, SCHEDULES
from prunecast.compression.schemes.registry import SCHEMES
from prunecast.compression.versions.statistics import MOST_STATISTICS_BITS
from prunecast.server.federation.knobs import BUDGETS, GROWN_BY, OTHERS, WHOLE, key_of, refused
from prunecast.server.federation.publishing.budgets import TURNED
from prunecast.server.federation.publishing.classes import Treatment, parse_classes

if TYPE_CHECKING:
    from prunecast.server.federation.policy import Policy

__all__ = ["Rule", "rules"]

Rule = tuple[str, bool, str]
"""A knob, whether its value is allowed, and the remedy where it is not."""

_NEAR = 1e-6  # a sparsity to that of a pattern
_STEP = "give a number of 0 or above, such as {}; 0 is exact"
_CLASS = "[a-z0-9_-]{1,64}"
_NAMED: dict[str, Mapping[str, Any]] = {
    "pruning_scope": ALLOCATIONS,
    "pruning_criterion": CRITERIA,
    "pruning_schedule": {**SCHEDULES, AUTOMATIC: None},
    "pruning_recalibrate": dict.fromkeys(("never", "events", "always")),
    "pruning_masks": dict.fromkeys(("auto", "dpf", "held", *GROWN_BY)),
}


def rules(policy: Policy, fixed: float) -> list[Rule]:
    """Every rule, in the order in which people are told.

    Args:
        policy: whose knobs are of the right types.
        fixed: the sparsity that its pattern comes to; 0 where that is free.

    Raises:
        PolicyError: its classes of nodes cannot be read.
    """
    try:
        treatments = [one.treatment for one in parse_classes(policy.classes)]
    except ValueError as error:
        raise refused("classes", dict(policy.classes), str(error)) from error
    return [
        *_ways(policy, fixed),
        *_steps(policy, fixed),
        *_channels(policy, treatments),
        *_pruning(policy, fixed),
        *_bytes(policy, fixed),
        *_choices(policy),
    ]


def _ways(policy: Policy, fixed: float) -> Iterable[Rule]:
    """Of the codings of both directions, and what needs which."""
    schemes = ", ".join(map(repr, ("lattice", "dense", *SCHEMES)))
    lattice, down = policy.down == "lattice", key_of("down")
    return (
        ("down", policy.down in ("lattice", "dense", *SCHEMES), f"choose one of {schemes}"),
        ("up", policy.up in ("lattice", "dense", *SCHEMES), f"choose one of {schemes}"),
        (
            "up",
            lattice or policy.up != "lattice",
            f"it needs {down} = 'lattice'; choose 'dense' or a scheme",
        ),
        (
            "sparsity",
            not (policy.sparsity and fixed) or abs(policy.sparsity - fixed) < _NEAR,
            f"{key_of('pruning_pattern')} = {policy.pruning_pattern!r} comes to {fixed:g}: give "
            "that, or 0",
        ),
        (
            "pruning_pattern",
            not fixed or policy.pruning_scope == "layer",
            f"it is the same sparsity for every tensor: set {key_of('pruning_scope')} = 'layer'",
        ),
        ("pruning_pattern", lattice or not fixed, f"pruning needs {down} = 'lattice'"),
        ("sparsity", lattice or not policy.sparsity, f"pruning needs {down} = 'lattice'"),
        (
            "pruning_schedule",
            lattice or not policy.is_automatic,
            f"it needs {down} = 'lattice'",
        ),
        (
            "up_options",
            policy.up in SCHEMES or not policy.up_options,
            f"they belong to a scheme: set {key_of('up')}",
        ),
        (
            "down_options",
            policy.down in SCHEMES or not policy.down_options,
            f"they belong to a scheme: set {key_of('down')}",
        ),
    )


def _steps(policy: Policy, fixed: float) -> Iterable[Rule]:
    """Of the lattice and of sparsity."""
    lattice, down = policy.down == "lattice", key_of("down")
    return (
        ("down_step", 0 <= policy.down_step < math.inf, _STEP.format("0.1")),
        (
            "vector_step",
            0 < policy.vector_step < math.inf,
            "give a number above 0, such as 0.025",
        ),
        ("hysteresis", 0.5 <= policy.hysteresis <= 1, "give a number from 0.5 to 1"),
        ("up_step", 0 <= policy.up_step < math.inf, _STEP.format("3.0")),
        ("up_floor", 0 <= policy.up_floor < math.inf, "give 0 or more"),
        ("dead_zone", 0.5 <= policy.dead_zone <= 1, "give a number from 0.5 to 1"),
        (
            "sparsity",
            0 <= policy.sparsity < 1,
            "give the fraction of zeros, 0 or above and below 1",
        ),
        (
            "sparsity",
            policy.down_step > 0 or not policy.target,
            f"pruning needs a lattice: set {key_of('down_step')} above 0, or "
            f"{key_of('sparsity')} = 0" + f" and {key_of('pruning_pattern')} = ''" * bool(fixed),
        ),
        (
            "pruning_recalibrate",
            lattice or policy.pruning_recalibrate == "never",
            f"it needs {down} = 'lattice'",
        ),
        (
            "pruning_recalibrate",
            not policy.widths or policy.pruning_recalibrate == "never",
            f"nodes of other widths have other statistics: leave out {key_of('widths')}",
        ),
    )


def _channels(policy: Policy, treatments: Sequence[Treatment]) -> Iterable[Rule]:
    """Of channels that go, and of nodes that train a slice or are treated otherwise."""
    lattice, down, tried = policy.down == "lattice", key_of("down"), policy.tried_structures
    return (
        *_structures(policy),
        (
            "channels_at",
            min(policy.channels, policy.heads, policy.layers) < 1 or not policy.channels_at,
            f"say which share of the channels remains: {key_of('channels')}, such as 0.5",
        ),
        (
            "channels_at",
            all(a < b for a, b in pairwise((0, *policy.channels_at))),
            "give rounds of 1 or more, ascending",
        ),
        ("widths", lattice or not policy.widths, f"it needs {down} = 'lattice'"),
        (
            "widths",
            not policy.widths or policy.up in ("lattice", "dense"),
            f"slices come back as updates of theirs: set {key_of('up')} = 'lattice'",
        ),
        (
            "widths",
            all(
                isinstance(share, int | float) and 0 < share < 1 for share in policy.widths.values()
            ),
            "give each class the share of the channels that it trains, above 0 and below 1: "
            "small=0.25, medium=0.5",
        ),
        (
            "widths",
            all(re.fullmatch(_CLASS, name) and name != WHOLE for name in policy.widths),
            f"name classes by a-z 0-9 _ -, and none {WHOLE!r}: so are called the nodes of none",
        ),
        (
            "widths",
            not (policy.widths and tried),
            f"slices are of the whole model: leave {' and '.join(tried)} out of "
            f"{key_of('pruning_knobs')}",
        ),
        ("classes", lattice or not policy.classes, f"it needs {down} = 'lattice'"),
        (
            "classes",
            all(re.fullmatch(_CLASS, name) and name != OTHERS for name in policy.classes),
            f"name classes by a-z 0-9 _ -, and none {OTHERS!r}: so are called the nodes of none",
        ),
        (
            "classes",
            policy.up == "lattice" or all(one.steps == 1 for one in treatments),
            f"steps are of updates on the lattice: set {key_of('up')} = 'lattice'",
        ),
        (
            "classes",
            not any(one.dense for one in treatments)
            or (policy.channels == 1 and not policy.widths and not tried),
            "a node that reads nothing but dense arrays is told no channels: keep them all",
        ),
        (
            "pruning_knobs",
            not (policy.channels_at and tried),
            f"they go by {key_of('channels_at')} or are searched: leave out one of the two",
        ),
        (
            "pruning_knobs",
            policy.pruning_knobs[: len(tried)] == tried,
            f"put {' and '.join(tried)} first: what else is pruned is a part of what is left",
        ),
    )


def _structures(policy: Policy) -> Iterator[Rule]:
    """What must hold of each knob that removes channels, heads or layers, and the remedy."""
    for name in ("channels", "heads", "layers"):
        share, at = getattr(policy, name), key_of("channels_at")
        yield name, 0 < share <= 1, "give the share that remains, such as 0.5"
        versions = f"it needs {key_of('down')} = 'lattice'"
        yield name, policy.down == "lattice" or share == 1, versions
        rounds = f"say after which rounds {name} go: {at}"
        yield name, share == 1 or bool(policy.channels_at), rounds
        whole = f"slices are of the whole model: set {key_of(name)} = 1, or no widths"
        yield "widths", not policy.widths or share == 1, whole


def _pruning(policy: Policy, fixed: float) -> Iterable[Rule]:
    """Of when and how weights are pruned."""
    return (
        ("pruning_seed", policy.pruning_seed >= 0, "give 0 or more"),
        ("pruning_begin", policy.pruning_begin >= 0, "give 0 or more"),
        ("pruning_min_size", policy.pruning_min_size >= 0, "give 0 or more"),
        ("pruning_steps", policy.pruning_steps >= 1, "give 1 or more"),
        ("pruning_interval", policy.pruning_interval >= 1, "give 1 or more"),
        ("pruning_regrow", 0 < policy.pruning_regrow <= 0.5, "give a share up to 0.5, above 0"),
        (
            "pruning_pattern",
            not policy.pruning_pattern or policy.mask_rule not in GROWN_BY,
            f"single weights move: set {key_of('pruning_masks')} = 'held' or 'dpf'",
        ),
        ("pruning_tolerance", 0 <= policy.pruning_tolerance < math.inf, "give 0 or more"),
        ("pruning_patience", policy.pruning_patience >= 1, "give 1 or more"),
        ("pruning_metric", bool(policy.pruning_metric), "name what evaluation measures"),
        (
            "pruning_knobs",
            0 < len(policy.pruning_knobs) == len(set(policy.pruning_knobs) & set(KNOBS)),
            f"choose among {', '.join(map(repr, KNOBS))}, each at most once",
        ),
        (
            "pruning_pattern",
            not (fixed and policy.is_automatic),
            f"what it removes is fixed: choose blocks, or another {key_of('pruning_schedule')}",
        ),
        (
            "pruning_knobs",
            policy.down_step > 0 or not policy.is_automatic,
            f"a search needs a lattice: set {key_of('down_step')} above 0",
        ),
        (
            "pruning_rewind",
            0 <= policy.pruning_rewind <= policy.pruning_begin,
            f"give a round up to {key_of('pruning_begin')} = {policy.pruning_begin}, after which "
            "no model is dense; 0 for none",
        ),
        (
            "pruning_rewind",
            not policy.pruning_rewind or policy.mask_rule != "dpf",
            f"masks that follow the weights would be lost: set {key_of('pruning_masks')} = 'held'",
        ),
    )


def _bytes(policy: Policy, fixed: float) -> Iterable[Rule]:
    """Of statistics, budgets, lazy nodes and what is kept."""
    lattice, down = policy.down == "lattice", key_of("down")
    return (
        (
            "statistics_bits",
            0 <= policy.statistics_bits <= MOST_STATISTICS_BITS,
            f"give 0 to {MOST_STATISTICS_BITS} bits of mantissa, such as 6; 0 is exact",
        ),
        *(
            (name, getattr(policy, name) >= 0, "give bytes, such as '2 MB', or 0 for no limit")
            for name in BUDGETS
        ),
        *(
            (name, not getattr(policy, name) or fits, remedy)
            for name in BUDGETS
            for fits, remedy in (
                (
                    lattice and policy.up == "lattice" and policy.down_step > 0 < policy.up_step,
                    f"it moves the steps: set {down} = {key_of('up')} = 'lattice', and "
                    f"{key_of('down_step')} and {key_of('up_step')} above 0",
                ),
                (
                    not (policy.is_automatic and "lattice" in policy.pruning_knobs),
                    f"both would move the lattice: leave it out of {key_of('pruning_knobs')}",
                ),
            )
        ),
        (
            "budget_knobs",
            0 < len(policy.budget_knobs) == len(set(policy.budget_knobs) & set(TURNED)),
            f"choose among {', '.join(map(repr, TURNED))}, each at most once",
        ),
        (
            "budget_knobs",
            not policy.thins
            or not (fixed or policy.is_automatic or policy.pruning_schedule in HELD),
            "a budget can say how much is pruned where nothing else does: set "
            f"{key_of('pruning_schedule')} = 'cubic', and no {key_of('pruning_pattern')} that is a "
            "share itself",
        ),
        ("lazy", 0 <= policy.lazy < math.inf, "give 0 or more, such as 1.5; 0: never"),
        (
            "lazy",
            not policy.lazy or (policy.up == "lattice" and policy.error_feedback),
            f"what is not sent is kept by error feedback: set {key_of('up')} = 'lattice' and "
            f"{key_of('error_feedback')} = true",
        ),
        (
            "lazy",
            not (policy.lazy and policy.widths),
            f"a slice's change says little of the model's: leave out {key_of('widths')}",
        ),
        ("history", policy.history >= 1, "give 1 or more"),
        ("history_bytes", policy.history_bytes >= 0, "give 0 or more bytes, such as '64 MB'"),
    )


def _choices(policy: Policy) -> Iterable[Rule]:
    """Of the end of pruning, and of knobs that name one of several."""
    return (
        (
            "pruning_end",
            policy.pruning_end > policy.pruning_begin or not policy.pruning_end,
            f"it must lie after {key_of('pruning_begin')} = {policy.pruning_begin}, or be 0, where "
            "pruning follows learning",
        ),
        *(
            (name, getattr(policy, name) in known, f"choose {' or '.join(map(repr, known))}")
            for name, known in _NAMED.items()
        ),
    )
