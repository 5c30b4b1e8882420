"""What the server may trade for bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from logging import WARNING
from typing import Any

import numpy as np

from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.allocation import ALLOCATIONS
from prunecast.compression.pruning.automatic import KNOBS, Search
from prunecast.compression.pruning.criteria import CRITERIA
from prunecast.compression.pruning.patterns import parse_pattern
from prunecast.compression.pruning.plan import ChannelSchedule, PruningPlan, Shares, is_named
from prunecast.compression.pruning.schedules import (
    AUTOMATIC,
    HELD,
    NEVER,
    SCHEDULES,
    IterativeSchedule,
)
from prunecast.compression.schemes import SchemeError
from prunecast.compression.schemes.interface import Option, Scheme
from prunecast.compression.schemes.registry import SCHEMES, scheme
from prunecast.compression.versions import UpdateRule, is_statistic
from prunecast.server.federation.errors import PolicyError
from prunecast.server.federation.knob_rules import rules
from prunecast.server.federation.knobs import (
    GROWN_BY,
    PREFIX,
    SIZES,
    check_type,
    coerced,
    default_of,
    in_bytes,
    key_of,
    refused,
)
from prunecast.server.federation.presets import PRESETS
from prunecast.server.federation.publishing.budgets import Limits

__all__ = ["Policy"]

_PART = 0.7  # of the rounds, by which pruning is over where it follows learning
_LEAST = 3  # rounds from the last dense model to the sparsest
_UNKNOWN = 25  # round by which it is over where nobody says how many there are
_MOST = 0.98  # sparsity that the automatic schedule goes up to at most, unless one is given
_SEARCHED = 0.85  # of the rounds, by which it tries no more
_LOWER = ("loss", "error", "perplexity", "mse", "rmse", "mae")  # metrics of which less is better
_FEEDBACK = {"error_feedback": bool, "accumulate": bool, "momentum": float}  # of schemes


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
    budget_knobs: tuple[str, ...] = ("lattice",)
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
            raise refused("pruning_pattern", self.pruning_pattern, str(error)) from error
        for name, fits, remedy in rules(self, fixed):
            if not fits:
                raise refused(name, getattr(self, name), remedy)
        for name in ("scheme", "down_scheme"):
            try:
                getattr(self, name)
            except SchemeError as error:
                options = "up_options" if name == "scheme" else "down_options"
                raise PolicyError(f"{key_of(options)}: {error}") from error

    @property
    def target(self) -> float:
        """The sparsity that pruning arrives at; where it is found while training, at most."""
        if self.thins:
            return self.sparsity or _MOST
        if not self.is_automatic:
            return self._fixed or self.sparsity
        return (self.sparsity or _MOST) if "sparsity" in self.pruning_knobs else 0.0

    @property
    def is_automatic(self) -> bool:
        """Whether how much is pruned is found while training."""
        return self.pruning_schedule == AUTOMATIC

    @property
    def thins(self) -> bool:
        """Whether a budget says how much is pruned."""
        return bool(self.limits) and "sparsity" in self.budget_knobs

    @property
    def tried_structures(self) -> tuple[str, ...]:
        """Of channels, heads and layers those of which is found while training how many go."""
        wanted = self.pruning_knobs if self.is_automatic else ()
        return tuple(name for name in wanted if name in Shares._fields)

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
        make = None if self.thins else SCHEDULES.get(self.pruning_schedule)
        # what is found while training begins with nothing
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
        by_name = is_statistic(name) or is_named(name, self.lossless)
        return self.down_step == 0 or dtype.kind != "f" or size < 2 or by_name

    def mantissa_bits(self, name: str, dtype: np.dtype[Any], size: int) -> int:
        """Bits of mantissa that a tensor without a lattice is rounded to; 0 for exact."""
        exact = self.down_step == 0 or dtype.kind != "f" or size < 2
        if exact or not is_statistic(name) or is_named(name, self.lossless):
            return 0
        return self.statistics_bits

    def is_trained(self, name: str, dtype: np.dtype[Any], size: int) -> bool:
        """Whether a tensor that becomes NaN or infinite is the sign of a training that diverged.

        So are floats that are no statistics: whatever else travels exactly may hold what it likes.
        """
        by_name = is_statistic(name) or is_named(name, self.lossless)
        return dtype.kind == "f" and size >= 2 and not by_name

    def check_rounds(self, rounds: int) -> None:
        """Warn, once, if pruning cannot arrive where it should.

        Args:
            rounds: how many there will be in all.
        """
        _, end = self.bounds(rounds)
        reached = self.pruning(rounds).schedule(rounds + 1)  # of what the last round arrives at
        if (self.target or self.tried_structures) and not end:
            _say_once(
                f"{rounds} rounds are too few to prune a model that is still to learn, so nothing "
                f"will be: train {math.ceil((self.pruning_begin + _LEAST) / _PART)} or more, or "
                f"set {key_of('pruning_end')} to the round by which pruning is over."
            )
        elif reached < self.target and not (self.is_automatic or self.thins):
            _say_once(
                f"Pruning ends in round {end}, after the last of {rounds}: the model "
                f"will have {reached:.0%} of zeros instead of {self.target:.0%}. Set "
                f"{key_of('pruning_end')} to {max(rounds, 1)} or less and "
                f"{key_of('pruning_begin')} below that, or train longer."
            )
        free = (*HELD, "layer-by-layer", AUTOMATIC)  # between whose steps weights move
        rises = self.pruning_schedule not in free and not self.thins and end == self.pruning_end
        full = self.pruning(rounds).schedule(end - 1) >= self.target
        if self.mask_rule in GROWN_BY and rises and end and not full:
            _say_once(
                f"{key_of('pruning_masks')} = {self.mask_rule!r} will move no weights: they move "
                f"once the sparsity rises no more, and only before {key_of('pruning_end')} = "
                f"{end}. Set {key_of('pruning_schedule')} = 'static' or 'one-shot'."
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
