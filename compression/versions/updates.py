"""Updates: what a client changed, coded against the version it trained from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import (
    CodecError,
    Context,
    Limits,
    Payload,
    TensorSpec,
    dequantise,
    encode,
    open_payload,
)
from prunecast.compression.versions import frame
from prunecast.compression.versions.differences import difference, restore
from prunecast.compression.versions.errors import BadPayload, BaseMissing, InvalidModel
from prunecast.compression.versions.frame import Kind, short
from prunecast.compression.versions.layout import (
    Coding,
    UpdateHead,
    pack_update_heads,
    unpack_update_heads,
)
from prunecast.compression.versions.model import LatticeTensor, PublishedModel

__all__ = ["QuantisedTensor", "Update", "decode_update", "encode_update"]

_Q = np.dtype(np.int32)


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """Change of one lattice tensor: ``z * step``, with `z` zero where the mask is False.

    Attributes:
        z: int32, shape of the tensor.
        step: quantisation step, a positive finite float32 value.
    """

    z: NDArray[np.int32]
    step: float


def encode_update(
    base: PublishedModel,
    changes: Mapping[str, QuantisedTensor | NDArray[np.generic]],
    *,
    stream: bytes = b"",
) -> bytes:
    """Code a client's update.

    Args:
        base: the version that was trained from; names, shapes and masks come from it.
        changes: for a lattice tensor its quantised change; for any tensor the exact new array.
            A tensor that is absent, or whose change is all zero, is unchanged.
        stream: identifier of the run and record.

    Raises:
        InvalidModel: a name that the version does not have, or another shape or dtype.
    """
    unknown = [name for name in changes if name not in base.tensors]
    if unknown:
        raise InvalidModel(f"update of {unknown[0]!r}, which version {base.counter} does not have")
    heads: list[UpdateHead] = []
    values: dict[str, NDArray[np.generic]] = {}
    for name, tensor in base.tensors.items():
        change = changes.get(name)
        if change is None:
            heads.append(UpdateHead(Coding.UNCHANGED, 0.0))
            continue
        array = change.z if isinstance(change, QuantisedTensor) else change
        if array.shape != tensor.shape:
            raise InvalidModel(f"update of {name!r} has shape {array.shape}, not {tensor.shape}")
        if isinstance(change, QuantisedTensor):
            if not isinstance(tensor, LatticeTensor):
                raise InvalidModel(f"{name!r} travels losslessly; its update cannot be quantised")
            if not change.z.any():
                heads.append(UpdateHead(Coding.UNCHANGED, 0.0))
                continue
            heads.append(UpdateHead(Coding.QUANTISED, change.step))
            values[name] = np.asarray(change.z, dtype=_Q)
        else:
            if change.dtype != np.dtype(tensor.dtype):
                raise InvalidModel(f"update of {name!r} is {change.dtype}, not {tensor.dtype}")
            heads.append(UpdateHead(Coding.EXACT, 0.0))
            values[name] = difference(change, _held(base, name))
    context = _context(base, dict(zip(base.tensors, heads, strict=True)))
    body = encode(values, context=context)
    layout = pack_update_heads(heads)
    return frame.pack(
        Kind.UPDATE, stream, base.counter, base.digest, base=base.digest, layout=layout, body=body
    )


def _held(base: PublishedModel, name: str) -> NDArray[np.generic] | None:
    array = base.tensors[name].dense()
    return None if array.dtype.kind == "b" else array


def _context(base: PublishedModel, heads: Mapping[str, UpdateHead]) -> Context:
    layout: dict[str, TensorSpec] = {}
    masks: dict[str, NDArray[np.bool_]] = {}
    previous: dict[str, NDArray[Any]] = {}
    for name, head in heads.items():
        tensor = base.tensors[name]
        if head.coding is Coding.QUANTISED:
            layout[name] = TensorSpec(_Q, tensor.shape)
            # a weight's size and sign say something of its change: 4 to 17 % on real updates
            assert isinstance(tensor, LatticeTensor)
            previous[name] = tensor.q
            mask = tensor.mask()
            if mask is not None:
                masks[name] = mask
        elif head.coding is Coding.EXACT:
            layout[name] = TensorSpec(np.dtype(tensor.dtype), tensor.shape)
            held = _held(base, name)
            if held is not None:
                previous[name] = held
    return Context(layout=layout, mask=masks or None, previous=previous or None)


class Update:
    """A received update; tensors are decoded one at a time, when asked for."""

    def __init__(
        self, base: PublishedModel, heads: Mapping[str, UpdateHead], body: Payload, size: int
    ) -> None:
        self._base, self._heads, self._body = base, heads, body
        self.size = size

    def change(self, name: str) -> NDArray[np.float32] | None:
        """``z * step`` as float32 for a quantised tensor; None when unchanged or exact."""
        head = self._heads[name]
        if head.coding is not Coding.QUANTISED:
            return None
        return np.asarray(dequantise(self._values(name), head.step), dtype=np.float32)

    def apply(self, name: str, master: NDArray[np.generic]) -> NDArray[np.generic]:
        """The array the client means: master plus its change, or its exact new array.

        Args:
            name: tensor name.
            master: full-precision values the version was published from; same shape.

        Raises:
            BadPayload: the tensor's bytes are damaged.
        """
        head = self._heads[name]
        if head.coding is Coding.EXACT:
            return restore(self._values(name), _held(self._base, name))
        change = self.change(name)
        if change is None:
            return master.copy()
        return np.asarray(master + change.astype(master.dtype), dtype=master.dtype)

    def _values(self, name: str) -> NDArray[np.generic]:
        try:
            return self._body[name]
        except CodecError as error:
            raise BadPayload(f"update of {name!r} cannot be decoded: {error}") from error


def decode_update(
    payload: bytes, base: PublishedModel, *, stream: bytes = b"", limits: Limits | None = None
) -> Update:
    """Open an update that was trained from `base`; tensors are decoded lazily.

    Raises:
        BadPayload: no update, or damaged.
        WrongStream: made for another run or record.
        BaseMissing: it was trained from another version.
    """
    parsed = frame.unpack(payload, stream=stream)
    if parsed.kind is not Kind.UPDATE:
        raise BadPayload(f"expected an update, got a {parsed.kind.name.lower()} payload")
    if parsed.base != short(base.digest):
        raise BaseMissing(f"update was not trained from version {base.counter} of this run")
    heads = unpack_update_heads(parsed.layout, list(base.tensors))
    for name, head in heads.items():
        if head.coding is Coding.QUANTISED and not isinstance(base.tensors[name], LatticeTensor):
            raise BadPayload(f"update quantises {name[:80]!r}, which travels losslessly")
    try:
        body = open_payload(parsed.body, context=_context(base, heads), limits=limits or Limits())
    except CodecError as error:
        raise BadPayload(f"update cannot be decoded: {error}") from error
    return Update(base, heads, body, parsed.size)
