"""Tensors to bytes and back: numpy only, lossless, safe on hostile bytes.

The wire format is specified in ``docs/format.md``.
"""

from .context import Context, Limits, TensorSpec
from .encoder import encode
from .errors import (
    ChecksumMismatch,
    CodecError,
    ContextMismatch,
    LimitExceeded,
    MalformedPayload,
    MaskViolation,
    NonFiniteError,
    NotAPayload,
    QuantiseError,
    TensorMismatch,
    TruncatedPayload,
    UnsupportedDtype,
    UnsupportedVersion,
)
from .lattice import dequantise, quantise
from .payload import Payload, decode, open_payload

__all__ = [
    "ChecksumMismatch",
    "CodecError",
    "Context",
    "ContextMismatch",
    "LimitExceeded",
    "Limits",
    "MalformedPayload",
    "MaskViolation",
    "NonFiniteError",
    "NotAPayload",
    "Payload",
    "QuantiseError",
    "TensorMismatch",
    "TensorSpec",
    "TruncatedPayload",
    "UnsupportedDtype",
    "UnsupportedVersion",
    "decode",
    "dequantise",
    "encode",
    "open_payload",
    "quantise",
]
