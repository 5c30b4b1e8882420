"""The tools that build a release: a module or an ``.onnx`` file, a published model, a graph.

What a device reads of the result is `compression.release`. `compression.onnx.export` needs torch.
The errors are here: one base, one class per cause.
"""

from prunecast.compression.release import ReleaseError

__all__ = [
    "BindError",
    "ExportError",
    "FoldedParameter",
    "ForeignModel",
    "NumericsError",
    "OnnxError",
    "QuantisationError",
]


class OnnxError(ReleaseError):
    """Base of every error that is `prunecast.compression.onnx`'s own."""


class ExportError(OnnxError):
    """The module cannot be exported, or its graph cannot carry later weights."""


class FoldedParameter(ExportError):
    """A parameter that the module uses is not an input of the graph: new weights would not act."""


class NumericsError(ExportError):
    """The exported graph does not compute what the module computes."""


class QuantisationError(OnnxError):
    """A model cannot be quantised, or the samples do not fit it."""


class BindError(OnnxError):
    """A published model does not fit the graph."""


class ForeignModel(OnnxError):
    """An ``.onnx`` file from elsewhere is damaged, or cannot become a release."""
