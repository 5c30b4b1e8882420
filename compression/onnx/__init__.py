"""A torch module and a published model as an ONNX graph with external weights.

The parts a device needs (`layout`, `manifest`, `selftest`, `runtime`) import neither torch nor
onnx; `export_graph`, `lift_model`, `bind_weights` and the like import them when first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunecast.compression.onnx.errors import (
    BindError,
    ExportError,
    FoldedParameter,
    ForeignModel,
    InputRefused,
    LayoutError,
    ManifestError,
    NumericsError,
    OnnxError,
    QuantisationError,
    RuntimeFailure,
    SelfTestFailed,
    UnsafeExternalData,
)
from prunecast.compression.onnx.graph import (
    ExportedGraph,
    load_graph,
    read_note,
    save_graph,
    with_note,
)
from prunecast.compression.onnx.layout import Segment, WeightsLayout
from prunecast.compression.onnx.manifest import FileRef, PatchRef, ReleaseManifest
from prunecast.compression.onnx.runtime import (
    InferenceSession,
    Signature,
    computes_in_integers,
    open_session,
)
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
    from prunecast.compression.onnx.cache import default_cache, export_cached
    from prunecast.compression.onnx.export import export_graph
    from prunecast.compression.onnx.lattice import snap
    from prunecast.compression.onnx.lift import LiftedModel, lift_model
    from prunecast.compression.onnx.qdq import QuantisedModel, quantise
    from prunecast.compression.onnx.single import export_single

__all__ = [
    "BindError",
    "BoundModel",
    "ExportError",
    "ExportedGraph",
    "FileRef",
    "FoldedParameter",
    "ForeignModel",
    "InferenceSession",
    "InputRefused",
    "LayoutError",
    "LiftedModel",
    "ManifestError",
    "NumericsError",
    "OnnxError",
    "PatchRef",
    "QuantisationError",
    "QuantisedModel",
    "ReleaseManifest",
    "RuntimeFailure",
    "Segment",
    "SelfTestFailed",
    "Signature",
    "Tolerance",
    "UnsafeExternalData",
    "Variant",
    "WeightsLayout",
    "bind_weights",
    "check_outputs",
    "computes_in_integers",
    "default_cache",
    "export_cached",
    "export_graph",
    "export_single",
    "lift_model",
    "load_graph",
    "open_session",
    "pack_arrays",
    "quantise",
    "read_note",
    "save_graph",
    "save_single_file",
    "single_file_size",
    "snap",
    "unpack_arrays",
    "with_note",
]

_LAZY = {
    "BoundModel": "bind",
    "LiftedModel": "lift",
    "QuantisedModel": "qdq",
    "Variant": "bind",
    "bind_weights": "bind",
    "default_cache": "cache",
    "export_cached": "cache",
    "export_graph": "export",
    "export_single": "single",
    "lift_model": "lift",
    "quantise": "qdq",
    "save_single_file": "bind",
    "single_file_size": "bind",
    "snap": "lattice",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
