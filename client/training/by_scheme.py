"""What of a reply's record a scheme of the literature codes, and as what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.client.training.encoding import align, is_own, norm_of
from prunecast.client.training.store import ModError
from prunecast.compression.codec import TensorSpec
from prunecast.compression.schemes.interface import Scheme
from prunecast.compression.schemes.layout import State
from prunecast.compression.versions import Coding, ReplyTensor, UpdateHead, is_statistic

__all__ = ["SchemeInput", "encode_clipped", "scheme_input"]

_ROUNDING = 1e-5  # relative: what float32 may add to a norm
_AT_THE_CLIP = 1e-3  # relative, as for updates on a lattice


@dataclass(frozen=True)
class SchemeInput:
    """A record, ready for a scheme.

    Attributes:
        arrays: what the scheme codes: *reply - received*, or the reply's own values where these
            are smaller.
        heads: all of the record's arrays, in its order: unchanged for a change, zero for values,
            verbatim for what the scheme does not code.
        own: names of the values.
        usual: whether names, order and dtypes are those that were received, and all are changes.
    """

    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    heads: dict[str, UpdateHead] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    usual: bool = True


def scheme_input(
    record: Mapping[str, NDArray[Any] | None],
    received: Mapping[str, NDArray[Any] | None],
    *,
    clipped: bool,
) -> SchemeInput:
    """Choose for each array of a record, as `compress_reply` does.

    Args:
        record: by name, in the reply's order; None for what the codec does not know.
        received: likewise what was received.
        clipped: whether a clipping norm is in effect: all are changes then.
    """
    specs = {n: TensorSpec(a.dtype, a.shape) for n, a in received.items() if a is not None}
    found = SchemeInput()
    values: dict[str, NDArray[Any]] = {}
    for name, tensor in align(record, specs).items():
        array, like = record[name], tensor.like
        base = None if like is None else received[like]
        if (
            array is None
            or base is None
            or not (array.dtype.kind == base.dtype.kind == "f")
            or not np.isfinite(base).all()  # a mask of infinities comes back as it is
            or is_statistic(name)  # a variance is never to become negative
        ):
            found.heads[name] = UpdateHead(Coding.VERBATIM, 0.0, ReplyTensor(None))
            continue
        found.heads[name] = UpdateHead(Coding.UNCHANGED, 0.0, tensor)
        values[name], found.arrays[name] = array, array - base
    sizes = {n: (norm_of(found.arrays[n]), norm_of(array)) for n, array in values.items()}
    if not clipped:
        changes, own = (math.hypot(*(s[place] for s in sizes.values())) for place in (0, 1))
        for name, (change, value) in sizes.items():
            if is_own(change, value, whole=own < changes):
                found.heads[name] = UpdateHead(Coding.ZERO, 0.0, found.heads[name].tensor)
                found.arrays[name] = values[name]
    usual = list(record) == list(received) and all(
        head.coding is Coding.UNCHANGED and head.tensor == ReplyTensor(specs[name], name)
        if name in specs and specs[name].dtype.kind == "f" and not is_statistic(name)
        else head.coding is Coding.VERBATIM
        for name, head in found.heads.items()
    )
    names = tuple(n for n, head in found.heads.items() if head.coding is Coding.ZERO)
    return SchemeInput(found.arrays, found.heads, names, usual)


def encode_clipped(
    chosen: Scheme, arrays: Mapping[str, NDArray[Any]], fresh: State, clip: float, key: int
) -> bytes:
    """A payload whose arrays have together at most the norm that was given, without feedback.

    Raises:
        ModError: the scheme sends more than the clipping norm whatever it is given.
    """
    given = norm_of(*arrays.values())
    clips = given <= clip * (1 + _AT_THE_CLIP)  # else nobody clipped, and plain Flower would not
    most = min(given, clip) if clips else math.inf
    payload, _ = chosen.encode(arrays, fresh, key=key)
    for _ in range(2):
        sent = norm_of(*chosen.decode(payload).values())
        if sent <= most:
            return payload
        factor = np.float32(most / sent * (1 - _ROUNDING))
        arrays = {name: array * factor for name, array in arrays.items()}
        payload, _ = chosen.encode(arrays, fresh, key=key)
    if norm_of(*chosen.decode(payload).values()) <= most:
        return payload
    raise ModError(
        f"the update was not sent: scheme {chosen.name!r} sends more than the clipping norm "
        f"{clip:g} allows; choose prunecast.up = 'lattice', or a scheme that scales with its input"
    )
