"""A version against one the receiver holds.

What changes is coded under the codec's context of the held integers. Where most of these are zero,
a tensor is coded *under the mask*: the places that were kept, and apart from them a list of the
places that come back. Neither side then touches the pruned places one by one, which are most.
Strings of bytes, whose lengths change, are edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import Context, Limits, Payload, TensorSpec, encode
from prunecast.compression.versions import frame
from prunecast.compression.versions.bodies import Q, check_size, coded_spec, open_body, read_body
from prunecast.compression.versions.byte_strings import COPIES, ByteEdits, apply_edits, find_edits
from prunecast.compression.versions.differences import difference, restore
from prunecast.compression.versions.errors import BadPayload, BaseMissing, InvalidModel
from prunecast.compression.versions.frame import Kind, short
from prunecast.compression.versions.layout import (
    TensorHead,
    head_of,
    is_bytes,
    pack_changes,
    same_kind,
    unpack_changes,
)
from prunecast.compression.versions.model import (
    LatticeTensor,
    PublishedModel,
    RawTensor,
    Tensor,
    narrowest,
    refine,
)

__all__ = ["OpenDelta", "encode_delta", "open_delta", "owner_of", "read_delta"]

_ZEROS = 0.75  # share from which masks pay: they cost a byte or so a place, and eight a kept one
_BACK = 1 / 16  # share of the places that may come back, beyond which a list is long
_LEAST = 4096  # lattice integers of a model, below which a mask's own bytes are not saved again
_PLACES, _VALUES = "\0places", "\0values"
_FEW = 1 / 8  # of the bytes of a string that change in place, where that is no edit
_Integers = NDArray[np.signedinteger]


def encode_delta(held: PublishedModel, model: PublishedModel, *, stream: bytes = b"") -> bytes:
    """Code a version against one the receiver holds, however many versions lie between.

    Raises:
        InvalidModel: the names of the tensors or their order differ; send a keyframe.
    """
    old = {name: head_of(tensor) for name, tensor in held.tensors.items()}
    new = {name: head_of(tensor) for name, tensor in model.tensors.items()}
    if list(old) != list(new):
        raise InvalidModel("the two versions do not have the same tensors: send a keyframe")
    known = _predictions(held, new)
    # the lists of places have names of their own in the codec's payload
    free = not any("\0" in name for name in new)
    sparse = free and _mostly_zero(known, new)
    edits = _edits(held, model) if free else {}
    for name in edits:
        known.pop(name, None)
    values: dict[str, NDArray[Any]] = {}
    masks: dict[str, NDArray[np.bool_]] = {}
    back: dict[str, int] = {}
    for name, tensor in model.tensors.items():
        held_values = known.get(name)
        if name in edits:
            values[name] = edits[name].literals
            values[name + COPIES] = edits[name].copies
            continue
        if not isinstance(tensor, LatticeTensor):
            values[name] = difference(tensor.values, held_values)
            continue
        values[name] = difference(tensor.q, held_values, Q)
        if not sparse or held_values is None:
            continue
        mask = np.asarray(held_values != 0)
        places = np.flatnonzero((tensor.q != 0) & ~mask)
        if mask.all() or len(places) > _BACK * mask.size:
            continue
        masks[name], back[name] = mask, len(places)
        if len(places):
            found = values[name].reshape(-1)
            values[name + _PLACES] = (np.diff(places, prepend=-1) - 1).astype(Q)
            values[name + _VALUES] = found[places]
            found[places] = 0
    counts = {name: (edit.literals.size, len(edit.copies)) for name, edit in edits.items()}
    layout = pack_changes(
        list(new.values()),
        list(old.values()),
        [back.get(name) for name in new],
        [counts.get(name) for name in new],
    )
    body = encode(values, context=_context(new, known, masks, back, counts))
    return frame.pack(
        Kind.DELTA,
        stream,
        model.counter,
        model.digest,
        base=held.digest,
        layout=layout,
        body=body,
    )


@dataclass(frozen=True)
class OpenDelta:
    """What a delta says of its tensors and what is known of them, before any is decoded.

    Attributes:
        heads: of the new version's tensors.
        known: what the held version says of their values, where it says something.
        masks: places that are coded, of the tensors that are coded under their mask.
        back: of these, how many places come back.
        edits: of strings of bytes that are edited, how many literals and copies.
        context: of the codec's payload.
    """

    heads: dict[str, TensorHead]
    known: dict[str, NDArray[Any]]
    masks: dict[str, NDArray[np.bool_]]
    back: dict[str, int]
    edits: dict[str, tuple[int, int]]
    context: Context


def open_delta(parsed: frame.Frame, held: PublishedModel | None, limits: Limits) -> OpenDelta:
    """Read a delta's layout.

    Raises:
        BadPayload: damaged, or it does not fit what is held.
        BaseMissing: `held` is not the version it builds on.
    """
    if held is None or short(held.digest) != parsed.base:
        have = f"version {held.counter}" if held is not None else "none"
        raise BaseMissing(
            f"delta to version {parsed.counter} needs a version that is not held (held: {have}): "
            "ask for a keyframe"
        )
    old = {name: head_of(tensor) for name, tensor in held.tensors.items()}
    changes = unpack_changes(parsed.layout, old)
    heads, back, edits = changes.heads, changes.back, changes.edits
    replaced = {n: h for n, h in heads.items() if n in edits or not same_kind(h, old[n])}
    check_size(replaced, parsed.size, limits)
    known = {n: array for n, array in _predictions(held, heads).items() if n not in edits}
    if (back or edits) and any("\0" in name for name in heads):
        raise BadPayload("lists of places have the names of tensors")
    masks: dict[str, NDArray[np.bool_]] = {}
    for name, count in back.items():
        if name not in known:
            raise BadPayload(f"tensor {name[:80]!r}: a mask of nothing that is known")
        masks[name] = np.asarray(known[name] != 0)
        if count > masks[name].size:
            raise BadPayload(f"tensor {name[:80]!r}: more places come back than there are")
    context = _context(heads, known, masks, back, edits)
    return OpenDelta(heads, known, masks, back, edits, context)


def read_delta(
    parsed: frame.Frame, held: PublishedModel | None, limits: Limits
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a delta's version, each decoded when it is asked for.

    Raises:
        BadPayload: damaged, or it does not fit what is held.
        BaseMissing: `held` is not the version it builds on.
    """
    delta = open_delta(parsed, held, limits)
    body = open_body(parsed.body, delta.context, limits)
    for name, head in delta.heads.items():
        if name in delta.edits:
            assert held is not None
            before = np.asarray(held[name].dense(), np.uint8)
            edit = ByteEdits(read_body(body, name), read_body(body, name + COPIES))
            yield name, RawTensor(apply_edits(before, edit, head.spec.size))
            continue
        array = restore(read_body(body, name), delta.known.get(name))
        if head.step is None:
            yield name, RawTensor(array)
            continue
        if delta.back.get(name):
            _bring_back(body, name, array, delta.masks[name])
        yield name, LatticeTensor(array, head.step, head.pruned, head.spec.dtype)


