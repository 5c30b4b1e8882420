"""Errors of the version layer: one base, one class per cause."""

__all__ = [
    "BadPayload",
    "BaseMissing",
    "DigestMismatch",
    "InvalidModel",
    "TooLarge",
    "VersionsError",
    "WrongStream",
]


class VersionsError(ValueError):
    """Base of every error that `prunecast.compression.versions` raises, but for files'."""


class InvalidModel(VersionsError):
    """A published model cannot be built or coded from these tensors."""


class BadPayload(VersionsError):
    """The bytes are not a payload of this format, or they are damaged."""


class TooLarge(BadPayload):
    """The payload states more than its receiver accepts; nothing of it was allocated."""


class WrongStream(VersionsError):
    """The payload belongs to another run, record or release."""


class BaseMissing(VersionsError):
    """The payload refers to a version that is not held; a keyframe is needed."""


class DigestMismatch(VersionsError):
    """The rebuilt model is not the one the payload announces."""
