"""What to remove and when: plans, their criteria, schedules and allocations, masks, channels.

Functions on numpy arrays, but for `prunecast.compression.pruning.narrowing`, which chooses the
channels of a torch module (needs torch and torch-pruning).
"""

from prunecast.compression.pruning.channels import ChannelPlan
from prunecast.compression.pruning.criteria import CRITERIA, SQUARED_GRADIENT, Criterion, Knowledge
from prunecast.compression.pruning.masks import ALLOCATIONS, Allocation, current_masks, holding
from prunecast.compression.pruning.plan import (
    SCHEDULES,
    CubicSchedule,
    PlanError,
    PruningPlan,
    Schedule,
)
from prunecast.compression.pruning.statistics import (
    Statistics,
    StatisticsError,
    StatisticsMean,
    collecting,
    contribute_statistics,
    pack_statistics,
    unpack_statistics,
    wanted_statistics,
)

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "SCHEDULES",
    "SQUARED_GRADIENT",
    "Allocation",
    "ChannelPlan",
    "Criterion",
    "CubicSchedule",
    "Knowledge",
    "PlanError",
    "PruningPlan",
    "Schedule",
    "Statistics",
    "StatisticsError",
    "StatisticsMean",
    "collecting",
    "contribute_statistics",
    "current_masks",
    "holding",
    "pack_statistics",
    "unpack_statistics",
    "wanted_statistics",
]
