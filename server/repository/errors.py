"""Errors of the release repository: one base, one class per cause."""

__all__ = [
    "CeremonyError",
    "FleetUnanswered",
    "KeyFileError",
    "RecipeError",
    "ReleaseInUse",
    "ReleaseNotFound",
    "RepositoryCorrupt",
    "RepositoryError",
    "RepositoryExists",
    "ServerError",
    "ThresholdNotMet",
    "VerificationFailed",
]


class RepositoryError(ValueError):
    """Base of every error that `prunecast.server.repository` raises."""


class RecipeError(RepositoryError):
    """A recipe cannot work.

    Args:
        option: the field that is missing or wrong.
        message: what is wrong with it.
    """

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"{option}: {message}")
        self.option, self.message = option, message


class KeyFileError(RepositoryError):
    """A private key is missing, unreadable, too widely readable, or not the one in force."""


class RepositoryExists(RepositoryError):
    """A repository or a key would be overwritten."""


class RepositoryCorrupt(RepositoryError):
    """Files of the repository are missing, damaged, or not signed by the keys in force."""


class ReleaseNotFound(RepositoryError):
    """No live release of that name and version."""


class ReleaseInUse(RepositoryError):
    """A fleet stands on a release that would be withdrawn."""


class FleetUnanswered(RepositoryError):
    """A fleet that follows the repository cannot be asked what it stands on."""


class VerificationFailed(RepositoryError):
    """A release does not hold what its signed metadata says."""


class ServerError(RepositoryError):
    """The distribution server cannot start."""


class CeremonyError(RepositoryError):
    """A ceremony's files contradict each other, or what was asked for cannot be."""


class ThresholdNotMet(RepositoryError):
    """Fewer holders have signed than a role requires."""
