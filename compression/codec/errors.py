"""What can go wrong in the codec: one class per cause, all of them a :class:`CodecError`."""

from __future__ import annotations

__all__ = [
    "ChecksumMismatch",
    "CodecError",
    "ContextMismatch",
    "LimitExceeded",
    "MalformedPayload",
    "MaskViolation",
    "NonFiniteError",
    "NotAPayload",
    "QuantiseError",
    "TensorMismatch",
    "TruncatedPayload",
    "UnsupportedDtype",
    "UnsupportedShape",
    "UnsupportedVersion",
]


class CodecError(Exception):
    """Base of every error that this package raises on purpose."""


class NotAPayload(CodecError):
    """The bytes do not start with the codec's magic."""


class UnsupportedVersion(CodecError):
    """The payload's major version or one of its flags is not known to this release."""


class TruncatedPayload(CodecError):
    """The number of bytes is not the total length that the payload states."""


class ChecksumMismatch(CodecError):
    """The payload's bytes were changed on the way."""


class ContextMismatch(CodecError):
    """The payload was coded with another context (layout, mask or previous) than the one given."""


class LimitExceeded(CodecError):
    """The payload states a quantity above the receiver's :class:`~..context.Limits`."""


class MalformedPayload(CodecError):
    """The payload contradicts the format although its checksum holds."""


class TensorMismatch(CodecError):
    """A tensor's name, dtype or shape contradicts the context."""


class MaskViolation(CodecError):
    """A tensor is non-zero where the context's mask says it is zero."""


class UnsupportedDtype(CodecError):
    """A tensor's dtype has no coding (object, complex, string, ...)."""


class UnsupportedShape(CodecError):
    """A tensor has more dimensions than a payload can state."""


class QuantiseError(CodecError):
    """A quantisation step or dead zone is out of range, or a result does not fit in int32."""


class NonFiniteError(QuantiseError):
    """A value to be quantised is NaN or infinite."""
