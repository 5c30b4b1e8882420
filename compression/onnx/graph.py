"""An exported architecture: the graph without its weights, and what each weight must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from prunecast.common.files import write_atomically
from prunecast.compression.codec import TensorSpec
from prunecast.compression.onnx import ExportError

__all__ = ["ExportedGraph", "load_graph", "read_note", "save_graph", "with_note"]

_KEY = "prunecast.graph"
_SCHEMA = 1


@dataclass(frozen=True)
class ExportedGraph:
    """One architecture, exported once; weights are bound to it as often as needed.

    Attributes:
        skeleton: serialised ONNX model whose parameters are referred to but not defined.
        parameters: initialisers that weights are bound to, in graph order: dtype and shape.
        aliases: other names of tied weights, each to the initialiser that holds the value.
        unused: tensors of the module that inference does not read (``num_batches_tracked``).
        max_difference: largest absolute difference between the graph in onnxruntime and the
            module, over the example inputs, with the module's weights and with perturbed ones.
        integers: parameters whose lattice integers the graph reads as int8, under ``<name>::q``;
            it computes their scale itself.
    """

    skeleton: bytes
    parameters: Mapping[str, TensorSpec]
    aliases: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    max_difference: float = 0.0
    integers: tuple[str, ...] = ()

    def names_of(self, parameter: str) -> tuple[str, ...]:
        """Every name under which a published model may carry `parameter`."""
        return (parameter, *(n for n, target in self.aliases.items() if target == parameter))


def save_graph(graph: ExportedGraph, path: Path) -> None:
    """Write the graph to one file, atomically; it is an ONNX model without its weights.

    Raises:
        StorageError: the file cannot be written.
    """
    import onnx

    model = onnx.ModelProto.FromString(graph.skeleton)
    entry = model.metadata_props.add()
    entry.key, entry.value = (
        _KEY,
        json.dumps(
            {
                "schema": _SCHEMA,
                "parameters": [
                    [n, s.dtype.name, list(s.shape)] for n, s in graph.parameters.items()
                ],
                "aliases": dict(graph.aliases),
                "unused": list(graph.unused),
                "max_difference": graph.max_difference,
                "integers": list(graph.integers),
            }
        ),
    )
    write_atomically(Path(path), model.SerializeToString(deterministic=True))


def with_note(graph: ExportedGraph, key: str, text: str) -> ExportedGraph:
    """The graph with a text that stays with it, into every `model.onnx` that is made of it."""
    import onnx

    model = onnx.ModelProto.FromString(graph.skeleton)
    entry = model.metadata_props.add()
    entry.key, entry.value = key, text
    return replace(graph, skeleton=model.SerializeToString(deterministic=True))


def read_note(data: bytes, key: str) -> str | None:
    """The text that `with_note` put into a skeleton or a `model.onnx`; None if there is none."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        return None
    return next((str(e.value) for e in model.metadata_props if e.key == key), None)


def load_graph(path: Path) -> ExportedGraph:
    """Read a file that `save_graph` wrote.

    Raises:
        ExportError: missing, damaged, or another kind of ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.ModelProto.FromString(Path(path).read_bytes())
    except (OSError, DecodeError) as error:
        raise ExportError(f"cannot read the graph {path}: {error}") from error
    entries = {e.key: e.value for e in model.metadata_props}
    try:
        document: dict[str, Any] = json.loads(entries[_KEY])
        if document["schema"] != _SCHEMA:
            raise ExportError(f"{path} is a graph of schema {document['schema']}, not {_SCHEMA}")
        parameters = {
            n: TensorSpec(np.dtype(dtype), tuple(shape))
            for n, dtype, shape in document["parameters"]
        }
        for i, entry in enumerate(model.metadata_props):
            if entry.key == _KEY:
                del model.metadata_props[i]
                break
        return ExportedGraph(
            model.SerializeToString(deterministic=True),
            parameters,
            dict(document["aliases"]),
            tuple(document["unused"]),
            float(document["max_difference"]),
            tuple(document.get("integers", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(
            f"{path} is not a graph without weights: write it with save_graph"
        ) from error
