"""Inference requests and responses of the Open Inference Protocol, as bytes.

The REST protocol of KServe (specification/protocol/inference_rest.md) with Triton's binary tensor
data extension (docs/protocol/extension_binary_data.md): behind the JSON document may follow the
bytes of those tensors that state ``binary_data_size``, in the order of the document. Whatever is
wrong with a request raises `RequestRefused` with the status 400.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.client.edge.errors import RequestRefused
from prunecast.compression.release.runtime import Signature
from prunecast.compression.release.selftest import dtype_name

__all__ = [
    "DATATYPE_NAMES",
    "InferRequest",
    "chosen_outputs",
    "encode_response",
    "least_output_bytes",
    "parse_request",
    "response_bytes",
    "size_of",
    "unpaid_values",
]

_MOST_ID = 1024
_SLICE = 1 << 14  # values: some milliseconds
_MOST_DIMENSIONS = 16
_MOST_VALUES = 1 << 40
_DATATYPES = {
    "BOOL": "bool",
    **{f"{u}INT{bits}": f"{u.lower()}int{bits}" for u in ("", "U") for bits in (8, 16, 32, 64)},
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "str",
}
DATATYPE_NAMES = {dtype: name for name, dtype in _DATATYPES.items()}
"""Names in the protocol by the numpy dtypes that a model may have."""
_JSON_TYPES: dict[str, set[type]] = {
    "b": {bool},
    "i": {int},
    "u": {int},
    "f": {int, float},
    "U": {str},
}
_LEAST_JSON, _MOST_JSON = 2, 26  # bytes of a value; of a text, it can be more
_MOST_TEXTS = 4 << 20  # bytes of a body's texts, which take more than ten times as much here
_LENGTH = 4  # bytes before each text


@dataclass(frozen=True)
class InferRequest:
    """What a client asks for.

    Attributes:
        inputs: arrays by name.
        outputs: which outputs, and whether as binary data; None: all of them.
        binary: whether outputs come as binary data where not stated.
        id: to be repeated in the response.
    """

    inputs: dict[str, NDArray[np.generic]]
    outputs: dict[str, bool] | None
    binary: bool
    id: str | None


def parse_request(body: memoryview, json_bytes: int) -> InferRequest:
    """Read the body of a request, whose first `json_bytes` bytes are the JSON document.

    Raises:
        RequestRefused: it is malformed.
    """
    document = _load(body[:json_bytes])
    parameters = _object(document.get("parameters", {}), "parameters")
    identifier = document.get("id")
    if identifier is not None and (type(identifier) is not str or len(identifier) > _MOST_ID):
        raise RequestRefused(400, f"id must be a string of at most {_MOST_ID} characters")
    inputs: dict[str, NDArray[np.generic]] = {}
    at, texts = json_bytes, 0
    for item in _objects(document.get("inputs"), "inputs"):
        name = _name(item, inputs)
        size = _object(item.get("parameters", {}), "parameters").get("binary_data_size")
        dtype = _dtype_of(name, item.get("datatype"))
        shape = _checked_shape(name, item.get("shape"))
        if size is None:
            inputs[name] = _from_json(name, dtype, shape, item.get("data"))
            continue
        if type(size) is not int or not 0 <= size <= len(body) - at:
            raise RequestRefused(
                400, f"input {name!r}: binary_data_size goes beyond the {len(body)} bytes received"
            )
        texts += size if dtype.kind == "U" else 0
        if texts > _MOST_TEXTS:
            raise RequestRefused(413, f"texts may have {_MOST_TEXTS} bytes: send fewer at a time")
        inputs[name] = _from_binary(name, dtype, shape, body[at : at + size])
        at += size
    if at != len(body):
        raise RequestRefused(400, f"{len(body) - at} bytes belong to no input")
    binary = parameters.get("binary_data_output", False) is True
    outputs: dict[str, bool] | None = None
    if document.get("outputs"):
        outputs = {}
        for item in _objects(document["outputs"], "outputs"):
            chosen = _object(item.get("parameters", {}), "parameters")
            if "classification" in chosen:
                raise RequestRefused(400, "the classification extension is not supported")
            outputs[_name(item, outputs)] = chosen.get("binary_data", binary) is True
    return InferRequest(inputs, outputs, binary, identifier)


def chosen_outputs(
    request: InferRequest, outputs: Mapping[str, NDArray[np.generic]]
) -> dict[str, bool]:
    """Names of the outputs that are asked for, and whether as binary data.

    Raises:
        RequestRefused: one does not exist.
    """
    if request.outputs is None:
        return dict.fromkeys(outputs, request.binary)
    for output in request.outputs:
        if output not in outputs:
            raise RequestRefused(
                400, f"there is no output {output[:80]!r}: the model has {', '.join(outputs)}"
            )
    return request.outputs


def response_bytes(
    request: InferRequest, outputs: Mapping[str, NDArray[np.generic]], most_json: int
) -> int:
    """The most bytes that a response can have: binary data, and `most_json` if there is JSON.

    Raises:
        RequestRefused: JSON would surely have more, or an output does not exist.
    """
    chosen = chosen_outputs(request, outputs)
    values = sum(outputs[name].size for name, binary in chosen.items() if not binary)
    if values * _LEAST_JSON > most_json:
        raise _too_much_json(most_json)
    binary = sum(size_of(outputs[name]) for name, binary in chosen.items() if binary)
    return binary + min(most_json, _MOST_JSON * values)


def size_of(array: NDArray[np.generic]) -> int:
    """Bytes of an array as binary data; of texts, at least."""
    if array.dtype.kind == "O":
        return sum(map(len, array.ravel().tolist())) + _LENGTH * array.size
    return array.nbytes


def _too_much_json(most: int) -> RequestRefused:
    return RequestRefused(
        413, f"outputs as JSON may have {most} bytes: ask for binary data (binary_data_output)"
    )


def encode_response(
    request: InferRequest,
    outputs: Mapping[str, NDArray[np.generic]],
    name: str,
    version: int,
    most_json: int = sys.maxsize,
) -> tuple[int, bytes]:
    """A response: bytes of its JSON document, and all of it with the binary data that follows.

    Args:
        request: what was asked for.
        outputs: of the model, by name.
        name: of the model.
        version: of the release.
        most_json: bytes that values may have in JSON.

    Raises:
        RequestRefused: an output does not exist, or JSON cannot carry it.
    """
    described: list[str] = []
    binary: list[memoryview] = []
    for output, as_binary in chosen_outputs(request, outputs).items():
        array = outputs[output]
        tensor: dict[str, Any] = {
            "name": output,
            "datatype": DATATYPE_NAMES[dtype_name(array)],
            "shape": list(array.shape),
        }
        if as_binary:
            binary.append(_to_binary(array))
            tensor["parameters"] = {"binary_data_size": len(binary[-1])}
            described.append(_compact(tensor))
        else:
            values = _values(array, most_json)
            most_json -= len(values)
            described.append(f'{_compact(tensor)[:-1]},"data":[{values}]}}')
    document: dict[str, Any] = {"model_name": name, "model_version": str(version)}
    if request.id is not None:
        document["id"] = request.id
    text = f'{_compact(document)[:-1]},"outputs":[{",".join(described)}]}}'
    encoded = text.encode()
    return len(encoded), b"".join((encoded, *binary))


def _compact(value: object) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _values(array: NDArray[np.generic], most: int) -> str:
    """JSON of all values, made in slices: other requests get their turn between two of them."""
    flat, parts, size = array.ravel(), [], 0
    for at in range(0, flat.size, _SLICE):
        try:
            parts.append(_compact(flat[at : at + _SLICE].tolist())[1:-1])
        except ValueError:
            raise RequestRefused(
                400, "an output is not finite, which JSON cannot say: ask for binary data"
            ) from None
        size += len(parts[-1]) + 1
        if size > most + 1:
            raise _too_much_json(most)
    return ",".join(parts)


def least_output_bytes(
    inputs: Sequence[Signature], outputs: Sequence[Signature], given: Mapping[str, NDArray[Any]]
) -> int:
    """Bytes that the outputs of a model will have at least, told by its signature.

    Args:
        inputs: of the model.
        outputs: of the model; a free dimension that an input has, too, is as large as there.
        given: arrays by name of the input; those that do not fit are left out of account.
    """
    free: dict[int | str, int] = {}
    for one in inputs:
        array = given.get(one.name)
        if array is not None and array.ndim == len(one.shape):
            free |= zip(one.shape, array.shape, strict=True)
    free.pop("dynamic", None)  # stands for every dimension without a name
    return sum(
        math.prod(size if isinstance(size, int) else free.get(size, 1) for size in output.shape)
        * np.dtype(output.dtype).itemsize
        for output in outputs
    )


def unpaid_values(inputs: Sequence[Signature], given: Mapping[str, NDArray[Any]]) -> int:
    """The most values that an empty tensor among the inputs would have without its zeros.

    Sizes that a model leaves free are paid for with the bytes of a tensor's values, so they are
    as large as its sender cares to make them where there are none. Fixed sizes do not count.
    """
    most = 0
    for one in inputs:
        array = given.get(one.name)
        if array is not None and not array.size and array.ndim == len(one.shape):
            free = [n for n, m in zip(array.shape, one.shape, strict=True) if isinstance(m, str)]
            most = max(most, math.prod(n or 1 for n in free))
    return most


def _load(data: memoryview) -> dict[str, Any]:
    try:
        return _object(json.loads(str(data, "utf-8")), "the body")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        raise RequestRefused(400, f"the body is not JSON: {str(error)[:100]}") from None


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestRefused(400, f"{what} must be a JSON object")
    return value


def _objects(value: object, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RequestRefused(400, f"{what} must be a list of tensors")
    return [_object(item, f"each of {what}") for item in value]


def _name(item: Mapping[str, Any], seen: Mapping[str, object]) -> str:
    name = item.get("name")
    if type(name) is not str:
        raise RequestRefused(400, "each tensor needs a name")
    if name in seen:
        raise RequestRefused(400, f"tensor {name[:80]!r} is given twice")
    return name


def _dtype_of(tensor: str, datatype: object) -> np.dtype[Any]:
    """Little-endian numpy dtype of a datatype of the protocol."""
    name = _DATATYPES.get(datatype) if isinstance(datatype, str) else None
    if name is None:
        raise RequestRefused(
            400,
            f"input {tensor!r} has the datatype {_short(datatype)}: use {', '.join(_DATATYPES)}",
        )
    return np.dtype(name).newbyteorder("<")


def _checked_shape(tensor: str, shape: object) -> tuple[int, ...]:
    """A shape from JSON: a list of at most 16 sizes, of at most 2⁴⁰ values."""
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_DIMENSIONS
        or not all(type(n) is int and 0 <= n <= _MOST_VALUES for n in shape)
        or math.prod(n or 1 for n in shape) > _MOST_VALUES  # numpy counts so, even around a zero
    ):
        raise RequestRefused(
            400,
            f"input {tensor!r} has the shape {_short(shape)}: give a list of at most "
            f"{_MOST_DIMENSIONS} sizes",
        )
    return tuple(shape)


def _from_json(
    tensor: str, dtype: np.dtype[Any], shape: tuple[int, ...], data: object
) -> NDArray[np.generic]:
    """An array from JSON values, flat in row-major order or nested as `shape` says."""
    if not isinstance(data, list):
        raise RequestRefused(400, f"input {tensor!r}: data must be a list, or binary data")
    values = _flat(tensor, shape, data)
    if len(values) != math.prod(shape):
        raise RequestRefused(
            400, f"input {tensor!r} has {len(values)} values; its shape needs {math.prod(shape)}"
        )
    wrong = set(map(type, values)) - _JSON_TYPES[dtype.kind]
    if wrong:
        kinds = ", ".join(sorted(kind.__name__ for kind in wrong))
        raise RequestRefused(400, f"input {tensor!r} of {dtype.name} holds values of type {kinds}")
    try:
        if dtype.kind == "U":
            "".join(values).encode()  # JSON may hold halves of characters
            return _texts(values, shape)
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=dtype.newbyteorder("="))
    except (OverflowError, ValueError):
        raise RequestRefused(400, f"input {tensor!r}: a value does not fit {dtype.name}") from None
    infinite = int(np.isinf(array).sum()) if dtype.kind == "f" else 0
    if infinite and infinite != sum(map(math.isinf, values)):
        raise RequestRefused(400, f"input {tensor!r}: a value does not fit {dtype.name}")
    return array.reshape(shape)


def _texts(values: list[str], shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Texts as objects: in numpy's own text arrays, the longest would set the size of all."""
    array: NDArray[Any] = np.empty(len(values), object)
    array[:] = values
    return array.reshape(shape)


