"""What the server may trade for bytes: presets and knobs."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from logging import WARNING
from typing import Any

import numpy as np

from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.allocation import ALLOCATIONS
from prunecast.compression.pruning.automatic import KNOBS, Search
from prunecast.compression.pruning.criteria import CRITERIA
from prunecast.compression.pruning.patterns import parse_pattern
from prunecast.compression.pruning.plan import ChannelSchedule, PruningPlan
from prunecast.compression.pruning.schedules import (
    AUTOMATIC,
    HELD,
    NEVER,
    SCHEDULES,
    IterativeSchedule,
)
from prunecast.compression.pruning.statistics import GROWTH, VOTES
from prunecast.compression.schemes import SchemeError
from prunecast.compression.schemes.interface import Option, Scheme
from prunecast.compression.schemes.registry import SCHEMES, scheme
from prunecast.compression.versions import UpdateRule, is_statistic
from prunecast.compression.versions.statistics import MOST_STATISTICS_BITS
from prunecast.server.federation.errors import PolicyError
from prunecast.server.federation.knobs import (
    BUDGETS,
    PREFIX,
    SIZES,
    check_type,
    coerced,
    default_of,
    in_bytes,
)
from prunecast.server.federation.knobs import key_of as _key
from prunecast.server.federation.knobs import refused as _refused
from prunecast.server.federation.publishing.budgets import Limits
from prunecast.server.federation.publishing.classes import parse_classes

__all__ = ["GROWN_BY", "PRESETS", "WHOLE", "Policy"]

WHOLE = "whole"
"""What nodes are called together that state no width class: they train all of the model."""

GROWN_BY = {"rigl": GROWTH, "feddst": VOTES}
"""Ways in which masks move between pruning events, and the statistic that each asks nodes for."""

_PART = 0.7  # of the rounds, by which pruning is over where it follows learning
_NEAR = 1e-6  # a sparsity to that of a pattern
_LEAST = 3  # rounds from the last dense model to the sparsest
_UNKNOWN = 25  # round by which it is over where nobody says how many there are
_MOST = 0.98  # sparsity that the automatic schedule goes up to at most, unless one is given
_SEARCHED = 0.85  # of the rounds, by which it tries no more
_STEP = "give a number of 0 or above, such as {}; 0 is exact"
_LOWER = ("loss", "error", "perplexity", "mse", "rmse", "mae")  # metrics of which less is better
_FEEDBACK = {"error_feedback": bool, "accumulate": bool, "momentum": float}  # of schemes
_CLASS = "[a-z0-9_-]{1,64}"
_NAMED: dict[str, Mapping[str, Any]] = {
    "pruning_scope": ALLOCATIONS,
    "pruning_criterion": CRITERIA,
    "pruning_schedule": {**SCHEDULES, AUTOMATIC: None},
    "pruning_recalibrate": dict.fromkeys(("never", "events", "always")),
    "pruning_masks": dict.fromkeys(("auto", "dpf", "held", *GROWN_BY)),
}


@dataclass(frozen=True)
class Policy:
    """How models and updates are pruned, put on a lattice and coded.

    Every field is a knob that Flower's run config can set, as ``prunecast.<field with dashes>``;
    docs/policy.md says what each one means, with its unit and range.

    Raises:
        PolicyError: a value outside its range; names the knob, as configured, and the remedy.
    """

    down: str = "lattice"
    up: str = "lattice"
    up_options: Mapping[str, Option] = field(default_factory=dict)
    down_options: Mapping[str, Option] = field(default_factory=dict)
    down_step: float = 0.4  # in standard deviations of each tensor
    vector_step: float = 0.05  # of biases, norms and adapters, which are few and sensitive
    hysteresis: float = 0.75  # in lattice steps
    up_step: float = 3.2  # in standard deviations of each tensor's update
    up_floor: float = 2.2  # in lattice steps of the model
    dead_zone: float = 0.7
    error_feedback: bool = True
    sparsity: float = 0.0
    channels: float = 1.0  # share that remains
    heads: float = 1.0  # share of every attention layer's that remains
    layers: float = 1.0  # share of the residual ones that remains
    channels_at: tuple[int, ...] = ()  # rounds after which they go
    widths: Mapping[str, Option] = field(default_factory=dict)  # class to share of the channels
    classes: Mapping[str, Option] = field(default_factory=dict)  # of nodes, by what they can do
    pruning_begin: int = 2
    pruning_end: int = 0
    pruning_scope: str = "layer"
    pruning_criterion: str = "magnitude"
    pruning_schedule: str = "cubic"
    pruning_steps: int = 4  # of the schedule "iterative"
    pruning_tolerance: float = 0.005  # of the schedule "automatic", in units of the metric
    pruning_patience: int = 3  # models
    pruning_metric: str = "accuracy"
    pruning_knobs: tuple[str, ...] = ("sparsity",)
    pruning_masks: str = "auto"
    pruning_interval: int = 5  # rounds from one drop-and-grow to the next
    pruning_regrow: float = 0.3  # share of the kept weights that the first one moves
    pruning_pattern: str = ""
    pruning_seed: int = 0  # of the criterion "random"
    pruning_rewind: int = 0  # round whose weights pruning events go back to; 0 for none
    pruning_recalibrate: str = "never"  # BatchNorm's running statistics, on the published model
    pruning_records: tuple[str, ...] = ("arrays",)
    pruning_min_size: int = 1024
    pruning_exclude: tuple[str, ...] = ()
    pruning_adapters: bool = False
    pruning_align: bool = True
    statistics_bits: int = 6  # of mantissa, of normalisation layers' running statistics
    lossless: tuple[str, ...] = ("*num_batches_tracked",)
    budget_round: int = 0  # bytes, both ways
    budget_node: int = 0
    budget_run: int = 0
    finer_when_rare: bool = True
    lazy: float = 0.0  # times the norm of the model's change
    history: int = 16
    history_bytes: int = 64_000_000  # of versions beyond these

    def __post_init__(self) -> None:
        for name in SIZES:
            object.__setattr__(self, name, in_bytes(name, getattr(self, name)))
        for knob in dataclasses.fields(self):
            check_type(knob.name, getattr(self, knob.name), default_of(knob))
        try:
            fixed = self._fixed
        except ValueError as error:
            raise _refused("pruning_pattern", self.pruning_pattern, str(error)) from error
        try:
            treatments = [one.treatment for one in parse_classes(self.classes)]
        except ValueError as error:
            raise _refused("classes", dict(self.classes), str(error)) from error
        schemes = ", ".join(map(repr, ("lattice", "dense", *SCHEMES)))
        lattice, down = self.down == "lattice", _key("down")
        for name, fits, remedy in (
            ("down", self.down in ("lattice", "dense", *SCHEMES), f"choose one of {schemes}"),
            ("up", self.up in ("lattice", "dense", *SCHEMES), f"choose one of {schemes}"),
            (
                "up",
                lattice or self.up != "lattice",
                f"it needs {down} = 'lattice'; choose 'dense' or a scheme",
            ),
            (
                "sparsity",
                not (self.sparsity and fixed) or abs(self.sparsity - fixed) < _NEAR,
                f"{_key('pruning_pattern')} = {self.pruning_pattern!r} comes to {fixed:g}: give "
                "that, or 0",
            ),
            (
                "pruning_pattern",
                not fixed or self.pruning_scope == "layer",
                f"it is the same sparsity for every tensor: set {_key('pruning_scope')} = 'layer'",
            ),
            ("pruning_pattern", lattice or not fixed, f"pruning needs {down} = 'lattice'"),
            ("sparsity", lattice or not self.sparsity, f"pruning needs {down} = 'lattice'"),
            (
                "pruning_schedule",
                lattice or not self.is_automatic,
                f"it needs {down} = 'lattice'",
            ),
            (
                "up_options",
                self.up in SCHEMES or not self.up_options,
                f"they belong to a scheme: set {_key('up')}",
            ),
            (
                "down_options",
                self.down in SCHEMES or not self.down_options,
                f"they belong to a scheme: set {_key('down')}",
            ),
            ("down_step", 0 <= self.down_step < math.inf, _STEP.format("0.1")),
            (
                "vector_step",
                0 < self.vector_step < math.inf,
                "give a number above 0, such as 0.025",
            ),
            ("hysteresis", 0.5 <= self.hysteresis <= 1, "give a number from 0.5 to 1"),
            ("up_step", 0 <= self.up_step < math.inf, _STEP.format("3.0")),
            ("up_floor", 0 <= self.up_floor < math.inf, "give 0 or more"),
            ("dead_zone", 0.5 <= self.dead_zone <= 1, "give a number from 0.5 to 1"),
            (
                "sparsity",
                0 <= self.sparsity < 1,
                "give the fraction of zeros, 0 or above and below 1",
            ),
            (
                "sparsity",
                self.down_step > 0 or not self.target,
                f"pruning needs a lattice: set {_key('down_step')} above 0, or "
                f"{_key('sparsity')} = 0" + f" and {_key('pruning_pattern')} = ''" * bool(fixed),
            ),
            (
                "pruning_recalibrate",
                lattice or self.pruning_recalibrate == "never",
                f"it needs {down} = 'lattice'",
            ),
            (
                "pruning_recalibrate",
                not self.widths or self.pruning_recalibrate == "never",
                f"nodes of other widths have other statistics: leave out {_key('widths')}",
            ),
            *self._structures(),
            (
                "channels_at",
                min(self.channels, self.heads, self.layers) < 1 or not self.channels_at,
                f"say which share of the channels remains: {_key('channels')}, such as 0.5",
            ),
            (
                "channels_at",
                all(a < b for a, b in pairwise((0, *self.channels_at))),
                "give rounds of 1 or more, ascending",
            ),
            ("widths", lattice or not self.widths, f"it needs {down} = 'lattice'"),
            (
                "widths",
                not self.widths or self.up in ("lattice", "dense"),
                f"slices come back as updates of theirs: set {_key('up')} = 'lattice'",
            ),
            (
                "widths",
                all(
                    isinstance(share, int | float) and 0 < share < 1
                    for share in self.widths.values()
                ),
                "give each class the share of the channels that it trains, above 0 and below 1: "
                "small=0.25, medium=0.5",
            ),
            (
                "widths",
                all(re.fullmatch(_CLASS, name) and name != WHOLE for name in self.widths),
                f"name classes by a-z 0-9 _ -, and none {WHOLE!r}: so are called the nodes of none",
            ),
            (
                "widths",
                not (self.widths and self.tries_channels),
                f"slices are of the whole model: leave channels out of {_key('pruning_knobs')}",
            ),
            ("classes", lattice or not self.classes, f"it needs {down} = 'lattice'"),
            (
                "classes",
                all(re.fullmatch(_CLASS, name) for name in self.classes),
                "name classes by a-z 0-9 _ -",
            ),
            (
                "classes",
                self.up == "lattice" or all(one.steps == 1 for one in treatments),
                f"steps are of updates on the lattice: set {_key('up')} = 'lattice'",
            ),
            (
                "classes",
                not any(one.dense for one in treatments)
                or (self.channels == 1 and not self.widths and not self.tries_channels),
                "a node that reads nothing but dense arrays is told no channels: keep them all",
            ),
            (
                "pruning_knobs",
                not (self.channels_at and self.tries_channels),
                f"channels go by {_key('channels_at')} or are searched: leave out one of the two",
            ),
            (
                "pruning_knobs",
                not self.tries_channels or self.pruning_knobs[0] == "channels",
                "put channels first: what else is pruned is a part of what they leave",
            ),
            ("pruning_seed", self.pruning_seed >= 0, "give 0 or more"),
            ("pruning_begin", self.pruning_begin >= 0, "give 0 or more"),
            ("pruning_min_size", self.pruning_min_size >= 0, "give 0 or more"),
            ("pruning_steps", self.pruning_steps >= 1, "give 1 or more"),
            ("pruning_interval", self.pruning_interval >= 1, "give 1 or more"),
            ("pruning_regrow", 0 < self.pruning_regrow <= 0.5, "give a share up to 0.5, above 0"),
            (
                "pruning_pattern",
                not self.pruning_pattern or self.mask_rule not in GROWN_BY,
                f"single weights move: set {_key('pruning_masks')} = 'held' or 'dpf'",
            ),
            ("pruning_tolerance", 0 <= self.pruning_tolerance < math.inf, "give 0 or more"),
            ("pruning_patience", self.pruning_patience >= 1, "give 1 or more"),
            ("pruning_metric", bool(self.pruning_metric), "name what evaluation measures"),
            (
                "pruning_knobs",
                0 < len(self.pruning_knobs) == len(set(self.pruning_knobs) & set(KNOBS)),
                f"choose among {', '.join(map(repr, KNOBS))}, each at most once",
            ),
            (
                "pruning_pattern",
                not (fixed and self.is_automatic),
                f"what it removes is fixed: choose blocks, or another {_key('pruning_schedule')}",
            ),
            (
                "pruning_knobs",
                self.down_step > 0 or not self.is_automatic,
                f"a search needs a lattice: set {_key('down_step')} above 0",
            ),
            (
                "pruning_rewind",
                0 <= self.pruning_rewind <= self.pruning_begin,
                f"give a round up to {_key('pruning_begin')} = {self.pruning_begin}, after which "
                "no model is dense; 0 for none",
            ),
            (
                "pruning_rewind",
                not self.pruning_rewind or self.mask_rule != "dpf",
                f"masks that follow the weights would be lost: set {_key('pruning_masks')} = "
                "'held'",
            ),
            (
                "statistics_bits",
                0 <= self.statistics_bits <= MOST_STATISTICS_BITS,
                f"give 0 to {MOST_STATISTICS_BITS} bits of mantissa, such as 6; 0 is exact",
            ),
            *(
                (name, getattr(self, name) >= 0, "give bytes, such as '2 MB', or 0 for no limit")
                for name in BUDGETS
            ),
            *(
                (name, not getattr(self, name) or fits, remedy)
                for name in BUDGETS
                for fits, remedy in (
                    (
                        lattice and self.up == "lattice" and self.down_step > 0 < self.up_step,
                        f"it moves the steps: set {down} = {_key('up')} = 'lattice', and "
                        f"{_key('down_step')} and {_key('up_step')} above 0",
                    ),
                    (
                        not (self.is_automatic and "lattice" in self.pruning_knobs),
                        f"both would move the lattice: leave it out of {_key('pruning_knobs')}",
                    ),
                )
            ),
            ("lazy", 0 <= self.lazy < math.inf, "give 0 or more, such as 1.5; 0: never"),
            (
                "lazy",
                not self.lazy or (self.up == "lattice" and self.error_feedback),
                f"what is not sent is kept by error feedback: set {_key('up')} = 'lattice' and "
                f"{_key('error_feedback')} = true",
            ),
            (
                "lazy",
                not (self.lazy and self.widths),
                f"a slice's change says little of the model's: leave out {_key('widths')}",
            ),
            ("history", self.history >= 1, "give 1 or more"),
            ("history_bytes", self.history_bytes >= 0, "give 0 or more bytes, such as '64 MB'"),
            (
                "pruning_end",
                self.pruning_end > self.pruning_begin or not self.pruning_end,
                f"it must lie after {_key('pruning_begin')} = {self.pruning_begin}, or be 0, where "
                "pruning follows learning",
            ),
            *(
                (name, getattr(self, name) in known, f"choose {' or '.join(map(repr, known))}")
                for name, known in _NAMED.items()
            ),
        ):
            if not fits:
                raise _refused(name, getattr(self, name), remedy)
        for name in ("scheme", "down_scheme"):
            try:
                getattr(self, name)
            except SchemeError as error:
                options = "up_options" if name == "scheme" else "down_options"
                raise PolicyError(f"{_key(options)}: {error}") from error

    def _structures(self) -> Iterator[tuple[str, bool, str]]:
        """What must hold of each knob that removes channels, heads or layers, and the remedy."""
        for name in ("channels", "heads", "layers"):
            share, at = getattr(self, name), _key("channels_at")
            yield name, 0 < share <= 1, "give the share that remains, such as 0.5"
            versions = f"it needs {_key('down')} = 'lattice'"
            yield name, self.down == "lattice" or share == 1, versions
            rounds = f"say after which rounds {name} go: {at}"
            yield name, share == 1 or bool(self.channels_at), rounds
            whole = f"slices are of the whole model: set {_key(name)} = 1, or no widths"
            yield "widths", not self.widths or share == 1, whole

    @property
    def target(self) -> float:
        """The sparsity that pruning arrives at; under the automatic schedule, at most."""
        if not self.is_automatic:
            return self._fixed or self.sparsity
        return (self.sparsity or _MOST) if "sparsity" in self.pruning_knobs else 0.0

    @property
    def is_automatic(self) -> bool:
        """Whether how much is pruned is found while training."""
        return self.pruning_schedule == AUTOMATIC

    @property
    def tries_channels(self) -> bool:
        """Whether how many channels go is found while training."""
        return self.is_automatic and "channels" in self.pruning_knobs

    def search(self) -> Search | None:
        """What finds it, at its beginning; None where a schedule says how much."""
        if not self.is_automatic:
            return None
        knobs = [KNOBS[name] for name in self.pruning_knobs]
        most = -math.log2(1 - self.target)
        return Search(
            [dataclasses.replace(k, most=most) if k.name == "sparsity" else k for k in knobs],
            self.pruning_tolerance,
            self.pruning_patience,
            higher=not self.pruning_metric.lower().endswith(_LOWER),
        )

    @property
    def _fixed(self) -> float:
        """What a pattern comes to; 0 where that is free."""
        chosen = parse_pattern(self.pruning_pattern)
        return 0.0 if chosen is None else chosen.sparsity or 0.0

    @property
    def mask_rule(self) -> str:
        """How masks change between pruning events: `pruning_masks`, or what suits the schedule."""
        if self.pruning_masks != "auto":
            return self.pruning_masks
        return "held" if self.pruning_schedule in HELD else "dpf"

    def moving_until(self, rounds: int = 0) -> int:
        """The first round in which masks do not drop and grow weights any more.

        Args:
            rounds: how many there will be in all; 0 where nobody knows.
        """
        return self.pruning_end or (int(_PART * rounds) if rounds else _UNKNOWN)

    def bounds(self, rounds: int = 0) -> tuple[int, int]:
        """Last round that is dense in any case, first round in which pruning is over in any case.

        Args:
            rounds: how many there will be in all; 0 where nobody knows.

        Returns:
            Both 0 where there are too few rounds to prune.
        """
        if self.pruning_schedule == "static":
            return 0, 1
        if self.pruning_end:
            return self.pruning_begin, self.pruning_end
        part = _SEARCHED if self.is_automatic else _PART
        end = int(part * rounds) if rounds else max(_UNKNOWN, self.pruning_begin + _LEAST)
        return (self.pruning_begin, end) if end - self.pruning_begin >= _LEAST else (0, 0)

    def pruning(self, rounds: int = 0) -> PruningPlan:
        """The plan that the knobs state, for the records that it names.

        Args:
            rounds: how many there will be in all; 0 where nobody knows.
        """
        begin, end = self.bounds(rounds)
        target = self.target if end else 0.0
        make = SCHEDULES.get(self.pruning_schedule)
        # what is automatic begins with nothing
        schedule = make(target, begin, max(end, 1)) if make is not None else NEVER
        if isinstance(schedule, IterativeSchedule):
            schedule = dataclasses.replace(schedule, steps=self.pruning_steps)
        return PruningPlan(
            schedule,
            CRITERIA[self.pruning_criterion],
            ALLOCATIONS[self.pruning_scope],
            self.pruning_min_size,
            self.pruning_exclude,
            self.pruning_adapters,
            self.pruning_records,
            pattern=parse_pattern(self.pruning_pattern),
            seed=self.pruning_seed,
            channels=ChannelSchedule(self.channels, self.channels_at, self.heads, self.layers),
        )

    @property
    def scheme(self) -> Scheme | None:
        """The scheme that updates travel by, with its options; None for "lattice" and "dense"."""
        return scheme(self.up, **self.up_options) if self.up in SCHEMES else None

    @property
    def down_scheme(self) -> Scheme | None:
        """The scheme that the model's changes travel by; None for "lattice" and "dense".

        Without feedback of its own: what it drops stays the difference between the master and what
        nodes hold, which is what it is given next.
        """
        if self.down not in SCHEMES:
            return None
        chosen = scheme(self.down, **self.down_options)
        off = {key: kind(0) for key, kind in _FEEDBACK.items() if key in chosen.config()}
        return scheme(self.down, **{**chosen.config(), **off})

    @property
    def limits(self) -> Limits:
        """Of bytes; false where there are none."""
        return Limits(self.budget_round, self.budget_node, self.budget_run)

    @property
    def update_rule(self) -> UpdateRule:
        """What nodes are told about their updates."""
        bits = self.statistics_bits if self.down_step > 0 else 0
        return UpdateRule(self.up_step, self.dead_zone, self.error_feedback, self.up_floor, bits)

    def is_lossless(self, name: str, dtype: np.dtype[Any], size: int) -> bool:
        """Whether a tensor has no lattice: not a float, fewer than two elements, or by name.

        It travels exactly, or in the `mantissa_bits` of a running statistic.
        """
        by_name = is_statistic(name) or _matches(name, self.lossless)
        return self.down_step == 0 or dtype.kind != "f" or size < 2 or by_name

    def mantissa_bits(self, name: str, dtype: np.dtype[Any], size: int) -> int:
        """Bits of mantissa that a tensor without a lattice is rounded to; 0 for exact."""
        exact = self.down_step == 0 or dtype.kind != "f" or size < 2
        if exact or not is_statistic(name) or _matches(name, self.lossless):
            return 0
        return self.statistics_bits

    def is_trained(self, name: str, dtype: np.dtype[Any], size: int) -> bool:
        """Whether a tensor that becomes NaN or infinite is the sign of a training that diverged.

        So are floats that are no statistics: whatever else travels exactly may hold what it likes.
        """
        by_name = is_statistic(name) or _matches(name, self.lossless)
        return dtype.kind == "f" and size >= 2 and not by_name

    def check_rounds(self, rounds: int) -> None:
        """Warn, once, if pruning cannot arrive where it should.

        Args:
            rounds: how many there will be in all.
        """
        _, end = self.bounds(rounds)
        reached = self.pruning(rounds).schedule(rounds + 1)  # of what the last round arrives at
        if (self.target or self.tries_channels) and not end:
            _say_once(
                f"{rounds} rounds are too few to prune a model that is still to learn, so nothing "
                f"will be: train {math.ceil((self.pruning_begin + _LEAST) / _PART)} or more, or "
                f"set {_key('pruning_end')} to the round by which pruning is over."
            )
        elif reached < self.target and not self.is_automatic:
            _say_once(
                f"Pruning ends in round {end}, after the last of {rounds}: the model "
                f"will have {reached:.0%} of zeros instead of {self.target:.0%}. Set "
                f"{_key('pruning_end')} to {max(rounds, 1)} or less and {_key('pruning_begin')} "
                "below that, or train longer."
            )

    @classmethod
    def preset(cls, name: str, **knobs: Any) -> Policy:
        """A named policy, with some knobs replaced.

        Raises:
            PolicyError: unknown preset or knob, or a value outside its range.
        """
        if name not in PRESETS:
            raise PolicyError(
                f"{PREFIX}preset = {name!r} is unknown: choose one of {', '.join(PRESETS)}"
            )
        known = {knob.name for knob in dataclasses.fields(cls)}
        for knob in knobs:
            if knob not in known:
                raise PolicyError(
                    f"unknown knob {knob!r}: choose one of {', '.join(sorted(known))}"
                )
        return cls(**{**PRESETS[name], **knobs})

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any], *, preset: str = "balanced") -> Policy:
        """Read ``prunecast.*`` keys of Flower's run config; other keys are ignored.

        ``prunecast.preset`` chooses the preset; every other key is a field with dashes for
        underscores. Lists of patterns, and options as ``name=value``, are one comma-separated
        string, since Flower's run config has no lists and tables.

        Args:
            run_config: `context.run_config` of the ServerApp.
            preset: the preset when the run config names none.

        Raises:
            PolicyError: unknown key, or a value of the wrong type or outside its range.

        Examples:
            >>> Policy.from_run_config({"prunecast.preset": "small", "lr": 0.1}).sparsity
            0.8
        """
        fields = {knob.name: knob for knob in dataclasses.fields(cls)}
        knobs: dict[str, Any] = {}
        for key, value in run_config.items():
            if not key.startswith(PREFIX):
                continue
            name = key.removeprefix(PREFIX).replace("-", "_")
            if name == "preset":
                preset = str(value)
                continue
            if name not in fields:
                known = ", ".join(PREFIX + n.replace("_", "-") for n in ["preset", *fields])
                raise PolicyError(f"unknown run config key {key!r}: choose one of {known}")
            knobs[name] = coerced(key, value, default_of(fields[name]))
        policy = cls.preset(preset, **knobs)
        rounds = run_config.get("num-server-rounds")
        if isinstance(rounds, int):
            policy.check_rounds(rounds)
        return policy


@cache
def _say_once(message: str) -> None:
    log(WARNING, "%s", message)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


PRESETS: dict[str, dict[str, Any]] = {
    # plain Flower, measured
    "dense": {"down": "dense", "up": "dense"},
    "lossless": {"down_step": 0.0, "up_step": 0.0},
    # twice the bytes of balanced, for tasks that cannot spare its half point or two
    "fine": {"down_step": 0.1, "up_step": 0.8},
    "balanced": {},  # every knob's default
    # ranked over the whole model: layers that matter little give more
    "small": {"sparsity": 0.8, "pruning_scope": "global"},
    # costs accuracy
    "tiny": {
        "sparsity": 0.95,
        "pruning_scope": "global",
        "down_step": 0.5,
        "up_step": 4.0,
        "up_floor": 3.0,
    },
}
