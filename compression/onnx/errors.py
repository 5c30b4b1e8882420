"""Errors of the ONNX component: one base, one class per cause."""

__all__ = [
    "BindError",
    "ExportError",
    "FoldedParameter",
    "ForeignModel",
    "InputRefused",
    "LayoutError",
    "ManifestError",
    "NumericsError",
    "OnnxError",
    "QuantisationError",
    "RuntimeFailure",
    "SelfTestFailed",
    "UnsafeExternalData",
]


class OnnxError(ValueError):
    """Base of every error that `prunecast.compression.onnx` raises."""


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


class LayoutError(OnnxError):
    """A weights layout is malformed, or a model does not fit it."""


class ManifestError(OnnxError):
    """A release manifest is malformed or of a schema this version does not read."""


class SelfTestFailed(OnnxError):
    """A session does not reproduce the outputs recorded with the release."""


class RuntimeFailure(OnnxError):
    """onnxruntime refused a model or its inputs."""


class InputRefused(RuntimeFailure):
    """An input is missing, unknown, or has the wrong dtype or shape; the model did not run."""


class ForeignModel(OnnxError):
    """An ``.onnx`` file from elsewhere is damaged, or cannot become a release."""


class UnsafeExternalData(ForeignModel):
    """A model refers to weights outside its own folder."""
