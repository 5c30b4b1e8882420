"""Everything that a release consists of, built in memory.

What a release holds and what it is called are apart: binding the weights, running the self-test
and coding payloads take seconds to minutes, so they happen while others publish. Only `finish`
needs to know the release's number and which releases are live, and it takes no time.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.onnx import BindError
from prunecast.compression.onnx.bind import Variant, bind_weights, single_file_size
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.release.externals import check_externals
from prunecast.compression.release.manifest import (
    FileRef,
    PatchRef,
    ReleaseManifest,
    pack_file,
)
from prunecast.compression.release.runtime import (
    InferenceSession,
    Signature,
    computes_in_integers,
    fit_inputs,
    open_session,
)
from prunecast.compression.release.selftest import (
    Arrays,
    Tolerance,
    check_outputs,
    decided,
    pack_arrays,
)
from prunecast.compression.versions import (
    InvalidModel,
    PublishedModel,
    RawTensor,
    encode_delta,
    encode_keyframe,
)
from prunecast.server.repository.errors import RepositoryError

__all__ = [
    "BuiltRelease",
    "RecordedModel",
    "ReleaseContents",
    "bound_session",
    "check_names",
    "record_selftest",
]


@dataclass(frozen=True)
class ReleaseContents:
    """What a release holds; `ReleaseRecipe` makes it, whatever the model comes from.

    Attributes:
        model: the weights.
        graph: the architecture.
        inputs: a few real inputs by name, or one array when the model has one input.
        variant: ``lattice`` (integers and ``DequantizeLinear``) or ``fp32``.
        metrics: figures measured on this very model, such as ``{"accuracy": 0.97}``.
        licence: SPDX expression of the weights, if stated.
        minimum_agent: lowest agent version that can run it.
        tolerance: of the self-test; default 1e-4 of the largest output and 1e-3 of each value,
            and for a graph that computes in integers twice what it differs from floats, too.
        kind: which variant of the model this is, in a word for people.
        numerics: how far it computes from the float32 reference.
        notes: what a user should know, a sentence each; not part of the release.
        exported: the architecture before it was quantised, for another time.
        recorded: what the model answered to its self-test, where it has been run elsewhere.
        gains: what it is to a device beside the whole model, see `gains_of`; empty: not measured.
    """

    model: PublishedModel
    graph: ExportedGraph
    inputs: Arrays | NDArray[np.generic]
    variant: Variant = "lattice"
    metrics: Mapping[str, float] = field(default_factory=dict)
    licence: str | None = None
    minimum_agent: str = "0.1.0"
    tolerance: Tolerance | None = None
    kind: str = ""
    numerics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    exported: ExportedGraph | None = None
    recorded: RecordedModel | None = None
    gains: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class RecordedModel:
    """What a model answered to its self-test.

    Attributes:
        inputs: by name, in the model's dtypes.
        expected: outputs by name.
        tolerance: how far a device may be off.
        takes: what the model takes.
        gives: what it gives.
        settings: of onnxruntime's session, see `InferenceSession.settings`.
    """

    inputs: Arrays
    expected: Arrays
    tolerance: Tolerance
    takes: tuple[Signature, ...]
    gives: tuple[Signature, ...]
    settings: Mapping[str, str] = field(default_factory=dict)


class BuiltRelease:
    """A release that only lacks its number: weights bound, self-test run, keyframe coded.

    Args:
        contents: what to release.
        name: of the release.

    Attributes:
        onnx_bytes: size of the same model as one fp32 ``.onnx`` file; None above 2 GiB.
        settings: of onnxruntime's session, with which the self-test was recorded.

    Raises:
        ReleaseError: the model does not fit the graph, or onnxruntime refuses it or its inputs.
        RepositoryError: the self-test inputs are unusable.
    """

    def __init__(self, contents: ReleaseContents, name: str) -> None:
        self._contents, self._name = contents, name
        self._blobs: dict[str, bytes] = {}
        model = contents.model
        with tempfile.TemporaryDirectory() as folder:
            bound = bind_weights(contents.graph, model, Path(folder), variant=contents.variant)
            recorded = contents.recorded or _record(bound.model, contents)
            self.settings = recorded.settings
            graph = bound.model.read_bytes()
            # what a device would refuse is refused here
            check_externals(graph, file="weights.bin", size=bound.layout.size)
            files = {
                "model.onnx": self._keep_packed(graph),
                "layout.json": self._keep_packed(bound.layout.to_bytes()),
                "selftest.npz": self._keep(pack_arrays(recorded.inputs)),
                "expected.npz": self._keep(pack_arrays(recorded.expected)),
            }
        self._unnumbered = ReleaseManifest(
            name=name,
            version=1,
            created="",
            model_digest=model.digest.hex(),
            counter=model.counter,
            variant=contents.variant,
            inputs=recorded.takes,
            outputs=recorded.gives,
            files=files,
            weights=FileRef(bound.weights_sha256, bound.layout.size),
            keyframe=self._keep(encode_keyframe(model, stream=name.encode(), thorough=True)),
            patches=(),
            tolerance=recorded.tolerance,
            metrics={key: float(value) for key, value in contents.metrics.items()},
            licence=contents.licence,
            minimum_agent=contents.minimum_agent,
            kind=contents.kind,
            numerics={key: float(value) for key, value in contents.numerics.items()},
        )
        ReleaseManifest.from_bytes(self._unnumbered.to_bytes())
        # a device that holds the same model needs no payload
        self._patches: dict[str, FileRef | None] = {self._unnumbered.model_digest: None}
        try:
            self.onnx_bytes: int | None = single_file_size(contents.graph, model)
        except BindError:
            self.onnx_bytes = None

    def starts_from(self, digest: str) -> bool:
        """Whether the payload from a model, by its digest (hex), has been coded."""
        return digest in self._patches

    def add_patch(self, base: PublishedModel) -> None:
        """Code the payload for devices that hold `base`, unless the keyframe is smaller."""
        digest = base.digest.hex()
        self._patches[digest] = None
        try:
            data = encode_delta(base, self._contents.model, stream=self._name.encode())
        except InvalidModel:
            return  # another architecture: devices take the keyframe
        if len(data) < self._unnumbered.keyframe.length:
            self._patches[digest] = self._keep(data)

    def finish(
        self, version: int, now: datetime, live: Iterable[ReleaseManifest]
    ) -> tuple[ReleaseManifest, dict[str, bytes]]:
        """The manifest, and every file that travels by its SHA-256 (hex).

        Args:
            version: number of the release.
            now: the time, UTC.
            live: releases that devices may hold; the payloads from them have been coded.
        """
        patches = tuple(
            PatchRef(base.version, base.model_digest, file)
            for base in live
            if (file := self._patches[base.model_digest]) is not None
        )
        created = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        manifest = replace(self._unnumbered, version=version, created=created, patches=patches)
        ReleaseManifest.from_bytes(manifest.to_bytes())
        refs = manifest.references().values()
        return manifest, {ref.sha256: self._blobs[ref.sha256] for ref in refs}

    def _keep_packed(self, data: bytes) -> FileRef:
        packed = pack_file(data)
        if packed is None:
            return self._keep(data)
        sha256 = hashlib.sha256(data).hexdigest()
        return FileRef(sha256, len(data), self._keep(packed))

    def _keep(self, data: bytes) -> FileRef:
        ref = FileRef(hashlib.sha256(data).hexdigest(), len(data))
        self._blobs[ref.sha256] = data
        return ref


@contextmanager
def bound_session(
    graph: ExportedGraph, model: PublishedModel, variant: Variant
) -> Iterator[InferenceSession]:
    """What a graph computes with the weights of a model.

    Raises:
        ReleaseError: they do not fit together, or onnxruntime refuses them.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield open_session(bind_weights(graph, model, Path(folder), variant=variant).model)


