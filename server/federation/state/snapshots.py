"""Values of Python, NumPy and Flower as a JSON document and named tensors, without pickle.

What a run needs to go on exactly is nested: moments by name, random states, records of Flower,
models. `Packer` makes of such values a document of JSON and the tensors beside it, each content
once; `Unpacker` makes the very same values of these. What is of no type known here is refused by
name: nothing is ever made of a class that the document names.
"""

from __future__ import annotations

import base64
import random
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from prunecast.compression.flower import is_codable_array
from prunecast.compression.pruning.plan import Shares
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor, Tensor

__all__ = ["Packer", "Unpacker", "Unstorable", "fingerprint"]

_PREFIX = "prunecast.state."
_LARGE = 4096  # bytes and masks above it go beside the document
_PLAIN = (bool, int, float, str, type(None))
_RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "metrics": MetricRecord,
    "config": ConfigRecord,
    "records": RecordDict,
}
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}
_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
_STORED = "?bhilqBHILQefd"  # what safetensors has, as NumPy's characters


class Unstorable(TypeError):
    """A value is of a type that has no place in a document; the message names it."""


class Packer:
    """Makes documents of values; all that it made have their tensors in common.

    Args:
        known: tensors that are stored in any case, by name; a value equal to one refers to it.

    Attributes:
        tensors: those that are to be stored beside the document and `known`, by name.
    """

    def __init__(self, known: Mapping[str, NDArray[Any]] | None = None) -> None:
        self.tensors: dict[str, NDArray[Any]] = {}
        self._places: dict[tuple[Any, ...], list[tuple[str, NDArray[Any]]]] = {}
        for name, array in (known or {}).items():
            self._places.setdefault(_content(array), []).append((name, array))

    def pack(self, value: Any) -> Any:
        """The document of a value: what JSON knows.

        Args:
            value: None, numbers, text, bytes; arrays and scalars of NumPy; lists, tuples, sets,
                deques and dictionaries; Flower's records; random generators of Python and NumPy;
                published models and plans of channels; and such within each other.

        Raises:
            Unstorable: something in it is nothing of these.
        """
        if type(value) in _PLAIN:
            return value
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, np.generic):
            return {"scalar": self._array(np.asarray(value))}
        if type(value) is list:
            return [self.pack(item) for item in value]
        kind = type(value).__name__
        if type(value) in (tuple, set, frozenset):
            items: Iterable[Any] = value
            if kind != "tuple":  # a set's order is of no meaning, and another in every process
                items = sorted(value, key=repr)
            return {kind: [self.pack(item) for item in items]}
        if type(value) in (dict, OrderedDict):
            name = "dict" if type(value) is dict else "ordered"
            return {name: [[self.pack(k), self.pack(v)] for k, v in value.items()]}
        if type(value) is deque:
            return {"deque": [value.maxlen, [self.pack(item) for item in value]]}
        if type(value) in (bytes, bytearray):
            return self._bytes(bytes(value))
        return self._of_library(value)

    def _of_library(self, value: Any) -> Any:
        """What NumPy, Flower and this package make."""
        if isinstance(value, np.dtype):
            return {"dtype": value.str}
        if isinstance(value, ArrayRecord):
            return {"arrays": [[name, self._flower(array)] for name, array in value.items()]}
        for kind, record in (("metrics", MetricRecord), ("config", ConfigRecord)):
            if isinstance(value, record):
                return {kind: self.pack(dict(value))}
        if isinstance(value, RecordDict):
            return {"records": self.pack(dict(value.items()))}
        if type(value) is random.Random:
            return {"random": self.pack(value.getstate())}
        if isinstance(value, np.random.Generator):
            return {"generator": self.pack(_plain(value.bit_generator.state))}
        if isinstance(value, np.random.RandomState):
            return {"randomstate": self.pack(value.get_state(legacy=True))}
        if isinstance(value, Shares):  # a plain tuple is equal, and the same key
            return self.pack(tuple(value))
        if isinstance(value, ChannelPlan):
            return {"channels": value.to_text()}
        if isinstance(value, PublishedModel):
            tensors = [[name, self._tensor(tensor)] for name, tensor in value.tensors.items()]
            return {"model": [value.counter, tensors]}
        raise Unstorable(f"{type(value).__module__}.{type(value).__qualname__}")

    def _flower(self, array: Array) -> Any:
        if is_codable_array(array):
            return self._array(array.numpy())
        return [array.dtype, list(array.shape), array.stype, self._bytes(array.data)]

    def _tensor(self, tensor: Tensor) -> Any:
        if isinstance(tensor, RawTensor):
            return [self._array(tensor.values)]
        dtype = np.dtype(tensor.dtype).str
        return [self._array(tensor.q), float(tensor.step), bool(tensor.pruned), dtype]

    def _bytes(self, data: bytes) -> Any:
        if len(data) <= _LARGE:
            return {"bytes": base64.b64encode(data).decode()}
        return {"data": self._place(np.frombuffer(data, np.uint8))}

    def _array(self, array: NDArray[Any]) -> Any:
        if array.dtype.kind == "b" and array.size > _LARGE:
            return {"mask": [self._place(np.packbits(array)), list(array.shape)]}
        if array.dtype.char in _STORED and array.dtype.isnative:
            return {"array": self._place(np.asarray(array, order="C"))}
        if array.dtype.hasobject:
            raise Unstorable(f"an array of {array.dtype}")
        raw = np.frombuffer(array.tobytes(), np.uint8)
        return {"raw": [self._place(raw), array.dtype.str, list(array.shape)]}

    def _place(self, array: NDArray[Any]) -> str:
        """The name that a tensor is stored under."""
        places = self._places.setdefault(_content(array), [])
        for name, stored in places:
            if stored is array or stored.tobytes() == array.tobytes():
                return name
        name = f"{_PREFIX}{len(self.tensors)}"
        self.tensors[name] = array
        places.append((name, array))
        return name


