"""Errors of the control server: one base, a class per cause."""

__all__ = [
    "BadPath",
    "ControlError",
    "FileTooLarge",
    "ForeignName",
    "GoingDown",
    "NoSuchFile",
    "OffsetBehindEnd",
    "Unbindable",
    "WatchReplaced",
    "WrongRelease",
]


class ControlError(RuntimeError):
    """Base of every error that `prunecast.server.control` raises."""


class Unbindable(ControlError):
    """The address cannot be bound, or a TLS file is unusable."""


class ForeignName(ControlError):
    """A device speaks in the name of another one."""


class WrongRelease(ControlError):
    """An agent follows another release than its device's group."""


class WatchReplaced(ControlError):
    """The device watches over another connection now."""


class GoingDown(ControlError):
    """The server ends."""


class BadPath(ControlError):
    """A path that no file of a release repository has."""


class NoSuchFile(ControlError):
    """The repository has no such file."""


class OffsetBehindEnd(ControlError):
    """A transfer should go on behind the end of the file."""


class FileTooLarge(ControlError):
    """The file is larger than the control server hands out."""
