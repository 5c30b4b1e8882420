"""One part of a compressed file: a codec payload that says how its tensors were coded.

A tensor lies in it as it is, as bits, or on a lattice; ``docs/files.md`` specifies the layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import (
    CodecError,
    Limits,
    Payload,
    TensorSpec,
    dequantise,
    encode,
    open_payload,
    quantise,
)
from prunecast.compression.files import UnreadableFile, UnsupportedTensor
from prunecast.compression.files.tensors import FOREIGN, MOST_DIMENSIONS, FileSpec, FileTensor

__all__ = [
    "BITS",
    "ESCAPED",
    "HELD",
    "LATTICE",
    "MOST_NAME",
    "PLAIN",
    "Coded",
    "FilePart",
    "held_name",
    "keep",
    "lattice_coding",
    "open_part",
    "pack_part",
    "put_on_lattice",
    "restore",
]

# The number of each coding in a file.
PLAIN = 0
LATTICE = {1: "float16", 2: "float32", 3: "float64", 4: "bfloat16"}
BITS = {
    16: "bfloat16", 17: "float8_e4m3fn", 18: "float8_e4m3fnuz", 19: "float8_e5m2",
    20: "float8_e5m2fnuz", 21: "float8_e8m0fnu",
}  # fmt: skip
HELD = {name: "float16" if name == "bfloat16" else "int8" for name in BITS.values()}


@dataclass(frozen=True, eq=False)
class Coded:
    """A tensor as a payload holds it.

    Attributes:
        values: the array in the payload.
        coding: number of its coding.
        step: lattice step, of a quantised tensor.
    """

    values: NDArray[Any]
    coding: int = PLAIN
    step: float = 0.0


def keep(tensor: FileTensor) -> Coded:
    """Code a tensor losslessly."""
    for number, dtype in BITS.items():
        if tensor.dtype == dtype:
            return Coded(_hold(tensor.values, dtype), number)
    return Coded(tensor.values)


def _hold(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Bits of a dtype that numpy lacks, as numbers whose coding follows their magnitude.

    bfloat16 as float16: the codec splits floats into bytes with the sign moved last, which leaves
    the exponent of bfloat16 in a byte of its own. float8 as sign and magnitude, minus zero as
    -128; the exponents of e8m0 less 128.
    """
    if dtype == "bfloat16":
        return bits.view(np.float16)
    if dtype == "float8_e8m0fnu":
        return (bits ^ np.uint8(128)).view(np.int8)
    magnitude = (bits & np.uint8(127)).view(np.int8)
    negative = np.where(magnitude == 0, np.int8(-128), -magnitude)
    return np.asarray(np.where(bits > 127, negative, magnitude), np.int8)


