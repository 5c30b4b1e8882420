"""The tools that build a release: a module or an ``.onnx`` file, a published model, a graph.

What a device reads of the result is `compression.release`. `compression.onnx.export` needs torch
and is imported by name.
"""

from prunecast.compression.onnx.bind import (
    BoundModel,
    Variant,
    bind_weights,
    export_single,
    save_single_file,
    single_file_size,
)
from prunecast.compression.onnx.errors import (
    BindError,
    ExportError,
    FoldedParameter,
    ForeignModel,
    NumericsError,
    OnnxError,
    QuantisationError,
    UnsafeExternalData,
)
from prunecast.compression.onnx.graph import (
    ExportedGraph,
    load_graph,
    read_note,
    save_graph,
    with_note,
)
from prunecast.compression.onnx.lattice import snap
from prunecast.compression.onnx.lift import LiftedModel, lift_model
from prunecast.compression.onnx.qdq import QuantisedModel, quantise

__all__ = [
    "BindError",
    "BoundModel",
    "ExportError",
    "ExportedGraph",
    "FoldedParameter",
    "ForeignModel",
    "LiftedModel",
    "NumericsError",
    "OnnxError",
    "QuantisationError",
    "QuantisedModel",
    "UnsafeExternalData",
    "Variant",
    "bind_weights",
    "export_single",
    "lift_model",
    "load_graph",
    "quantise",
    "read_note",
    "save_graph",
    "save_single_file",
    "single_file_size",
    "snap",
    "with_note",
]
