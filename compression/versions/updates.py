"""Updates: what a client changed, coded against the version it trained from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
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
from prunecast.compression.versions.model import LatticeTensor, PublishedModel, narrowest

__all__ = ["Change", "QuantisedTensor", "Update", "UpdateReader", "decode_update", "encode_update"]

_Q = np.dtype(np.int32)
_CONTEXTS = 16  # of one version that are kept: one for each choice of tensors that changed
_FEW = 0.25  # of an exact tensor's elements that changed: fewer are kept without the others


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
            values[name] = difference(change, _held(tensor.dense()))
    context = replace(UpdateReader(base).context([head.coding for head in heads]), derived=None)
    body = encode(values, context=context)
    layout = pack_update_heads(heads)
    return frame.pack(
        Kind.UPDATE, stream, base.counter, base.digest, base=base.digest, layout=layout, body=body
    )


def _held(array: NDArray[np.generic]) -> NDArray[np.generic] | None:
    return None if array.dtype.kind == "b" else array


@cache
def _far_from_infinity(dtype: np.dtype[Any]) -> float:
    """Half of what a float dtype, and float32, in which changes are formed, can hold."""
    return min(float(np.finfo(kind).max) for kind in (dtype, np.float32)) / 2


@dataclass(frozen=True, eq=False)
class Change:
    """What an update changes of a lattice tensor: ``values * step`` at some of its weights.

    Attributes:
        values: int8, int16 or int32, one axis.
        step: quantisation step, a positive finite float32 value.
        at: which of the kept weights they belong to, in no particular order; None: all of them.
        kept: flat indices of the weights under the mask, shared by all updates of a version;
            None: all of the tensor's.
    """

    values: NDArray[np.signedinteger]
    step: float
    at: NDArray[np.unsignedinteger] | None
    kept: NDArray[np.int64] | None

    @property
    def where(self) -> NDArray[np.integer] | slice:
        """Flat indices in the tensor."""
        if self.at is None:
            return slice(None) if self.kept is None else self.kept
        return self.at if self.kept is None else self.kept[self.at]

    @property
    def reach(self) -> float:
        """The largest magnitude of a change."""
        if not self.values.size:
            return 0.0
        return max(int(self.values.max()), -int(self.values.min())) * self.step


class Update:
    """A received update; every tensor is decoded once, when it is asked for, and kept in little.

    Of a quantised tensor remain narrow integers, at those weights alone that change where these
    are few; of an exact one the array, or what differs from the version's.
    """

    def __init__(
        self, reader: UpdateReader, heads: Mapping[str, UpdateHead], body: Payload, size: int
    ) -> None:
        self._reader, self._heads, self.size = reader, heads, size
        self._body: Payload | None = body
        self._changes: dict[str, Change] = {}
        self._exact: dict[str, tuple[NDArray[Any], NDArray[Any] | None]] = {}
        self._left = {n for n, head in heads.items() if head.coding is not Coding.UNCHANGED}

    def change(self, name: str) -> Change | None:
        """The change of a quantised tensor; None when unchanged or exact.

        Raises:
            BadPayload: the tensor's bytes are damaged.
        """
        self._decode(name)
        return self._changes.get(name)

    def is_on_lattice(self, name: str) -> bool:
        """Whether the tensor is quantised and only its change came, if there is one."""
        on_lattice = isinstance(self._reader.base[name], LatticeTensor)
        return on_lattice and self._heads[name].coding is not Coding.EXACT

    def apply(self, name: str, master: NDArray[np.generic]) -> NDArray[np.generic]:
        """The array the client means: master plus its change, or its exact new array.

        Args:
            name: tensor name.
            master: full-precision values the version was published from; same shape.

        Returns:
            An array of its own.

        Raises:
            BadPayload: the tensor's bytes are damaged.
        """
        change = self.change(name)
        if name in self._exact:
            values, at = self._exact[name]
            if at is None:
                return values.copy()
            array = self._reader.held(name).copy()
            array.reshape(-1)[at] = values
            return array
        if change is None:
            return master.copy()
        # a change of zero makes +0.0 of -0.0
        out: NDArray[Any] = np.add(master, master.dtype.type(0), order="C")
        where = change.where
        moved = dequantise(change.values, change.step).astype(master.dtype)
        out.reshape(-1)[where] = master.reshape(-1)[where] + moved
        return out

    def verify(self, master: Mapping[str, NDArray[np.generic]]) -> None:
        """Decode every tensor, and see that none becomes NaN or infinity.

        A dense array is formed only where the largest weight and the largest change together
        come near the end of the range.

        Args:
            master: full-precision values the version was published from; the same ones at every
                update of a reader.

        Raises:
            BadPayload: a tensor's bytes are damaged, or it becomes NaN or infinity.
        """
        for name, array in master.items():
            self._decode(name)
            if array.dtype.kind == "f" and not self._is_finite(name, array):
                raise BadPayload(f"update of {name!r} makes NaN or infinity")

    def _is_finite(self, name: str, master: NDArray[np.generic]) -> bool:
        largest = self._reader.largest(name, master)
        if name in self._exact:
            values, at = self._exact[name]
            return bool(np.isfinite(values).all()) and (at is None or math.isfinite(largest))
        if name in self._changes and not (
            self._changes[name].reach + largest < _far_from_infinity(master.dtype)
        ):
            with np.errstate(over="ignore", invalid="ignore"):
                return bool(np.isfinite(self.apply(name, master)).all())
        return math.isfinite(largest)

    def _decode(self, name: str) -> None:
        if name not in self._left or self._body is None:
            return
        head = self._heads[name]
        try:
            if head.coding is Coding.QUANTISED:
                at, values = self._body.nonzeros(name)
                kept = self._body.positions(name)
                size = math.prod(self._reader.base[name].shape) if kept is None else len(kept)
                self._changes[name] = _packed(at, values, size, head.step, kept)
            else:
                self._exact[name] = self._difference(name, self._body[name])
        except CodecError as error:
            raise BadPayload(f"update of {name!r} cannot be decoded: {error}") from error
        self._left.discard(name)
        if not self._left:
            self._body = None

    def _difference(
        self, name: str, coded: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """An exact array; or, where it is much as the version's, what differs and where."""
        held = self._reader.held(name)
        array = restore(coded, _held(held))
        bits, before = (a.reshape(-1).view(f"u{a.itemsize}") for a in (array, held))
        at = np.flatnonzero(bits != before)
        if len(at) >= _FEW * array.size:
            return array, None
        return array.reshape(-1)[at], at.astype(np.min_scalar_type(array.size))


