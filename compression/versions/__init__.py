"""The published model and its payloads: keyframe, delta, update, plain record.

A *published model* is what server, clients and edge devices hold identically, bit for bit:
integers on a lattice, one step per tensor, and the mask. Everything here is pure: numpy and the
standard library, no sockets, no Flower. The byte formats are written down in ``docs/format.md``.
"""

from prunecast.compression.versions.bodies import MAX_MODEL_BYTES, model_limits
from prunecast.compression.versions.capabilities import Capabilities
from prunecast.compression.versions.control import (
    INSTRUCTION_FORMAT,
    TAG_BYTES,
    Instruction,
    NodeReport,
    SchemeRule,
    UpdateRule,
    is_large,
)
from prunecast.compression.versions.descriptions import describe, read_description
from prunecast.compression.versions.errors import (
    BadPayload,
    BaseMissing,
    DigestMismatch,
    InvalidModel,
    TooLarge,
    VersionsError,
    WrongStream,
)
from prunecast.compression.versions.frame import short, stream_tag
from prunecast.compression.versions.layout import Coding, ReplyTensor, UpdateHead
from prunecast.compression.versions.model import (
    LatticeTensor,
    PublishedModel,
    RawTensor,
    Tensor,
    refine,
)
from prunecast.compression.versions.payloads import (
    Kind,
    PayloadInfo,
    decode_model,
    encode_delta,
    encode_keyframe,
    encode_plain,
    inspect,
    measure_payload,
    open_plain,
)
from prunecast.compression.versions.received import Change, Update
from prunecast.compression.versions.seeded import Seed, draw_like
from prunecast.compression.versions.statistics import is_statistic, rounded_floats
from prunecast.compression.versions.storage import (
    load_model,
    save_model,
)
from prunecast.compression.versions.updates import (
    NOTHING_SENT,
    QuantisedTensor,
    UpdateReader,
    allowed_beside,
    decode_update,
    encode_update,
    exact_change,
)

__all__ = [
    "INSTRUCTION_FORMAT",
    "MAX_MODEL_BYTES",
    "NOTHING_SENT",
    "TAG_BYTES",
    "BadPayload",
    "BaseMissing",
    "Capabilities",
    "Change",
    "Coding",
    "DigestMismatch",
    "Instruction",
    "InvalidModel",
    "Kind",
    "LatticeTensor",
    "NodeReport",
    "PayloadInfo",
    "PublishedModel",
    "QuantisedTensor",
    "RawTensor",
    "ReplyTensor",
    "SchemeRule",
    "Seed",
    "Tensor",
    "TooLarge",
    "Update",
    "UpdateHead",
    "UpdateReader",
    "UpdateRule",
    "VersionsError",
    "WrongStream",
    "allowed_beside",
    "decode_model",
    "decode_update",
    "describe",
    "draw_like",
    "encode_delta",
    "encode_keyframe",
    "encode_plain",
    "encode_update",
    "exact_change",
    "inspect",
    "is_large",
    "is_statistic",
    "load_model",
    "measure_payload",
    "model_limits",
    "open_plain",
    "read_description",
    "refine",
    "rounded_floats",
    "save_model",
    "short",
    "stream_tag",
]
