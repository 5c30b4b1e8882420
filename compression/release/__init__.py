"""What a device reads of a release: manifest, layout of the weights, self-test and runtime.

Needs numpy and, to open a session, onnxruntime. What builds a release is `compression.onnx`. The
errors are here: one base, one class per cause.
"""

__all__ = [
    "InputRefused",
    "LayoutError",
    "ManifestError",
    "OutOfMemory",
    "OutOfTime",
    "ReleaseError",
    "RuntimeFailure",
    "SelfTestFailed",
]


class ReleaseError(ValueError):
    """Base of every error that `prunecast.compression.release` raises."""


class LayoutError(ReleaseError):
    """A weights layout is malformed, or a model does not fit it."""


class ManifestError(ReleaseError):
    """A release manifest is malformed or of a schema this version does not read."""


class SelfTestFailed(ReleaseError):
    """A session does not reproduce the outputs recorded with the release."""


class RuntimeFailure(ReleaseError):
    """onnxruntime refused a model or its inputs."""


class InputRefused(RuntimeFailure):
    """An input is missing, unknown, or has the wrong dtype or shape; the model did not run."""


class OutOfTime(RuntimeFailure):
    """An inference did not end in the time that it was given."""


class OutOfMemory(RuntimeFailure):
    """A model needs more memory than it was given."""