def _packed(
    at: NDArray[Any],
    values: NDArray[Any],
    size: int,
    step: float,
    kept: NDArray[np.int64] | None,
) -> Change:
    narrow, index = narrowest(values), np.min_scalar_type(size)
    if len(at) * (narrow.itemsize + index.itemsize) < size * narrow.itemsize:
        return Change(narrow, step, at.astype(index), kept)
    whole = np.zeros(size, narrow.dtype)
    whole[at] = narrow
    return Change(whole, step, None, kept)


class UpdateReader:
    """Opens updates that were trained from one version, and keeps what they have in common.

    That is what the version alone decides, such as which weights a mask keeps; it is computed at
    the first update that needs it.

    Args:
        base: the version.
        stream: identifier of the run and record.
        limits: bounds on what an update may make this side allocate.
    """

    def __init__(
        self, base: PublishedModel, *, stream: bytes = b"", limits: Limits | None = None
    ) -> None:
        self.base, self._stream, self._limits = base, stream, limits or Limits()
        self._contexts: dict[tuple[Coding, ...], Context] = {}
        self._derived: dict[str, Any] = {}
        self._masks: dict[str, NDArray[np.bool_]] = {}
        self._held: dict[str, NDArray[np.generic]] = {}
        self._largest: dict[str, float] = {}

    def read(self, payload: bytes) -> Update:
        """Open an update; its tensors are decoded when they are asked for.

        Raises:
            BadPayload: no update, or damaged.
            WrongStream: made for another run or record.
            BaseMissing: it was trained from another version.
        """
        parsed = frame.unpack(payload, stream=self._stream)
        if parsed.kind is not Kind.UPDATE:
            raise BadPayload(f"expected an update, got a {parsed.kind.name.lower()} payload")
        if parsed.base != short(self.base.digest):
            raise BaseMissing(
                f"update was not trained from version {self.base.counter} of this run"
            )
        heads = unpack_update_heads(parsed.layout, list(self.base.tensors))
        for name, head in heads.items():
            if head.coding is Coding.QUANTISED and not isinstance(self.base[name], LatticeTensor):
                raise BadPayload(f"update quantises {name[:80]!r}, which travels losslessly")
        context = self.context([head.coding for head in heads.values()])
        try:
            body = open_payload(parsed.body, context=context, limits=self._limits)
        except CodecError as error:
            raise BadPayload(f"update cannot be decoded: {error}") from error
        return Update(self, heads, body, parsed.size)

    def context(self, codings: Sequence[Coding]) -> Context:
        """What both sides know of an update whose tensors are coded so, in their order."""
        key = tuple(codings)
        if key not in self._contexts:
            if len(self._contexts) >= _CONTEXTS:
                self._contexts.clear()
            self._contexts[key] = self._context(dict(zip(self.base.tensors, codings, strict=True)))
        return self._contexts[key]

    def _context(self, codings: Mapping[str, Coding]) -> Context:
        layout: dict[str, TensorSpec] = {}
        masks: dict[str, NDArray[np.bool_]] = {}
        previous: dict[str, NDArray[Any]] = {}
        for name, coding in codings.items():
            tensor = self.base[name]
            if coding is Coding.QUANTISED:
                layout[name] = TensorSpec(_Q, tensor.shape)
                # a weight's size and sign say something of its change: 4 to 17 % on real updates
                assert isinstance(tensor, LatticeTensor)
                previous[name] = tensor.q
                mask = self._mask(name, tensor)
                if mask is not None:
                    masks[name] = mask
            elif coding is Coding.EXACT:
                layout[name] = TensorSpec(np.dtype(tensor.dtype), tensor.shape)
                held = _held(self.held(name))
                if held is not None:
                    previous[name] = held
        return Context(layout, masks or None, previous or None, self._derived)

    def _mask(self, name: str, tensor: LatticeTensor) -> NDArray[np.bool_] | None:
        if name not in self._masks:
            mask = tensor.mask()
            if mask is None:
                return None
            self._masks[name] = mask
        return self._masks[name]

    def held(self, name: str) -> NDArray[np.generic]:
        """The version's dense array of a tensor; not to be written to."""
        if name not in self._held:
            self._held[name] = self.base[name].dense()
        return self._held[name]

    def largest(self, name: str, master: NDArray[np.generic]) -> float:
        """The largest magnitude among a float tensor's master weights; NaN where one is NaN."""
        if name not in self._largest:
            flat: NDArray[Any] = master.reshape(-1)
            self._largest[name] = float(max(flat.max(), -flat.min())) if flat.size else 0.0
        return self._largest[name]


def decode_update(
    payload: bytes, base: PublishedModel, *, stream: bytes = b"", limits: Limits | None = None
) -> Update:
    """Open one update that was trained from `base`; for several, use one `UpdateReader`.

    Raises:
        BadPayload: no update, or damaged.
        WrongStream: made for another run or record.
        BaseMissing: it was trained from another version.
    """
    return UpdateReader(base, stream=stream, limits=limits).read(payload)
