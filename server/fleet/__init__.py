"""A fleet of edge devices under control: groups, staged rollouts, pins, roll-back.

`apply` decides without file, socket, clock or generator; `FleetService` keeps the state in a
database and is what a wire service calls. Imported without SQLAlchemy; `FleetService` needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunecast.server.fleet.assignment import assign, cohort_size, rank
from prunecast.server.fleet.contact import (
    Answer,
    Certified,
    Credential,
    DeviceReport,
    DeviceState,
    Health,
    Identity,
    Receipt,
)
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

if TYPE_CHECKING:
    from prunecast.server.fleet.service import FleetService

__all__ = [
    "AlreadyExists",
    "Answer",
    "AuditEntry",
    "Certified",
    "Credential",
    "DatabaseError",
    "DatabaseMissing",
    "Decision",
    "Device",
    "DeviceReport",
    "DeviceState",
    "Directive",
    "Fleet",
    "FleetError",
    "FleetService",
    "Group",
    "Health",
    "Identity",
    "NotFound",
    "NotPossible",
    "Outcome",
    "Part",
    "Policy",
    "Progress",
    "Receipt",
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

_LAZY = {"FleetService": "service"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
