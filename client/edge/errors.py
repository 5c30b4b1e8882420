"""Errors of the edge agent: one base, one class per cause."""

from collections.abc import Iterator
from contextlib import contextmanager

from prunecast.common.files import StorageError

__all__ = [
    "AgentBusy",
    "AgentTooOld",
    "ContentMissing",
    "ContentRefused",
    "ControlProblem",
    "EdgeError",
    "EndpointError",
    "MemoryShort",
    "NetworkError",
    "NoModel",
    "NoRelease",
    "OrderRefused",
    "RequestRefused",
    "StateDamaged",
    "StateError",
    "TrustError",
    "UrlRefused",
    "VersionNotActive",
    "disk",
]


class EdgeError(RuntimeError):
    """Base of every error that `prunecast.client.edge` raises."""


class TrustError(EdgeError):
    """Signed metadata is forged, expired, rolled back or contradicts itself."""


class NetworkError(EdgeError):
    """The repository cannot be reached, or is too slow; what was downloaded is kept."""


class ContentRefused(EdgeError):
    """A downloaded file is not the one that the signed metadata describes."""


class ContentMissing(NetworkError):
    """The server does not have a file that the signed metadata describes."""


class StateError(EdgeError):
    """The state folder cannot be read or written, or is too small."""


class MemoryShort(StateError):
    """There is too little memory at the moment for what has passed its trial, or for the trial."""


class StateDamaged(StateError):
    """`state.json` cannot be read; what the slots hold may be recovered."""


class AgentBusy(StateError):
    """Another agent works on the same state folder."""


class AgentTooOld(EdgeError):
    """The release needs a newer agent."""


class NoModel(EdgeError):
    """No release is active yet."""


class ControlProblem(EdgeError):
    """The fleet's control server cannot be reached, or refuses this device."""


class OrderRefused(EdgeError):
    """An order names a release that is not live, or goes down without saying so."""


class NoRelease(EdgeError):
    """The repository lists no release of the name that this device follows."""


class UrlRefused(EdgeError, ValueError):
    """The URL of a repository holds what must not be in it, or is none."""


class VersionNotActive(EdgeError):
    """A release was asked for by its number, and another one is active."""


class EndpointError(EdgeError):
    """The endpoint cannot be served at the address that was asked for."""


class RequestRefused(EdgeError):
    """One request cannot be answered.

    Args:
        status: of HTTP.
        message: what is wrong with the request and what would be right.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def disk(doing: str) -> Iterator[None]:
    """What the file system refuses in the block is a StateError that says `doing` what."""
    try:
        yield
    except StorageError as error:
        raise StateError(str(error)) from error
    except OSError as error:
        raise StateError(f"cannot {doing}: {error.strerror or error}") from error
