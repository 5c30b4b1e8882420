"""What can go wrong with a scheme: one class per cause, all of them a :class:`SchemeError`."""

from __future__ import annotations

__all__ = [
    "BadConfig",
    "ChecksumMismatch",
    "LayoutMismatch",
    "LimitExceeded",
    "MalformedPayload",
    "NonFiniteError",
    "NotAPayload",
    "OutOfRange",
    "SchemeError",
    "StateError",
    "TruncatedPayload",
    "UnknownScheme",
    "UnsupportedTensor",
    "UnsupportedVersion",
    "WrongScheme",
]


class SchemeError(ValueError):
    """Base of every error that this package raises on purpose."""


class UnknownScheme(SchemeError):
    """No scheme has this name."""


class BadConfig(SchemeError):
    """A scheme has no such option, or the option's value is out of range."""


class LayoutMismatch(SchemeError):
    """The tensors are not those that the state was made for, or payloads disagree on theirs."""


class UnsupportedTensor(SchemeError):
    """A tensor is not of floating point, or its name or shape cannot be written."""


class NonFiniteError(SchemeError):
    """A tensor holds NaN or an infinity."""


class OutOfRange(SchemeError):
    """A value does not fit the scheme's number format."""


class StateError(SchemeError):
    """Stored state is damaged, or belongs to another scheme or layout."""


class NotAPayload(SchemeError):
    """The bytes do not start with this package's magic."""


class UnsupportedVersion(SchemeError):
    """The payload's major version, scheme, coding or a flag is not known to this release."""


class TruncatedPayload(SchemeError):
    """The number of bytes is not the total length that the payload states."""


class ChecksumMismatch(SchemeError):
    """The payload's bytes were changed on the way."""


class LimitExceeded(SchemeError):
    """The payload states a quantity above the receiver's limits."""


class MalformedPayload(SchemeError):
    """The payload contradicts the format although its checksum holds."""


class WrongScheme(SchemeError):
    """The payload was made by another scheme than the one that reads it."""