def _from_binary(
    tensor: str, dtype: np.dtype[Any], shape: tuple[int, ...], data: memoryview
) -> NDArray[np.generic]:
    """An array from bytes: little-endian, row-major, nothing between the elements.

    Each text comes after its length in bytes of UTF-8, four bytes.
    """
    if dtype.kind == "U":
        texts, at = [], 0
        while at < len(data):
            size = int.from_bytes(data[at : at + _LENGTH], "little")
            at += _LENGTH + size
            if at > len(data):
                raise RequestRefused(400, f"input {tensor!r}: a text goes beyond the binary data")
            try:
                texts.append(str(data[at - size : at], "utf-8"))
            except UnicodeDecodeError:
                raise RequestRefused(400, f"input {tensor!r}: a text is not UTF-8") from None
        if len(texts) != math.prod(shape):
            raise RequestRefused(
                400, f"input {tensor!r} has {len(texts)} texts; its shape needs {math.prod(shape)}"
            )
        return _texts(texts, shape)
    needed = math.prod(shape) * dtype.itemsize
    if len(data) != needed:
        raise RequestRefused(
            400, f"input {tensor!r} has {len(data)} bytes of data; its shape needs {needed}"
        )
    if dtype.kind == "b" and (np.frombuffer(data, np.uint8) > 1).any():
        raise RequestRefused(400, f"input {tensor!r}: a BOOL is a byte of 0 or 1")
    # a copy: inside the body the values lie where the JSON happens to end, which may be unaligned
    return np.frombuffer(data, dtype).astype(dtype.newbyteorder("=")).reshape(shape)


def _to_binary(array: NDArray[np.generic]) -> memoryview:
    """The bytes of an array as the protocol wants them."""
    if array.dtype.kind in "UO":
        texts = (text.encode() for text in array.ravel().tolist())
        return memoryview(b"".join(len(t).to_bytes(_LENGTH, "little") + t for t in texts))
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8).data


def _flat(tensor: str, shape: Sequence[int], data: list[Any]) -> list[Any]:
    """`data` without its nesting, which must be that of `shape` if there is any."""
    values = data
    if not any(type(item) is list for item in data):
        return values
    for axis, size in enumerate(shape[1:], start=1):
        if not all(type(item) is list and len(item) == size for item in values):
            break
        if axis == 1 and len(values) != shape[0]:
            break
        values = list(chain.from_iterable(values))
    else:
        return values
    raise RequestRefused(400, f"input {tensor!r}: the nesting of its data is not that of its shape")


def _short(value: object) -> str:
    return repr(value)[:60]
