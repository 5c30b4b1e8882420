"""Errors of the fleet: one base, one class per cause."""

__all__ = [
    "AlreadyExists",
    "DatabaseError",
    "DatabaseMissing",
    "FleetError",
    "NotFound",
    "NotPossible",
    "ReleaseUnknown",
    "RolloutOverlap",
    "SchemaMismatch",
    "TokenRefused",
    "Unusable",
]


class FleetError(ValueError):
    """Base of every error that `prunecast.server.fleet` raises."""


class Unusable(FleetError):
    """A name, a percentage or a policy that cannot be used."""


class NotFound(FleetError):
    """No device, group or rollout of that name."""


class AlreadyExists(FleetError):
    """A device, group, rollout or database of that name is there already."""


class ReleaseUnknown(FleetError):
    """The release repository has no such live release, or it is not the group's."""


class RolloutOverlap(FleetError):
    """Another rollout is under way in a group that a new one names."""


class NotPossible(FleetError):
    """The state of a rollout, device or group does not allow the operation."""


class TokenRefused(FleetError):
    """A device's token is unknown or revoked."""


class DatabaseError(FleetError):
    """The database cannot be reached or refuses."""


class DatabaseMissing(DatabaseError):
    """The database holds no fleet."""


class SchemaMismatch(DatabaseError):
    """The database was made by another version of the software."""
