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
from .generator import CounterStream
from .payload import Payload, decode, open_payload
from .quantisation import (
    RelativeTo,
    dequantise,
    quantise,
    quantise_stochastically,
    relative_error,
    spread,
    step_for_bits,
    step_for_error,
)

__all__ = [
    "ChecksumMismatch",
    "CodecError",
    "Context",
    "ContextMismatch",
    "CounterStream",
    "LimitExceeded",
    "Limits",
    "MalformedPayload",
    "MaskViolation",
    "NonFiniteError",
    "NotAPayload",
    "Payload",
    "QuantiseError",
    "RelativeTo",
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
    "quantise_stochastically",
    "relative_error",
    "spread",
    "step_for_bits",
    "step_for_error",
]