def record_selftest(contents: ReleaseContents) -> RecordedModel:
    """Run the model of a release, as a device will.

    Raises:
        ReleaseError: the model does not fit the graph, or onnxruntime refuses it or its inputs.
        RepositoryError: the self-test inputs are unusable.
    """
    with tempfile.TemporaryDirectory() as folder:
        bound = bind_weights(contents.graph, contents.model, Path(folder), variant=contents.variant)
        return _record(bound.model, contents)


def _record(model: Path, contents: ReleaseContents) -> RecordedModel:
    session = open_session(model)
    inputs = _inputs(session, contents.inputs)
    expected = session.run(inputs)
    broken = next((n for n, a in expected.items() if _not_finite(a)), None)
    if broken is not None and contents.tolerance is None:
        reason = "correct the inputs, or train the model again"
        for name, tensor in contents.model.tensors.items():
            if isinstance(tensor, RawTensor) and _not_finite(tensor.values):
                reason = f"its tensor {name!r} is not finite either: release another checkpoint"
                break
        raise RepositoryError(f"output {broken!r} is not finite on the self-test inputs: {reason}")
    tolerance = contents.tolerance or _tolerance(expected, _spread(model, inputs, expected))
    return RecordedModel(
        inputs, expected, tolerance, session.inputs, session.outputs, dict(session.settings)
    )


def check_names(session: InferenceSession, given: Arrays) -> None:
    """Compare the names of arrays with those of a model's inputs.

    Raises:
        RepositoryError: they are others.
    """
    wanted = [s.name for s in session.inputs]
    if set(given) != set(wanted):
        call = ", ".join(f"{name}=..." for name in wanted)
        raise RepositoryError(
            f"the model takes the inputs {wanted}, the self-test holds {list(given)}: name its "
            f"arrays so, as numpy.savez(file, {call}) does"
        )


def _inputs(
    session: InferenceSession, given: Arrays | NDArray[np.generic]
) -> dict[str, NDArray[np.generic]]:
    if not isinstance(given, Mapping):
        if len(session.inputs) != 1:
            names = ", ".join(s.name for s in session.inputs)
            raise RepositoryError(f"give the self-test inputs by name: {names}")
        given = {session.inputs[0].name: given}
    if given:
        check_names(session, given)
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


def _not_finite(values: NDArray[np.generic]) -> bool:
    return values.dtype.kind == "f" and not np.isfinite(values).all()


def _tolerance(expected: Mapping[str, NDArray[np.generic]], spread: float) -> Tolerance:
    scale = 1.0
    for values in expected.values():
        if values.dtype.kind == "f" and values.size:
            scale = max(scale, float(np.abs(values.astype(np.float64)).max()))
    atol = 1e-4 * scale + 2 * spread
    return Tolerance(atol=atol, rtol=1e-3, argmax=decided(expected, 2 * atol if spread else 0.0))
