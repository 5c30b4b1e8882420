"""A fleet of edge devices under control: groups, staged rollouts, pins, roll-back.

`apply` decides without file, socket, clock or generator.
"""

from prunecast.server.fleet.assignment import assign, cohort_size, rank
from prunecast.server.fleet.errors import (
    AlreadyExists,
    DatabaseError,
    DatabaseMissing,
    FleetError,
    NotFound,
    NotPossible,
    ReleaseUnknown,
    RolloutOverlap,
    SchemaMismatch,
    TokenRefused,
    Unusable,
)
from prunecast.server.fleet.machine import apply
from prunecast.server.fleet.model import (
    AuditEntry,
    Device,
    Directive,
    Fleet,
    Group,
    Outcome,
    Part,
    Policy,
    Progress,
    Release,
    Rollout,
    Status,
    Tally,
    Told,
)
from prunecast.server.fleet.step import Decision

__all__ = [
    "AlreadyExists",
    "AuditEntry",
    "DatabaseError",
    "DatabaseMissing",
    "Decision",
    "Device",
    "Directive",
    "Fleet",
    "FleetError",
    "Group",
    "NotFound",
    "NotPossible",
    "Outcome",
    "Part",
    "Policy",
    "Progress",
    "Release",
    "ReleaseUnknown",
    "Rollout",
    "RolloutOverlap",
    "SchemaMismatch",
    "Status",
    "Tally",
    "TokenRefused",
    "Told",
    "Unusable",
    "apply",
    "assign",
    "cohort_size",
    "rank",
]
