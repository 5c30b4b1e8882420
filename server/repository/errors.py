"""Errors of the release repository: one base, one class per cause."""

__all__ = [
    "CeremonyError",
    "KeyFileError",
    "ReleaseNotFound",
    "ReleasesError",
    "RepositoryCorrupt",
    "RepositoryExists",
    "ServerError",
    "ThresholdNotMet",
    "VerificationFailed",
]


class ReleasesError(ValueError):
    """Base of every error that `prunecast.server.repository` raises."""


class KeyFileError(ReleasesError):
    """A private key is missing, unreadable, too widely readable, or not the one in force."""


class RepositoryExists(ReleasesError):
    """A repository or a key would be overwritten."""


class RepositoryCorrupt(ReleasesError):
    """Files of the repository are missing, damaged, or not signed by the keys in force."""


class ReleaseNotFound(ReleasesError):
    """No live release of that name and version."""


class VerificationFailed(ReleasesError):
    """A release does not hold what its signed metadata says."""


class ServerError(ReleasesError):
    """The distribution server cannot start."""


class CeremonyError(ReleasesError):
    """A ceremony's files contradict each other, or what was asked for cannot be."""


class ThresholdNotMet(ReleasesError):
    """Fewer holders have signed than a role requires."""
