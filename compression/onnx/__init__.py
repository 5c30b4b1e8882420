"""A torch module and a published model as an ONNX graph with external weights.

The parts a device needs (`layout`, `manifest`, `selftest`, `runtime`) import neither torch nor
onnx; `export_graph`, `bind_weights` and `save_single_file` import them when first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunecast.compression.onnx.errors import (
    BindError,
    ExportError,
    FoldedParameter,
    LayoutError,
    ManifestError,
    NumericsError,
    OnnxError,
    RuntimeFailure,
    SelfTestFailed,
)
from prunecast.compression.onnx.graph import ExportedGraph, load_graph, save_graph
from prunecast.compression.onnx.layout import Segment, WeightsLayout
from prunecast.compression.onnx.manifest import FileRef, PatchRef, ReleaseManifest
from prunecast.compression.onnx.runtime import InferenceSession, Signature, open_session
from prunecast.compression.onnx.selftest import (
    Tolerance,
    check_outputs,
    pack_arrays,
    unpack_arrays,
)

if TYPE_CHECKING:
    from prunecast.compression.onnx.bind import (
        BoundModel,
        Variant,
        bind_weights,
        save_single_file,
        single_file_size,
    )
    from prunecast.compression.onnx.export import export_graph

__all__ = [
    "BindError",
    "BoundModel",
    "ExportError",
    "ExportedGraph",
    "FileRef",
    "FoldedParameter",
    "InferenceSession",
    "LayoutError",
    "ManifestError",
    "NumericsError",
    "OnnxError",
    "PatchRef",
    "ReleaseManifest",
    "RuntimeFailure",
    "Segment",
    "SelfTestFailed",
    "Signature",
    "Tolerance",
    "Variant",
    "WeightsLayout",
    "bind_weights",
    "check_outputs",
    "export_graph",
    "load_graph",
    "open_session",
    "pack_arrays",
    "save_graph",
    "save_single_file",
    "single_file_size",
    "unpack_arrays",
]

_LAZY = {
    "BoundModel": "bind",
    "Variant": "bind",
    "bind_weights": "bind",
    "export_graph": "export",
    "save_single_file": "bind",
    "single_file_size": "bind",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
