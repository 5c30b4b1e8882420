"""The compression schemes of the literature as named compressors on one interface.

Each is a choice for updates, gradients or weights, and a peer to measure against. A payload
carries the scheme's own bits in its paper's own coding, or with ``coding="prunecast"`` the same
integers coded by `prunecast.compression.codec`. See ``docs/schemes.md``.

The errors are here. What may be wrong with a payload's bytes, or with a value, is named as the
codec names it; everything is a `CodecError`.
"""

from prunecast.compression.codec import CodecError

__all__ = [
    "BadConfig",
    "LayoutMismatch",
    "OutOfRange",
    "SchemeError",
    "StateError",
    "UnknownScheme",
    "UnsupportedTensor",
    "WrongScheme",
]


class SchemeError(CodecError):
    """Base of the errors that only a scheme raises."""


class UnknownScheme(SchemeError):
    """No scheme has this name."""


class BadConfig(SchemeError):
    """A scheme has no such option, or the option's value is out of range."""


class LayoutMismatch(SchemeError):
    """The tensors are not those that the state was made for, or payloads disagree on theirs."""


class UnsupportedTensor(SchemeError):
    """A tensor is not of floating point, or its name or shape cannot be written."""


class OutOfRange(SchemeError):
    """A value does not fit the scheme's number format."""


class StateError(SchemeError):
    """Stored state is damaged, or belongs to another scheme or layout."""


class WrongScheme(SchemeError):
    """The payload was made by another scheme than the one that reads it."""
