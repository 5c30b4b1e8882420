"""The compression schemes of the literature as named compressors on one interface.

Each is a choice for updates, gradients or weights, and a peer to measure against. A payload
carries the scheme's own bits in its paper's own coding, or with ``coding="prunecast"`` the same
integers coded by `prunecast.compression.codec`. See ``docs/schemes.md``.

>>> stc = scheme("stc", density=0.5)
>>> state = stc.init({"w": (4,)})
>>> payload, state = stc.encode({"w": np.float32([1, -3, 0, 0])}, state, key=0)
>>> decode_payload(payload)["w"].tolist()
[2.0, -2.0, 0.0, 0.0]
"""

from .dense import Fp16, Int4, Int8
from .errors import (
    BadConfig,
    ChecksumMismatch,
    LayoutMismatch,
    LimitExceeded,
    MalformedPayload,
    NonFiniteError,
    NotAPayload,
    OutOfRange,
    SchemeError,
    StateError,
    TruncatedPayload,
    UnknownScheme,
    UnsupportedTensor,
    UnsupportedVersion,
    WrongScheme,
)
from .interface import Option, Scheme
from .layout import Layout, State, layout_of, pack_state, state_arrays, state_from, unpack_state
from .qsgd import Qsgd
from .registry import SCHEMES, PayloadInfo, decode_payload, inspect, scheme
from .signsgd import SignSgd, majority_vote
from .stc import Stc
from .topk import TopK

__all__ = [
    "SCHEMES",
    "BadConfig",
    "ChecksumMismatch",
    "Fp16",
    "Int4",
    "Int8",
    "Layout",
    "LayoutMismatch",
    "LimitExceeded",
    "MalformedPayload",
    "NonFiniteError",
    "NotAPayload",
    "Option",
    "OutOfRange",
    "PayloadInfo",
    "Qsgd",
    "Scheme",
    "SchemeError",
    "SignSgd",
    "State",
    "StateError",
    "Stc",
    "TopK",
    "TruncatedPayload",
    "UnknownScheme",
    "UnsupportedTensor",
    "UnsupportedVersion",
    "WrongScheme",
    "decode_payload",
    "inspect",
    "layout_of",
    "majority_vote",
    "pack_state",
    "scheme",
    "state_arrays",
    "state_from",
    "unpack_state",
]