def owner_of(name: str, heads: Mapping[str, TensorHead]) -> str:
    """The tensor that an entry of a delta's codec payload belongs to, such as a list of places."""
    if name in heads:
        return name
    return name.removesuffix(_PLACES).removesuffix(_VALUES).removesuffix(COPIES)


def _bring_back(body: Payload, name: str, array: NDArray[Any], mask: NDArray[np.bool_]) -> None:
    gaps, values = read_body(body, name + _PLACES), read_body(body, name + _VALUES)
    places = np.cumsum(gaps.astype(np.int64) + 1) - 1
    fits = int(gaps.min()) >= 0 and int(places[-1]) < array.size
    if not fits or mask.reshape(-1)[places].any() or not values.all():
        raise BadPayload(f"tensor {name[:80]!r}: places come back that cannot")
    array.reshape(-1)[places] = values


def _predictions(held: PublishedModel, heads: Mapping[str, TensorHead]) -> dict[str, NDArray[Any]]:
    """What the held tensors say about the new ones: integers on their lattice, or raw values.

    Nothing where the two are not of one kind: averaging, for one, turns integers into floats.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, head in heads.items():
        tensor = held.tensors[name]
        if not same_kind(head, head_of(tensor)):
            continue
        if isinstance(tensor, RawTensor):
            if tensor.dtype.kind != "b":
                found[name] = tensor.values
            continue
        assert head.step is not None
        if head.step == tensor.step:
            found[name] = tensor.q
        elif (refined := refine(tensor.q, tensor.step, head.step)) is not None:
            found[name] = narrowest(refined)
    return found


def _edits(held: PublishedModel, model: PublishedModel) -> dict[str, ByteEdits]:
    """Strings of bytes whose length changed, or much of what is at its places."""
    found: dict[str, ByteEdits] = {}
    for name, tensor in model.tensors.items():
        before = held.tensors[name]
        if not (is_bytes(head_of(tensor)) and is_bytes(head_of(before))):
            continue
        old, new = (np.asarray(t.dense(), np.uint8) for t in (before, tensor))
        if old.shape == new.shape and np.count_nonzero(old != new) <= _FEW * new.size:
            continue
        edits = find_edits(old, new)
        if edits is not None:
            found[name] = edits
    return found


def _mostly_zero(known: Mapping[str, NDArray[Any]], heads: Mapping[str, TensorHead]) -> bool:
    lattice = [array for name, array in known.items() if heads[name].step is not None]
    size = sum(array.size for array in lattice)
    kept = sum(int(np.count_nonzero(array)) for array in lattice)
    return size >= _LEAST and kept <= (1 - _ZEROS) * size


def _context(
    heads: Mapping[str, TensorHead],
    known: Mapping[str, NDArray[Any]],
    masks: Mapping[str, NDArray[np.bool_]],
    back: Mapping[str, int],
    edits: Mapping[str, tuple[int, int]],
) -> Context:
    layout: dict[str, TensorSpec] = {}
    for name, head in heads.items():
        if name in edits:
            literals, copies = edits[name]
            layout[name] = TensorSpec(np.dtype(np.uint8), (literals,))
            layout[name + COPIES] = TensorSpec(Q, (copies, 3))
            continue
        layout[name] = coded_spec(head)
        if back.get(name):
            layout[name + _PLACES] = layout[name + _VALUES] = TensorSpec(Q, (back[name],))
    return Context(layout=layout, mask=masks or None, previous=known or None)
