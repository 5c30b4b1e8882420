"""A received update: what it says of each tensor, decoded once and kept in little."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import CodecError, Payload, dequantise
from prunecast.compression.versions.byte_strings import COPIES, ByteEdits, apply_edits
from prunecast.compression.versions.differences import cast, restore
from prunecast.compression.versions.errors import BadPayload
from prunecast.compression.versions.layout import Coding, Edited, UpdateHead
from prunecast.compression.versions.model import LatticeTensor, narrowest

if TYPE_CHECKING:
    from prunecast.compression.versions.updates import UpdateReader

__all__ = ["Change", "Update", "predicted"]

_FEW = 0.25  # of an exact tensor's elements that changed: fewer are kept without the others
_OWN = (Coding.VALUES, Coding.ZERO)  # what does not build on the version


def predicted(held: NDArray[np.generic] | None, dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """What an exact array is coded against; None for nothing."""
    if held is None or "b" in (held.dtype.kind, dtype.kind):
        return None
    return cast(held, dtype)


@cache
def _far_from_infinity(dtype: np.dtype[Any]) -> float:
    """Half of what a float dtype, and float32, in which changes are formed, can hold."""
    return min(float(np.finfo(kind).max) for kind in (dtype, np.float32)) / 2


@dataclass(frozen=True, eq=False)
class Change:
    """What is quantised of a tensor: ``values * step`` at some of its weights, else zero.

    Of a change that is what it changes, of values what they are.

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

    Attributes:
        tensors: what the record's tensors are, in its order.
        size: bytes of the payload.
    """

    def __init__(
        self, reader: UpdateReader, heads: Mapping[str, UpdateHead], body: Payload, size: int
    ) -> None:
        self._reader, self._heads, self.size = reader, heads, size
        self.tensors = {name: head.tensor for name, head in heads.items()}
        self._body: Payload | None = body
        self._changes: dict[str, Change] = {}
        self._exact: dict[str, tuple[NDArray[Any], NDArray[Any] | None]] = {}
        self._left = heads.keys() & body.specs.keys()

    def change(self, name: str) -> Change | None:
        """What is quantised of a tensor; None when nothing is.

        Raises:
            BadPayload: the tensor's bytes are damaged.
        """
        self._decode(name)
        return self._changes.get(name)

    def coding(self, name: str) -> Coding:
        """How a tensor is coded."""
        return self._heads[name].coding

    @property
    def is_as_sent(self) -> bool:
        """Whether names, order, dtypes and shapes are the version's."""
        specs = self._reader.base.specs
        return [(name, t.spec, t.like) for name, t in self.tensors.items()] == [
            (name, spec, name) for name, spec in specs.items()
        ]

    def is_change(self, name: str) -> bool:
        """Whether a tensor is the version's, changed by a multiple of a step if at all."""
        tensor, coding = self.tensors[name], self.coding(name)
        return (
            tensor.like is not None
            and coding in (Coding.UNCHANGED, Coding.QUANTISED)
            and isinstance(self._reader.base[tensor.like], LatticeTensor)
        )

    def is_on_lattice(self, name: str) -> bool:
        """Whether a tensor is quantised, or all zero; not where its exact array came."""
        return self.coding(name) in _OWN or self.is_change(name)

    def start(self, name: str, master: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic]:
        """What a tensor's change is added to: master weights, or zeros that take no memory.

        The same object for all updates of a reader. Not to be written to.
        """
        tensor = self.tensors[name]
        assert tensor.spec is not None
        if tensor.like is None or self.coding(name) in _OWN:
            return self._reader.zeros(tensor.spec)
        return master[tensor.like]

    def apply(self, name: str, master: NDArray[np.generic]) -> NDArray[np.generic]:
        """The array the client means: what it starts from plus its change, or its exact array.

        Args:
            name: tensor name.
            master: what `start` says; where the tensor is a change, full-precision values that
                the version was published from, of the same shape.

        Returns:
            An array of its own, in the dtype that the client's has; the master's, where the
            client's has that of the version.

        Raises:
            BadPayload: the tensor's bytes are damaged.
        """
        change, spec = self.change(name), self.tensors[name].spec
        assert spec is not None
        if name in self._exact:
            values, at = self._exact[name]
            if at is None:
                return values.copy()
            array = self._before(name).copy()
            array.reshape(-1)[at] = values
            return array
        like = self.tensors[name].like
        as_sent = like is not None and spec.dtype == self._reader.base[like].dtype
        dtype = master.dtype if as_sent else spec.dtype
        if change is None:
            if self.is_on_lattice(name):
                return np.array(master, dtype, order="C")
            return cast(master, dtype).copy()
        # a change of zero makes +0.0 of -0.0
        out: NDArray[Any] = np.add(master, master.dtype.type(0), order="C")
        where = change.where
        moved = dequantise(change.values, change.step).astype(master.dtype)
        out.reshape(-1)[where] = master.reshape(-1)[where] + moved
        return out.astype(dtype, copy=False)

    def verify(
        self,
        master: Mapping[str, NDArray[np.generic]],
        trained: Callable[[str], bool] = lambda name: True,
    ) -> None:
        """Decode every tensor, and see that no trained one becomes NaN or infinity.

        Non-finite values that were sent may come back, and tensors that nothing sent resembles
        may hold any. A dense array is formed only where the largest weight and the largest change
        together come near the end of the range.

        Args:
            master: full-precision values the version was published from; the same ones at every
                update of a reader.
            trained: whether a tensor of the version that travels exactly is trained, by name.

        Raises:
            BadPayload: a tensor's bytes are damaged, or it becomes NaN or infinity.
        """
        for name, tensor in self.tensors.items():
            if tensor.spec is None:
                continue
            self._decode(name)
            if tensor.spec.dtype.kind == "f" and not self._is_sound(name, master, trained):
                raise BadPayload(f"update of {name!r} makes NaN or infinity")

    def _is_sound(
        self, name: str, master: Mapping[str, NDArray[np.generic]], trained: Callable[[str], bool]
    ) -> bool:
        tensor = self.tensors[name]
        assert tensor.spec is not None
        if not self.is_on_lattice(name):
            if tensor.like is None or name not in self._exact:
                return True
            if not isinstance(self._reader.base[tensor.like], LatticeTensor):
                before = master[tensor.like]
                finite = before.dtype.kind != "f" or math.isfinite(
                    self._reader.largest(tensor.like, before)
                )
                if not (finite and trained(tensor.like)):
                    return True
            return bool(np.isfinite(self._exact[name][0]).all())
        start, largest = self.start(name, master), 0.0
        if tensor.like is not None and self.is_change(name):
            largest = self._reader.largest(tensor.like, start)
        change = self._changes.get(name)
        reach = largest + (change.reach if change is not None else 0.0)
        limit = min(_far_from_infinity(start.dtype), _far_from_infinity(tensor.spec.dtype))
        if not reach < limit:
            with np.errstate(over="ignore", invalid="ignore"):
                return bool(np.isfinite(self.apply(name, start)).all())
        return True

    def _before(self, name: str) -> NDArray[Any]:
        """The version's array of a tensor, as the tensor's dtype has it."""
        tensor = self.tensors[name]
        assert tensor.like is not None
        assert tensor.spec is not None
        return cast(self._reader.held(tensor.like), tensor.spec.dtype)

    def _decode(self, name: str) -> None:
        if name not in self._left or self._body is None:
            return
        head, spec = self._heads[name], self._body.specs[name]
        try:
            if head.edited is not None:
                self._exact[name] = self._edited(name, head, head.edited, self._body), None
            elif head.coding is not Coding.EXACT:
                at, values = self._body.nonzeros(name)
                kept = self._body.positions(name)
                size = spec.size if kept is None else len(kept)
                self._changes[name] = _packed(at, values, size, head.step, kept)
            else:
                self._exact[name] = self._difference(name, self._body[name])
        except CodecError as error:
            raise BadPayload(f"update of {name!r} cannot be decoded: {error}") from error
        self._left.discard(name)
        if not self._left:
            self._body = None

    def _edited(
        self, name: str, head: UpdateHead, edited: Edited, body: Payload
    ) -> NDArray[np.uint8]:
        """A vector of bytes, from one that the version has."""
        assert head.tensor.spec is not None
        held = np.asarray(self._reader.held(edited.of), np.uint8)
        return apply_edits(held, ByteEdits(body[name], body[name + COPIES]), head.tensor.spec.size)

    def _difference(
        self, name: str, coded: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """An exact array; or, where it is much as the version's, what differs and where."""
        like = self.tensors[name].like
        if like is None:
            return coded, None
        array = restore(coded, predicted(self._reader.held(like), coded.dtype))
        before = self._before(name)
        bits, held = (a.reshape(-1).view(f"u{a.itemsize}") for a in (array, before))
        at = np.flatnonzero(bits != held)
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
