"""Signed releases for edge devices: a TUF repository, its keys, and its checks.

Needs neither torch nor onnx. What makes a release is `authoring`, what delivers it `serving`.
"""

from prunecast.server.repository.checks.doctor import examine
from prunecast.server.repository.checks.metadata import Finding
from prunecast.server.repository.checks.verify import VerifiedRelease, verify_repository
from prunecast.server.repository.errors import (
    CeremonyError,
    KeyFileError,
    RecipeError,
    ReleaseNotFound,
    RepositoryCorrupt,
    RepositoryError,
    RepositoryExists,
    ServerError,
    ThresholdNotMet,
    VerificationFailed,
)
from prunecast.server.repository.keys.ceremony import Ceremony
from prunecast.server.repository.keys.changes import (
    Change,
    RoleKeys,
    changed_metadata,
    first_metadata,
)
from prunecast.server.repository.keys.keyholders import (
    KeyRing,
    load_holder,
    load_public,
    make_holder,
    make_online,
)
from prunecast.server.repository.reading import ReleaseEntry, RepositoryReader
from prunecast.server.repository.repository import PublishedRelease, Repository
from prunecast.server.repository.roles import OFFLINE_ROLES, ONLINE_ROLES, ROLES, Expiry

__all__ = [
    "OFFLINE_ROLES",
    "ONLINE_ROLES",
    "ROLES",
    "Ceremony",
    "CeremonyError",
    "Change",
    "Expiry",
    "Finding",
    "KeyFileError",
    "KeyRing",
    "PublishedRelease",
    "RecipeError",
    "ReleaseEntry",
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
    "VerifiedRelease",
    "changed_metadata",
    "examine",
    "first_metadata",
    "load_holder",
    "load_public",
    "make_holder",
    "make_online",
    "verify_repository",
]
