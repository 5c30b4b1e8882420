"""What the server may trade for bytes: presets and knobs."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunecast.compression.pruning import CubicSchedule, Scope
from prunecast.compression.versions import UpdateRule, VersionsError
from prunecast.server.federation.errors import PolicyError

__all__ = ["PRESETS", "Policy"]

_PREFIX = "prunecast."
_STATISTICS = ("*running_mean", "*running_var", "*num_batches_tracked")


@dataclass(frozen=True)
class Policy:
    """How models and updates are pruned, put on a lattice and coded.

    Every field is a knob that Flower's run config can set, as ``prunecast.<field with dashes>``.

    Attributes:
        down_step: lattice step of the published model, in standard deviations of each tensor;
            0 publishes the exact arrays.
        up_step: quantisation step of updates, in standard deviations of each tensor's update;
            0 sends the exact arrays (then `down_step` must be 0 as well for an exact run).
        dead_zone: fraction of `up_step` below which a change rounds to zero, 0.5 to 1.
        error_feedback: nodes keep what quantisation dropped and add it to their next update.
        sparsity: final fraction of zeros in prunable tensors, 0 <= sparsity < 1.
        pruning_begin: last version that is dense.
        pruning_end: first version at the final sparsity.
        pruning_scope: "layer" or "global" ranking of magnitudes.
        pruning_records: keys of the array records that are pruned; others (control variates, say)
            are only quantised.
        pruning_min_size: tensors with fewer elements are never pruned.
        pruning_exclude: name patterns (shell style) that are never pruned.
        lossless: name patterns that always travel exactly, by default BatchNorm's statistics.
        history: number of past versions kept for deltas; a node that holds an older one gets a
            keyframe.
    """

    down_step: float = 0.1
    up_step: float = 3.0
    dead_zone: float = 0.6
    error_feedback: bool = True
    sparsity: float = 0.0
    pruning_begin: int = 2
    pruning_end: int = 25
    pruning_scope: Scope = "layer"
    pruning_records: tuple[str, ...] = ("arrays",)
    pruning_min_size: int = 1024
    pruning_exclude: tuple[str, ...] = ()
    lossless: tuple[str, ...] = _STATISTICS
    history: int = 16

    def __post_init__(self) -> None:
        for name in ("down_step", "up_step"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise PolicyError(f"{name} must be a number >= 0, not {value!r}")
        if self.pruning_scope not in ("layer", "global"):
            raise PolicyError(
                f"pruning_scope must be 'layer' or 'global', not {self.pruning_scope!r}"
            )
        if self.sparsity and not self.down_step:
            raise PolicyError("pruning needs a lattice: set down_step > 0 or sparsity = 0")
        if self.history < 1:
            raise PolicyError(f"history must be at least 1, not {self.history}")
        try:
            _ = self.schedule, self.update_rule
        except (ValueError, VersionsError) as error:
            raise PolicyError(str(error)) from error

    @property
    def schedule(self) -> CubicSchedule:
        """Sparsity as a function of the version number."""
        return CubicSchedule(self.sparsity, self.pruning_begin, self.pruning_end)

    @property
    def update_rule(self) -> UpdateRule:
        """What nodes are told about their updates."""
        return UpdateRule(self.up_step, self.dead_zone, self.error_feedback)

    def is_lossless(self, name: str, dtype: np.dtype[Any], size: int) -> bool:
        """Whether a tensor travels exactly: not a float, fewer than two elements, or by name."""
        return (
            self.down_step == 0
            or dtype.kind != "f"
            or size < 2
            or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.lossless)
        )

    def is_prunable(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a lattice tensor may be pruned: a matrix or kernel of some size."""
        return (
            self.sparsity > 0
            and len(shape) >= 2
            and math.prod(shape) >= self.pruning_min_size
            and not any(fnmatch.fnmatchcase(name, p) for p in self.pruning_exclude)
        )

    @classmethod
    def preset(cls, name: str, **knobs: Any) -> Policy:
        """A named policy, with some knobs replaced.

        Raises:
            PolicyError: unknown preset or knob, or a value outside its range.
        """
        if name not in PRESETS:
            raise PolicyError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        known = {field.name for field in dataclasses.fields(cls)}
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
        underscores. Lists of patterns are one comma-separated string, since Flower's run config
        has no lists.

        Args:
            run_config: `context.run_config` of the ServerApp.
            preset: the preset when the run config names none.

        Raises:
            PolicyError: unknown key, or a value of the wrong type or outside its range.

        Examples:
            >>> Policy.from_run_config({"prunecast.preset": "small", "lr": 0.1}).sparsity
            0.9
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        knobs: dict[str, Any] = {}
        for key, value in run_config.items():
            if not key.startswith(_PREFIX):
                continue
            name = key.removeprefix(_PREFIX).replace("-", "_")
            if name == "preset":
                preset = str(value)
                continue
            if name not in fields:
                known = ", ".join(_PREFIX + n.replace("_", "-") for n in ["preset", *fields])
                raise PolicyError(f"unknown run config key {key!r}: choose one of {known}")
            knobs[name] = _coerce(key, value, fields[name].default)
        return cls.preset(preset, **knobs)


def _coerce(key: str, value: Any, default: Any) -> Any:
    wrong = PolicyError(f"{key} = {value!r} is not of type {type(default).__name__}")
    if isinstance(default, tuple):
        if not isinstance(value, str):
            raise PolicyError(f"{key} = {value!r} is not a comma-separated string of name patterns")
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(default, bool) or isinstance(value, bool):
        if not (isinstance(default, bool) and isinstance(value, bool)):
            raise wrong
        return value
    if isinstance(default, float) and isinstance(value, int | float):
        return float(value)
    if isinstance(value, type(default)):
        return value
    raise wrong


PRESETS: dict[str, dict[str, Any]] = {
    "lossless": {"down_step": 0.0, "up_step": 0.0},
    "balanced": {"down_step": 0.1, "up_step": 3.0, "dead_zone": 0.6},
    # ranked over the whole model: layers that matter little give more
    "small": {
        "down_step": 0.1,
        "up_step": 3.0,
        "dead_zone": 0.6,
        "sparsity": 0.9,
        "pruning_scope": "global",
    },
}
