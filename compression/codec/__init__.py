"""Tensors to bytes and back: numpy only, lossless, safe on hostile bytes.

The wire format is specified in ``docs/format.md``.
"""

from .container.wire import Outline, outline_payload, payload_length
from .context import Context, Limits, TensorSpec
from .costs import PayloadCosts, TensorCost, measure_costs
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
    UnsupportedShape,
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
    "Outline",
    "Payload",
    "PayloadCosts",
    "QuantiseError",
    "RelativeTo",
    "TensorCost",
    "TensorMismatch",
    "TensorSpec",
    "TruncatedPayload",
    "UnsupportedDtype",
    "UnsupportedShape",
    "UnsupportedVersion",
    "decode",
    "dequantise",
    "encode",
    "measure_costs",
    "open_payload",
    "outline_payload",
    "payload_length",
    "quantise",
    "quantise_stochastically",
    "relative_error",
    "spread",
    "step_for_bits",
    "step_for_error",
]