def _release(held: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Inverse of `_hold`."""
    if dtype == "bfloat16":
        return held.view(np.uint16)
    bits = held.view(np.uint8)
    if dtype == "float8_e8m0fnu":
        return bits ^ np.uint8(128)
    # -128 is its own negative, which is the pattern of minus zero.
    return np.asarray(np.where(held < 0, np.negative(bits) | np.uint8(128), bits), np.uint8)


def put_on_lattice(
    tensor: FileTensor, step: float, *, dead_zone: float = 0.5, name: str = ""
) -> Coded:
    """Quantise a floating tensor.

    Raises:
        QuantiseError: a value is not finite, or the step does not fit.
    """
    q = quantise(tensor.real(), step, dead_zone=dead_zone, name=name)
    return Coded(q, lattice_coding(tensor.dtype), step)


def lattice_coding(dtype: str) -> int:
    """Number of the coding that puts a floating dtype on a lattice."""
    return next(number for number, known in LATTICE.items() if known == dtype)


def restore(coded: Coded) -> FileTensor:
    """Inverse of `keep`; of `put_on_lattice`, but for what rounding lost."""
    if coded.coding in LATTICE:
        dtype = LATTICE[coded.coding]
        real = dequantise(coded.values, coded.step, "float32" if dtype in FOREIGN else dtype)
        return FileTensor.rounded(real, dtype)
    if coded.coding in BITS:
        dtype = BITS[coded.coding]
        return FileTensor(_release(coded.values, dtype), dtype)
    return FileTensor(coded.values, coded.values.dtype.name)


MOST_NAME = 1 << 16
"""Bytes of the longest name."""
RESERVED = "prunecast:"
ESCAPED = "prunecast:="
_PART, _CODINGS, _STEPS, _METADATA, _GRAPH = (
    RESERVED + key for key in ("part", "codings", "steps", "metadata", "graph")
)
_MOST_METADATA = 1 << 24  # bytes


def held_name(name: str) -> str:
    """Name under which a payload holds a tensor."""
    return ESCAPED + name if name.startswith(RESERVED) else name


def pack_part(
    tensors: Mapping[str, Coded],
    *,
    number: int = 0,
    count: int = 1,
    metadata: Mapping[str, str] | None = None,
    graph: bytes | None = None,
) -> bytes:
    """Return one part.

    Args:
        tensors: name to coded tensor.
        number: of this part, from 0.
        count: number of parts.
        metadata: texts for the whole file; in the first part.
        graph: of a model that was an ``.onnx`` file; in the first part.

    Raises:
        CodecError: a tensor cannot be coded.
        UnsupportedTensor: a name, the dimensions or the metadata exceed what a reader accepts.
    """
    for name, coded in tensors.items():
        length = len(name.encode("utf-8", "surrogatepass"))
        if length > MOST_NAME or coded.values.ndim > MOST_DIMENSIONS:
            raise UnsupportedTensor(
                f"tensor {name[:80]!r} has a name of more than {MOST_NAME} bytes or more than "
                f"{MOST_DIMENSIONS} dimensions: rename or reshape it"
            )
    arrays = {held_name(name): coded.values for name, coded in tensors.items()}
    if any(coded.coding for coded in tensors.values()):
        arrays[_CODINGS] = np.array([coded.coding for coded in tensors.values()], np.uint8)
    steps = [coded.step for coded in tensors.values() if coded.coding in LATTICE]
    if steps:
        arrays[_STEPS] = np.array(steps, np.float32)
    if count > 1:
        arrays[_PART] = np.array([number, count])
    if metadata:
        text = json.dumps(dict(metadata), ensure_ascii=False, separators=(",", ":"))
        encoded = text.encode("utf-8", "surrogatepass")
        if len(encoded) > _MOST_METADATA:
            raise UnsupportedTensor(f"the file's metadata exceed {_MOST_METADATA} bytes")
        arrays[_METADATA] = np.frombuffer(encoded, np.uint8)
    if graph is not None:
        arrays[_GRAPH] = np.frombuffer(graph, np.uint8)
    return encode(arrays, thorough=True)


@dataclass(frozen=True)
class FilePart:
    """A part whose tensors are decoded when asked for.

    Attributes:
        specs: name to dtype and shape, as restored.
        codings: name to number of its coding.
        steps: name to lattice step, of the quantised ones.
        number: of this part, from 0.
        count: number of parts of the file.
        metadata: texts for the whole file.
    """

    payload: Payload
    specs: dict[str, FileSpec]
    codings: dict[str, int]
    steps: dict[str, float]
    number: int = 0
    count: int = 1
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def graph(self) -> bytes | None:
        """Skeleton of an ``.onnx`` model; None in a part without.

        Raises:
            UnreadableFile: its bytes are damaged.
        """
        if _GRAPH not in self.payload.specs:
            return None
        try:
            return self.payload[_GRAPH].tobytes()
        except CodecError as error:
            raise UnreadableFile(f"the graph cannot be decoded: {error}") from error

    def load(self, name: str) -> FileTensor:
        """Decode one tensor.

        Raises:
            UnreadableFile: its bytes are damaged.
        """
        try:
            values = self.payload[held_name(name)]
        except CodecError as error:
            raise UnreadableFile(f"tensor {name!r} cannot be decoded: {error}") from error
        return restore(Coded(values, self.codings[name], self.steps.get(name, 0.0)))


def open_part(payload: bytes, limits: Limits | None = None) -> FilePart:
    """Open a part; every note is checked against the tensors.

    Raises:
        CodecError: not a payload of the codec, damaged, or above the limits.
        UnreadableFile: its notes contradict its tensors, or are from a newer release.
    """
    opened = open_payload(payload, limits=limits)
    stored: dict[str, str] = {}
    notes = {_PART, _CODINGS, _STEPS, _METADATA, _GRAPH} & set(opened.specs)
    for held in opened.specs:
        if held in notes:
            continue
        if held.startswith(RESERVED) and not held.startswith(ESCAPED):
            raise UnreadableFile(f"the note {held!r} is not known to this release: update it")
        name = held.removeprefix(ESCAPED)
        if name in stored:
            raise UnreadableFile(f"tensor {name!r} appears twice")
        stored[name] = held
    codes = [PLAIN] * len(stored)
    if _CODINGS in notes:
        codes = _note(opened, _CODINGS, "uint8", len(stored)).tolist()
    codings = dict(zip(stored, codes, strict=True))
    quantised = [name for name, code in codings.items() if code in LATTICE]
    steps: dict[str, float] = {}
    if quantised or _STEPS in notes:
        steps = dict(
            zip(quantised, _note(opened, _STEPS, "float32", len(quantised)).tolist(), strict=True)
        )
    specs = {
        name: _restored_spec(name, opened.specs[held], codings[name], steps.get(name))
        for name, held in stored.items()
    }
    number, count = 0, 1
    if _PART in notes:
        number, count = _note(opened, _PART, "int64", 2).tolist()
    metadata = _metadata(opened) if _METADATA in notes else {}
    if _GRAPH in notes and (
        opened.specs[_GRAPH].dtype != np.uint8 or len(opened.specs[_GRAPH].shape) != 1
    ):
        raise UnreadableFile(f"the note {_GRAPH!r} is no graph")
    return FilePart(opened, specs, codings, steps, number, count, metadata)


def _note(opened: Payload, name: str, dtype: str, size: int) -> NDArray[Any]:
    if name not in opened.specs or opened.specs[name] != TensorSpec(np.dtype(dtype), (size,)):
        raise UnreadableFile(f"the note {name!r} is missing, or not {size} values of {dtype}")
    return opened[name]


def _restored_spec(name: str, held: TensorSpec, coding: int, step: float | None) -> FileSpec:
    dtype, expected = held.dtype.name, held.dtype.name
    if coding in LATTICE:
        dtype, expected = LATTICE[coding], "int32"
        if step is None or not (math.isfinite(step) and step > 0):
            raise UnreadableFile(f"tensor {name!r} has the lattice step {step}")
    elif coding in BITS:
        dtype, expected = BITS[coding], HELD[BITS[coding]]
    elif coding != PLAIN:
        raise UnreadableFile(f"tensor {name!r} has coding {coding}, unknown here: update prunecast")
    if held.dtype.name != expected:
        raise UnreadableFile(f"tensor {name!r} is held as {held.dtype}, not as {expected}")
    return FileSpec(dtype, held.shape)


def _metadata(opened: Payload) -> dict[str, str]:
    spec = opened.specs[_METADATA]
    if spec.dtype != np.uint8 or len(spec.shape) != 1 or spec.size > _MOST_METADATA:
        raise UnreadableFile(f"the note {_METADATA!r} is no text")
    try:
        document = json.loads(opened[_METADATA].tobytes().decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"the note {_METADATA!r} is no JSON: {error}") from error
    if not isinstance(document, dict) or not all(isinstance(v, str) for v in document.values()):
        raise UnreadableFile(f"the note {_METADATA!r} is not an object of strings")
    return document
