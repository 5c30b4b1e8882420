"""What to remove and when: plans, their criteria, schedules and allocations, masks, channels.

Functions on numpy arrays, but for `prunecast.compression.pruning.narrowing`, which chooses the
channels of a torch module (needs torch and torch-pruning).
"""

from prunecast.compression.pruning.channels import ChannelPlan
from prunecast.compression.pruning.criteria import CRITERIA, Criterion, Knowledge
from prunecast.compression.pruning.masks import ALLOCATIONS, Allocation, current_masks, holding
from prunecast.compression.pruning.plan import (
    SCHEDULES,
    CubicSchedule,
    PlanError,
    PruningPlan,
    Schedule,
)

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "SCHEDULES",
    "Allocation",
    "ChannelPlan",
    "Criterion",
    "CubicSchedule",
    "Knowledge",
    "PlanError",
    "PruningPlan",
    "Schedule",
    "current_masks",
    "holding",
]
