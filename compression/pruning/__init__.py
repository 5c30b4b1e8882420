"""What to remove and when: criteria, schedules, masks. Pure functions on numpy arrays."""

from prunecast.compression.pruning.magnitude import Scope, magnitude_masks
from prunecast.compression.pruning.schedules import CubicSchedule

__all__ = ["CubicSchedule", "Scope", "magnitude_masks"]
