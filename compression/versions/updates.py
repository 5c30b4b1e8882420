"""Updates: a record of a reply, coded tensor by tensor against the version it answers.

A float tensor that both have is a *change* of the version's, or *values* of its own where these
are smaller (a gradient, a difference, a control variate). Others are values, or exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import (
    CodecError,
    Context,
    Limits,
    TensorSpec,
    encode,
    open_payload,
)
from prunecast.compression.versions import frame
from prunecast.compression.versions.bodies import model_limits
from prunecast.compression.versions.byte_strings import COPIES, find_edits
from prunecast.compression.versions.differences import cast, difference
from prunecast.compression.versions.errors import BadPayload, BaseMissing, InvalidModel
from prunecast.compression.versions.frame import Kind, short
from prunecast.compression.versions.layout import (
    Coding,
    Edited,
    ReplyTensor,
    UpdateHead,
    is_byte_vector,
    pack_update_heads,
    unpack_update_heads,
)
from prunecast.compression.versions.model import LatticeTensor, PublishedModel, Tensor
from prunecast.compression.versions.received import Update, predicted

__all__ = [
    "NOTHING_SENT",
    "QuantisedTensor",
    "UpdateReader",
    "allowed_beside",
    "decode_update",
    "encode_update",
    "exact_change",
]

NOTHING_SENT = PublishedModel({})
"""What a record is an update of that answers none of the versions sent."""
_Q = np.dtype(np.int32)
_CONTEXTS = 16  # of one version that are kept: one for each choice of tensors that changed
_FREE = 1 << 20  # bytes of tensors that nothing sent resembles, whatever was sent
_EXPANSION = 256  # bytes of such tensors for each byte of payload


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """A float tensor in integers: a change of ``z * step``, or values ``z * step``.

    Attributes:
        z: int32, shape of the tensor; of a change zero where the version's mask is False.
        step: quantisation step, a positive finite float32 value.
        values: whether the tensor is these values, and not the version's changed by them.
    """

    z: NDArray[np.int32]
    step: float
    values: bool = False


def allowed_beside(sent: int, payload: int) -> int:
    """Most bytes of tensors in one record that no tensor of its version resembles.

    Args:
        sent: bytes of the arrays that the reply answers.
        payload: bytes of the record's payload.
    """
    return _FREE + sent + _EXPANSION * payload


def encode_update(
    base: PublishedModel,
    changes: Mapping[str, QuantisedTensor | NDArray[np.generic]],
    *,
    stream: bytes = b"",
    tensors: Mapping[str, ReplyTensor] | None = None,
) -> bytes:
    """Code a record of a client's reply.

    Args:
        base: the version that it answers; masks come from it.
        changes: for a float tensor its quantised change or values; for any tensor the exact array.
            A tensor that is absent, or whose change is all zero, is unchanged; of one that the
            version does not have, all zero.
        stream: identifier of the run and record.
        tensors: the record's tensors in its order; None for those of the version.

    Raises:
        InvalidModel: a name that the record does not have, or another shape or dtype.
    """
    if tensors is None:
        tensors = {name: ReplyTensor(spec, name) for name, spec in base.specs.items()}
    unknown = [name for name in changes if name not in tensors]
    if unknown:
        raise InvalidModel(f"update of {unknown[0]!r}, which version {base.counter} does not have")
    heads: dict[str, UpdateHead] = {}
    values: dict[str, NDArray[np.generic]] = {}
    for name, tensor in tensors.items():
        change = changes.get(name)
        coding, step = _coding(name, tensor, change, base)
        heads[name] = UpdateHead(coding, step, tensor)
        if isinstance(change, QuantisedTensor):
            if step:
                values[name] = np.asarray(change.z, dtype=_Q)
        elif change is not None:
            held = None if tensor.like is None else base[tensor.like].dense()
            values[name] = difference(change, predicted(held, change.dtype))
    alone = _packed(base, heads, values, stream)
    edited = _edited(base, heads, values)
    # an archiver's coding of the whole may be smaller than what is left of it
    return min(alone, _packed(base, *edited, stream), key=len) if edited else alone


def _packed(
    base: PublishedModel,
    heads: Mapping[str, UpdateHead],
    values: Mapping[str, NDArray[np.generic]],
    stream: bytes,
) -> bytes:
    context = replace(UpdateReader(base).context(heads), derived=None)
    body = encode(values, context=context)
    layout = pack_update_heads(heads, base.specs)
    return frame.pack(
        Kind.UPDATE, stream, base.counter, base.digest, base=base.digest, layout=layout, body=body
    )


def _edited(
    base: PublishedModel,
    heads: Mapping[str, UpdateHead],
    values: Mapping[str, NDArray[np.generic]],
) -> tuple[dict[str, UpdateHead], dict[str, NDArray[np.generic]]] | None:
    """Vectors of bytes as edits of one that the version has; None where there are none."""
    vectors = [name for name, spec in base.specs.items() if is_byte_vector(spec)]
    if not vectors or any("\0" in name for name in heads):
        return None
    found: dict[str, UpdateHead] = {}
    made: dict[str, NDArray[np.generic]] = {}
    for name, head in heads.items():
        found[name] = head
        if name in values:
            made[name] = values[name]
        spec = head.tensor.spec
        own = head.coding is Coding.EXACT and head.tensor.like is None
        if not own or spec is None or not is_byte_vector(spec):
            continue
        of = name if name in vectors else vectors[0]
        held, new = (np.asarray(a, np.uint8) for a in (base[of].dense(), values[name]))
        if (edits := find_edits(held, new)) is None:
            continue
        edited = Edited(of, edits.literals.size, len(edits.copies))
        found[name] = UpdateHead(Coding.EDITED, 0.0, head.tensor, edited)
        made[name], made[name + COPIES] = edits.literals, edits.copies
    return (found, made) if found != heads else None


def exact_change(array: NDArray[Any], tensor: Tensor) -> NDArray[Any] | None:
    """What `encode_update` is to be given so that an array arrives exactly.

    None where it is the version's, in whichever dtype.
    """
    if isinstance(tensor, LatticeTensor) and array.dtype.kind != "f":
        return array
    return None if array.tobytes() == cast(tensor.dense(), array.dtype).tobytes() else array


def _coding(
    name: str,
    tensor: ReplyTensor,
    change: QuantisedTensor | NDArray[np.generic] | None,
    base: PublishedModel,
) -> tuple[Coding, float]:
    """How a tensor is coded, and its step; 0.0 for none."""
    if tensor.spec is None:
        if change is not None:
            raise InvalidModel(f"{name!r} travels beside the payload, not in it")
        return Coding.VERBATIM, 0.0
    if change is None:
        return (Coding.ZERO if tensor.like is None else Coding.UNCHANGED), 0.0
    quantised = isinstance(change, QuantisedTensor)
    array = change.z if isinstance(change, QuantisedTensor) else change
    if array.shape != tensor.spec.shape:
        raise InvalidModel(f"update of {name!r} has shape {array.shape}, not {tensor.spec.shape}")
    if not quantised:
        if array.dtype != tensor.spec.dtype:
            raise InvalidModel(f"update of {name!r} is {array.dtype}, not {tensor.spec.dtype}")
        return Coding.EXACT, 0.0
    assert isinstance(change, QuantisedTensor)
    if tensor.spec.dtype.kind != "f":
        raise InvalidModel(f"{name!r} is {tensor.spec.dtype}; its update cannot be quantised")
    if change.values:
        return (Coding.VALUES, change.step) if array.any() else (Coding.ZERO, 0.0)
    if tensor.like is None or not isinstance(base[tensor.like], LatticeTensor):
        raise InvalidModel(f"{name!r} travels losslessly; its update cannot be quantised")
    return (Coding.QUANTISED, change.step) if array.any() else (Coding.UNCHANGED, 0.0)


class UpdateReader:
    """Opens updates that were trained from one version, and keeps what they have in common.

    That is what the version alone decides, such as which weights a mask keeps; it is computed at
    the first update that needs it.

    Args:
        base: the version.
        stream: identifier of the run and record.
        limits: bounds on what an update may make this side allocate; None for those that follow
            from the version and the bytes that come.
        sent: bytes of the arrays that replies answer, for `allowed_beside`; None for the version's.
    """

    def __init__(
        self,
        base: PublishedModel,
        *,
        stream: bytes = b"",
        limits: Limits | None = None,
        sent: int | None = None,
    ) -> None:
        self.base, self._stream, self._limits = base, stream, limits
        self._specs = base.specs
        self.sent = sum(s.nbytes for s in self._specs.values()) if sent is None else sent
        self._contexts: dict[tuple[object, ...], Context] = {}
        self._zeros: dict[TensorSpec, NDArray[Any]] = {}
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
        heads, limits = self._opened(parsed)
        context = self.context(heads)
        try:
            body = open_payload(parsed.body, context=context, limits=limits)
        except CodecError as error:
            raise BadPayload(f"update cannot be decoded: {error}") from error
        return Update(self, heads, body, parsed.size)

    def context_of(self, parsed: frame.Frame) -> Context:
        """What both sides know of an update that lies in such a frame.

        Raises:
            BadPayload, BaseMissing: as `read`.
        """
        return self.context(self._opened(parsed)[0])

    def _opened(self, parsed: frame.Frame) -> tuple[dict[str, UpdateHead], Limits]:
        """The heads of an update, and the limits for decoding it."""
        if parsed.kind is not Kind.UPDATE:
            raise BadPayload(f"expected an update, got a {parsed.kind.name.lower()} payload")
        if parsed.base != short(self.base.digest):
            raise BaseMissing(
                f"update was not trained from version {self.base.counter} of this run"
            )
        heads = unpack_update_heads(parsed.layout, self._specs)
        most = sum(spec.nbytes for spec in self._specs.values())
        most += allowed_beside(self.sent, parsed.size)
        limits = self._limits or model_limits(most, parsed.size)
        self._check(heads, parsed.size, limits)
        return heads, limits

    def _check(self, heads: Mapping[str, UpdateHead], size: int, limits: Limits) -> None:
        """Refuse what the version or the limits do not allow, before anything is allocated."""
        beside = 0
        for name, head in heads.items():
            tensor = head.tensor
            exact = tensor.spec is None or tensor.spec.dtype.kind != "f"
            on_lattice = tensor.like is not None and isinstance(
                self.base[tensor.like], LatticeTensor
            )
            if exact and (head.step or (on_lattice and head.coding is Coding.UNCHANGED)):
                raise BadPayload(f"update quantises {name[:80]!r}, which is not of floating point")
            if head.coding is Coding.QUANTISED and not on_lattice:
                raise BadPayload(f"update quantises {name[:80]!r}, which travels losslessly")
            if tensor.spec is not None and tensor.like is None:
                # also where a dimension of zero hides what no array can have
                elements = math.prod(dimension or 1 for dimension in tensor.spec.shape)
                beside += elements * tensor.spec.dtype.itemsize
        allowed = min(allowed_beside(self.sent, size), limits.decoded_bytes)
        if len(heads) > limits.tensors or beside > allowed:
            raise BadPayload(
                f"update of {size} bytes declares {len(heads)} tensors, {beside} bytes of them "
                f"unlike any that was sent, above the limits ({limits.tensors}, {allowed})"
            )

    def context(self, heads: Mapping[str, UpdateHead]) -> Context:
        """What both sides know of an update with such heads."""
        key = tuple((name, head.coding, head.tensor, head.edited) for name, head in heads.items())
        if key not in self._contexts:
            if len(self._contexts) >= _CONTEXTS:
                self._contexts.clear()
            self._contexts[key] = self._context(heads)
        return self._contexts[key]

    def _context(self, heads: Mapping[str, UpdateHead]) -> Context:
        layout: dict[str, TensorSpec] = {}
        masks: dict[str, NDArray[np.bool_]] = {}
        previous: dict[str, NDArray[Any]] = {}
        for name, head in heads.items():
            spec, like = head.tensor.spec, head.tensor.like
            if spec is None:
                continue
            if head.coding is Coding.QUANTISED and like is not None:
                tensor = self.base[like]
                layout[name] = TensorSpec(_Q, spec.shape)
                # a weight's size and sign say something of its change: 4 to 17 % on real updates
                assert isinstance(tensor, LatticeTensor)
                previous[name] = tensor.q
                mask = self._mask(like, tensor)
                if mask is not None:
                    masks[name] = mask
            elif head.coding is Coding.VALUES:
                layout[name] = TensorSpec(_Q, spec.shape)
            elif head.edited is not None:
                layout[name] = TensorSpec(np.dtype(np.uint8), (head.edited.literals,))
                layout[name + COPIES] = TensorSpec(_Q, (head.edited.copies, 3))
            elif head.coding is Coding.EXACT:
                layout[name] = spec
                held = None if like is None else predicted(self.held(like), spec.dtype)
                if held is not None:
                    previous[name] = held
        # what is derived is kept by name: of the version's tensors alone, whatever nodes send
        known = all(head.tensor.like == name for name, head in heads.items() if name in layout)
        return Context(layout, masks or None, previous or None, self._derived if known else None)

    def zeros(self, spec: TensorSpec) -> NDArray[Any]:
        """A tensor of zeros that takes no memory; the same object every time."""
        if spec not in self._zeros:
            if len(self._zeros) >= _CONTEXTS * len(self._specs) + _CONTEXTS:
                self._zeros.clear()
            self._zeros[spec] = np.broadcast_to(np.zeros((), spec.dtype), spec.shape)
        return self._zeros[spec]

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
