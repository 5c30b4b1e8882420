"""What to remove and when: plans, their criteria, schedules and allocations, masks, channels.

Functions on numpy arrays, but for `prunecast.compression.pruning.narrowing`, which chooses the
channels of a torch module (needs torch and torch-pruning).
"""

from prunecast.compression.pruning.channels import ChannelPlan
from prunecast.compression.pruning.criteria import CRITERIA, GRADIENT, Criterion, Knowledge
from prunecast.compression.pruning.masks import (
    ALLOCATIONS,
    contribute_statistics,
    current_masks,
    holding,
    wanted_statistics,
)
from prunecast.compression.pruning.plan import SCHEDULES, CubicSchedule, PlanError, PruningPlan
from prunecast.compression.pruning.statistics import Statistics, StatisticsMean, pack_statistics

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "GRADIENT",
    "SCHEDULES",
    "ChannelPlan",
    "Criterion",
    "CubicSchedule",
    "Knowledge",
    "PlanError",
    "PruningPlan",
    "Statistics",
    "StatisticsMean",
    "contribute_statistics",
    "current_masks",
    "holding",
    "pack_statistics",
    "wanted_statistics",
]
