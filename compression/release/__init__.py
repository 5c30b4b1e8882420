"""What a device reads of a release: manifest, layout of the weights, self-test and runtime.

Needs numpy and, to open a session, onnxruntime. What builds a release is `compression.onnx`.
"""

from prunecast.compression.release.errors import (
    InputRefused,
    LayoutError,
    ManifestError,
    ReleaseError,
    RuntimeFailure,
    SelfTestFailed,
)
from prunecast.compression.release.layout import Segment, WeightsLayout
from prunecast.compression.release.manifest import FileRef, PatchRef, ReleaseManifest
from prunecast.compression.release.runtime import (
    InferenceSession,
    Signature,
    computes_in_integers,
    open_session,
)
from prunecast.compression.release.selftest import (
    Tolerance,
    check_outputs,
    pack_arrays,
    unpack_arrays,
)

__all__ = [
    "FileRef",
    "InferenceSession",
    "InputRefused",
    "LayoutError",
    "ManifestError",
    "PatchRef",
    "ReleaseError",
    "ReleaseManifest",
    "RuntimeFailure",
    "Segment",
    "SelfTestFailed",
    "Signature",
    "Tolerance",
    "WeightsLayout",
    "check_outputs",
    "computes_in_integers",
    "open_session",
    "pack_arrays",
    "unpack_arrays",
]