class Unpacker:
    """Makes values of documents.

    Args:
        tensor: gives the tensor of a name.
    """

    def __init__(self, tensor: Callable[[str], NDArray[Any]]) -> None:
        self._tensor_of = tensor

    def unpack(self, document: Any) -> Any:
        """The value whose document it is; arrays are nobody else's.

        Raises:
            ValueError, TypeError, KeyError, IndexError, AttributeError: it is no document.
        """
        if type(document) in _PLAIN:
            return document
        if type(document) is list:
            return [self.unpack(item) for item in document]
        ((kind, value),) = document.items()
        if kind in _SEQUENCES:
            return _SEQUENCES[kind]([self.unpack(item) for item in value])
        if kind in ("dict", "ordered"):
            pairs = [(self.unpack(k), self.unpack(v)) for k, v in value]
            return dict(pairs) if kind == "dict" else OrderedDict(pairs)
        if kind in _RECORDS:
            return _RECORDS[kind](self.unpack(value))
        return getattr(self, f"_{kind}")(value)

    def _deque(self, value: Any) -> deque[Any]:
        most, items = value
        return deque([self.unpack(item) for item in items], maxlen=most)

    def _bytes(self, value: str) -> bytes:
        return base64.b64decode(value, validate=True)

    def _data(self, name: str) -> bytes:
        return self._tensor_of(name).tobytes()

    def _array(self, name: str) -> NDArray[Any]:
        return np.array(self._tensor_of(name))

    def _mask(self, value: Any) -> NDArray[Any]:
        name, shape = value
        count = int(np.prod(shape, dtype=np.int64))
        return np.unpackbits(self._tensor_of(name), count=count).astype(bool).reshape(shape)

    def _raw(self, value: Any) -> NDArray[Any]:
        name, dtype, shape = value
        if np.dtype(dtype).hasobject:
            raise ValueError("an array of objects")
        return np.frombuffer(self._tensor_of(name).tobytes(), np.dtype(dtype)).reshape(shape).copy()

    def _scalar(self, value: Any) -> Any:
        return self.unpack(value)[()]

    def _dtype(self, value: str) -> np.dtype[Any]:
        return np.dtype(value)

    def _arrays(self, value: Any) -> ArrayRecord:
        record = ArrayRecord()
        for name, found in value:
            if isinstance(found, list):
                dtype, shape, stype, data = found
                data = self.unpack(data)
                record[name] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data)
            else:
                record[name] = Array(self.unpack(found))
        return record

    def _random(self, value: Any) -> random.Random:
        made = random.Random()
        made.setstate(self.unpack(value))
        return made

    def _generator(self, value: Any) -> np.random.Generator:
        state = self.unpack(value)
        if state["bit_generator"] not in _GENERATORS:
            raise ValueError(f"{state['bit_generator']!r} is no generator of NumPy's")
        made = getattr(np.random, state["bit_generator"])()
        made.state = state
        return np.random.Generator(made)

    def _randomstate(self, value: Any) -> np.random.RandomState:
        made = np.random.RandomState()
        made.set_state(self.unpack(value))
        return made

    def _channels(self, value: str) -> ChannelPlan:
        return ChannelPlan.from_text(value)

    def _model(self, value: Any) -> PublishedModel:
        counter, tensors = value
        found: dict[str, Tensor] = {}
        for name, (array, *lattice) in tensors:
            values = self.unpack(array)
            if lattice:
                step, pruned, dtype = lattice
                found[name] = LatticeTensor(values, step, pruned, np.dtype(dtype))
            else:
                found[name] = RawTensor(values)
        return PublishedModel(found, counter)


class _Contents(Packer):
    """Names a tensor by its content."""

    def _place(self, array: NDArray[Any]) -> str:
        return repr(_content(array))


def fingerprint(value: Any) -> Any:
    """What differs where two values do, but for one in four billion; JSON, and small.

    Raises:
        Unstorable: see `Packer.pack`.
    """
    return _Contents().pack(value)


def _content(array: NDArray[Any]) -> tuple[Any, ...]:
    data = np.asarray(array, order="C").reshape(-1).view(np.uint8).data
    return array.dtype.str, array.shape, zlib.crc32(data)


def _plain(state: Any) -> Any:
    """A generator's state as a plain dictionary."""
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    return state
