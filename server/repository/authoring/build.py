"""Build everything a release consists of, in memory; nothing is published here."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.onnx import (
    BindError,
    ExportedGraph,
    Variant,
    bind_weights,
    single_file_size,
)
from prunecast.compression.release import (
    FileRef,
    InferenceSession,
    PatchRef,
    ReleaseManifest,
    Tolerance,
    open_session,
    pack_arrays,
)
from prunecast.compression.release.runtime import computes_in_integers, fit_inputs
from prunecast.compression.release.selftest import Arrays, check_outputs, decided
from prunecast.compression.versions import (
    InvalidModel,
    PublishedModel,
    encode_delta,
    encode_keyframe,
)
from prunecast.server.repository.errors import RepositoryError

__all__ = ["BuiltRelease", "ReleaseRequest", "build_release"]


@dataclass(frozen=True)
class ReleaseRequest:
    """What to release.

    Attributes:
        model: the weights.
        graph: the architecture.
        selftest_inputs: a few real inputs by name, or one array when the model has one input.
        metrics: figures measured on this very model, such as ``{"accuracy": 0.97}``.
        variant: ``lattice`` (integers and ``DequantizeLinear``) or ``fp32``.
        licence: SPDX expression of the weights, if stated.
        minimum_agent: lowest agent version that can run it.
        tolerance: of the self-test; default 1e-4 of the largest output and 1e-3 of each value,
            and for a graph that computes in integers twice what it differs from floats, too.
        kind: which variant of the model this is, in a word for people.
        numerics: how far it computes from the float32 reference.
    """

    model: PublishedModel
    graph: ExportedGraph
    selftest_inputs: Arrays | NDArray[np.generic]
    metrics: Mapping[str, float] = field(default_factory=dict)
    variant: Variant = "lattice"
    licence: str | None = None
    minimum_agent: str = "0.1.0"
    tolerance: Tolerance | None = None
    kind: str = ""
    numerics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BuiltRelease:
    """A release ready to be stored.

    Attributes:
        manifest: content of `release.json`.
        blobs: every file that travels, by SHA-256 (hex).
        onnx_bytes: size of the same model as one fp32 ``.onnx`` file; None above 2 GiB.
    """

    manifest: ReleaseManifest
    blobs: Mapping[str, bytes]
    onnx_bytes: int | None


def build_release(
    request: ReleaseRequest,
    *,
    name: str,
    version: int,
    created: str,
    bases: Iterable[tuple[int, PublishedModel]],
) -> BuiltRelease:
    """Bind the weights, run the self-test inputs, and code the keyframe and the patches.

    Args:
        request: what to release.
        name: name of the release.
        version: its number.
        created: UTC time, ISO 8601.
        bases: live releases that devices may hold: number and model.

    Raises:
        ReleaseError: the model does not fit the graph, or onnxruntime refuses it or its inputs.
        RepositoryError: the self-test inputs are unusable.
    """
    model, stream = request.model, name.encode()
    blobs: dict[str, bytes] = {}

    def keep(data: bytes) -> FileRef:
        ref = FileRef(hashlib.sha256(data).hexdigest(), len(data))
        blobs[ref.sha256] = data
        return ref

    with tempfile.TemporaryDirectory() as folder:
        bound = bind_weights(request.graph, model, Path(folder), variant=request.variant)
        session = open_session(bound.model)
        inputs = _inputs(session, request.selftest_inputs)
        expected = session.run(inputs)
        spread = _spread(bound.model, inputs, expected)
        files = {
            "model.onnx": keep(bound.model.read_bytes()),
            "layout.json": keep(bound.layout.to_bytes()),
            "selftest.npz": keep(pack_arrays(inputs)),
            "expected.npz": keep(pack_arrays(expected)),
        }
    keyframe = keep(encode_keyframe(model, stream=stream))
    patches = []
    for base_version, base in bases:
        if base.digest == model.digest:
            continue  # a device that holds the same model needs no payload
        try:
            patch = encode_delta(base, model, stream=stream)
        except InvalidModel:
            continue  # another architecture: devices take the keyframe
        if len(patch) < keyframe.length:
            patches.append(PatchRef(base_version, base.digest.hex(), keep(patch)))
    manifest = ReleaseManifest(
        name=name,
        version=version,
        created=created,
        model_digest=model.digest.hex(),
        counter=model.counter,
        variant=request.variant,
        inputs=session.inputs,
        outputs=session.outputs,
        files=files,
        weights=FileRef(bound.weights_sha256, bound.layout.size),
        keyframe=keyframe,
        patches=tuple(patches),
        tolerance=request.tolerance or _tolerance(expected, spread),
        metrics={key: float(value) for key, value in request.metrics.items()},
        licence=request.licence,
        minimum_agent=request.minimum_agent,
        kind=request.kind,
        numerics={key: float(value) for key, value in request.numerics.items()},
    )
    ReleaseManifest.from_bytes(manifest.to_bytes())  # what a device would refuse is refused here
    try:
        onnx_bytes = single_file_size(request.graph, model)
    except BindError:
        onnx_bytes = None
    return BuiltRelease(manifest, blobs, onnx_bytes)


def _inputs(
    session: InferenceSession, given: Arrays | NDArray[np.generic]
) -> dict[str, NDArray[np.generic]]:
    if not isinstance(given, Mapping):
        if len(session.inputs) != 1:
            names = ", ".join(s.name for s in session.inputs)
            raise RepositoryError(f"give the self-test inputs by name: {names}")
        given = {session.inputs[0].name: given}
    arrays = fit_inputs(given, {s.name: s.dtype for s in session.inputs})
    if not arrays or any(not a.size for a in arrays.values()):
        raise RepositoryError("a release needs at least one self-test input")
    return arrays


def _spread(model: Path, inputs: Arrays, expected: Arrays) -> float:
    """How far a graph's integer kernels compute from the same graph read in floats.

    Both are right. Where two processors round an activation differently, they differ by less.
    """
    if not computes_in_integers(model):
        return 0.0
    floats = open_session(model, integers=False).run(inputs)
    return check_outputs(expected, floats, Tolerance(np.finfo(np.float64).max, argmax=False))


def _tolerance(expected: Mapping[str, NDArray[np.generic]], spread: float) -> Tolerance:
    scale = 1.0
    for name, values in expected.items():
        if values.dtype.kind == "f" and values.size:
            if not np.isfinite(values).all():
                raise RepositoryError(f"output {name!r} is not finite on the self-test inputs")
            scale = max(scale, float(np.abs(values.astype(np.float64)).max()))
    atol = 1e-4 * scale + 2 * spread
    return Tolerance(atol=atol, rtol=1e-3, argmax=decided(expected, 2 * atol if spread else 0.0))
