"""Schemes by name, and payloads of whichever scheme.

>>> stc = scheme("stc", density=0.5)
>>> state = stc.init({"w": (4,)})
>>> payload, state = stc.encode({"w": np.float32([1, -3, 0, 0])}, state, key=0)
>>> decode_payload(payload)["w"].tolist()
[2.0, -2.0, 0.0, 0.0]
"""

from __future__ import annotations

from prunecast.compression.codec import Limits

from . import UnknownScheme
from .container import Envelope, unseal
from .dense import Fp16, Int4, Int8, SignSgd
from .interface import Option, Scheme
from .layout import Arrays
from .qsgd import Qsgd
from .sparse import Stc, TopK

__all__ = ["SCHEMES", "decode_payload", "inspect", "scheme"]

SCHEMES: dict[str, type[Scheme]] = {
    kind.name: kind for kind in (TopK, Stc, Qsgd, SignSgd, Int8, Int4, Fp16)
}


def scheme(name: str, /, **config: Option) -> Scheme:
    """The scheme of this name with these options.

    Raises:
        UnknownScheme: there is none.
        BadConfig: an option does not exist, or is out of range.

    >>> scheme("stc", density=0.02).config()["density"]
    0.02
    """
    if name not in SCHEMES:
        raise UnknownScheme(f"there is no scheme {name!r}; choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name].from_config(config)


def inspect(payload: bytes, *, limits: Limits | None = None) -> Envelope:
    """What the container of a payload states; the tensors are not decoded.

    Raises:
        CodecError: a subclass for each way in which the bytes may be wrong.
    """
    return unseal(bytes(payload), limits or Limits())


def decode_payload(payload: bytes, *, limits: Limits | None = None) -> Arrays:
    """The tensors of a payload of any scheme.

    Raises:
        CodecError: a subclass for each way in which the bytes may be wrong.
    """
    limits = limits or Limits()
    envelope = unseal(bytes(payload), limits)
    return SCHEMES[envelope.scheme].open(envelope, limits)
