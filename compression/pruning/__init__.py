"""What to remove and when: criteria, schedules, masks, channels.

Functions on numpy arrays; `choose_channels` and `narrow_module` need torch and torch-pruning, and
are imported when first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunecast.compression.pruning.channels import ChannelPlan, PlanError
from prunecast.compression.pruning.magnitude import Scope, magnitude_masks
from prunecast.compression.pruning.schedules import CubicSchedule

if TYPE_CHECKING:
    from prunecast.compression.pruning.narrowing import choose_channels, narrow_module

__all__ = [
    "ChannelPlan",
    "CubicSchedule",
    "PlanError",
    "Scope",
    "choose_channels",
    "magnitude_masks",
    "narrow_module",
]

_LAZY = {"choose_channels": "narrowing", "narrow_module": "narrowing"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
