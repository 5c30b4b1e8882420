"""Inference requests and responses of the Open Inference Protocol, as bytes.

The REST protocol of KServe (specification/protocol/inference_rest.md) with Triton's binary tensor
data extension (docs/protocol/extension_binary_data.md): behind the JSON document may follow the
bytes of those tensors that state ``binary_data_size``, in the order of the document.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.client.edge.inference import tensors
from prunecast.client.edge.inference.errors import RequestRefused

__all__ = ["InferRequest", "encode_response", "parse_request"]

_MOST_ID = 1024


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
    """Read the body of a request.

    Args:
        body: all of it.
        json_bytes: how many of its bytes are the JSON document.

    Raises:
        RequestRefused: 400, it is malformed.
    """
    document = _load(body[:json_bytes])
    parameters = _object(document.get("parameters", {}), "parameters")
    identifier = document.get("id")
    if identifier is not None and (type(identifier) is not str or len(identifier) > _MOST_ID):
        raise RequestRefused(400, f"id must be a string of at most {_MOST_ID} characters")
    inputs: dict[str, NDArray[np.generic]] = {}
    at = json_bytes
    for item in _objects(document.get("inputs"), "inputs"):
        name = _name(item, inputs)
        size = _object(item.get("parameters", {}), "parameters").get("binary_data_size")
        dtype = tensors.dtype_of(name, item.get("datatype"))
        shape = tensors.checked_shape(name, item.get("shape"))
        if size is None:
            inputs[name] = tensors.from_json(name, dtype, shape, item.get("data"))
            continue
        if type(size) is not int or not 0 <= size <= len(body) - at:
            raise RequestRefused(
                400, f"input {name!r}: binary_data_size goes beyond the {len(body)} bytes received"
            )
        inputs[name] = tensors.from_binary(name, dtype, shape, body[at : at + size])
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


def encode_response(
    request: InferRequest, outputs: Mapping[str, NDArray[np.generic]], name: str, version: int
) -> tuple[bytes, bytes]:
    """The JSON document of a response, and the binary data that follows it.

    Args:
        request: what was asked for.
        outputs: everything that the model computed.
        name: of the model.
        version: of the release that computed it.

    Raises:
        RequestRefused: 400, an output does not exist, or JSON cannot carry it.
    """
    wanted = request.outputs
    if wanted is None:
        wanted = dict.fromkeys(outputs, request.binary)
    described, binary = [], []
    for output, as_binary in wanted.items():
        array = outputs.get(output)
        if array is None:
            raise RequestRefused(
                400, f"there is no output {output!r}: the model has {', '.join(outputs)}"
            )
        tensor: dict[str, Any] = {
            "name": output,
            "datatype": tensors.datatype_of(array.dtype.name),
            "shape": list(array.shape),
        }
        if as_binary:
            binary.append(tensors.to_binary(array))
            tensor["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        described.append(tensor)
    document: dict[str, Any] = {"model_name": name, "model_version": str(version)}
    if request.id is not None:
        document["id"] = request.id
    document["outputs"] = described
    try:
        text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise RequestRefused(
            400, "an output is not finite, which JSON cannot say: ask for binary data"
        ) from None
    return text.encode(), b"".join(binary)


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
