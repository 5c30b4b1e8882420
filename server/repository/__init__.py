"""Signed releases for edge devices: a TUF repository, its keys, and its checks.

Needs neither torch nor onnx. What makes a release is `authoring`, what delivers it `serving`.
"""

from prunecast.server.repository.checks.doctor import examine
from prunecast.server.repository.checks.metadata import Finding
from prunecast.server.repository.checks.verify import verify_repository
from prunecast.server.repository.errors import (
    CeremonyError,
    FleetUnanswered,
    KeyFileError,
    RecipeError,
    ReleaseInUse,
    ReleaseNotFound,
    RepositoryCorrupt,
    RepositoryError,
    RepositoryExists,
    ServerError,
    ThresholdNotMet,
    VerificationFailed,
)
from prunecast.server.repository.keys.ceremony import Ceremony
from prunecast.server.repository.keys.keyholders import (
    KeyRing,
    load_holder,
    load_public,
    make_holder,
    make_online,
)
from prunecast.server.repository.keys.signing import Change, RoleKeys, first_metadata
from prunecast.server.repository.reading import RepositoryReader
from prunecast.server.repository.repository import PublishedRelease, Repository
from prunecast.server.repository.roles import ONLINE_ROLES, ROLES, Expiry

__all__ = [
    "ONLINE_ROLES",
    "ROLES",
    "Ceremony",
    "CeremonyError",
    "Change",
    "Expiry",
    "Finding",
    "FleetUnanswered",
    "KeyFileError",
    "KeyRing",
    "PublishedRelease",
    "RecipeError",
    "ReleaseInUse",
    "ReleaseNotFound",
    "Repository",
    "RepositoryCorrupt",
    "RepositoryError",
    "RepositoryExists",
    "RepositoryReader",
    "RoleKeys",
    "ServerError",
    "ThresholdNotMet",
    "VerificationFailed",
    "examine",
    "first_metadata",
    "load_holder",
    "load_public",
    "make_holder",
    "make_online",
    "verify_repository",
]
