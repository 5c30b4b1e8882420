"""Make a variant of a model, and build everything that its release consists of, in memory.

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
from prunecast.compression.onnx.calibration import batches
from prunecast.compression.onnx.compare import differ
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.onnx.qdq import quantise
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
    LatticeTensor,
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
    "Samples",
    "bound_session",
    "check_names",
    "make_variant",
    "record_selftest",
    "reference_outputs",
    "run_samples",
    "split_samples",
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


_LABELS = "labels"


@dataclass(frozen=True)
class Samples:
    """Real inputs, and what they are where that is known.

    Attributes:
        inputs: by name, the batch first.
        labels: class of each sample, shape (n,), or None.
    """

    inputs: Arrays
    labels: NDArray[np.integer] | None = None


def split_samples(arrays: Arrays) -> Samples:
    """Samples from a file's arrays: ``labels`` are the classes, everything else is an input.

    Raises:
        RepositoryError: labels that are not one integer a sample.
    """
    inputs = {name: np.asarray(a) for name, a in arrays.items() if name != _LABELS}
    labels: NDArray[Any] | None = np.asarray(arrays[_LABELS]) if _LABELS in arrays else None
    if labels is not None and (labels.dtype.kind not in "iu" or labels.ndim != 1):
        raise RepositoryError(
            f"{_LABELS} are one integer a sample, not {labels.dtype}{labels.shape}"
        )
    if labels is not None and any(len(a) != len(labels) for a in inputs.values() if a.ndim):
        raise RepositoryError(f"there are {len(labels)} labels, but not as many samples")
    return Samples(inputs, labels)


def make_variant(
    contents: ReleaseContents,
    kind: str,
    samples: Samples | None,
    *,
    reference: Arrays | None = None,
    held: PublishedModel | None = None,
) -> ReleaseContents:
    """Make a variant of what would be released and measure it.

    The numerics are, over all samples: ``samples`` (how many), ``max_difference`` (largest absolute
    difference of an output), ``relative_difference`` (that over the output's largest value),
    ``classes_changed`` (share of argmax decisions), and with labels ``accuracy`` and
    ``reference_accuracy``; ``export_difference`` is what the graph was off the torch module by
    when it was exported.

    Args:
        contents: weights and architecture.
        kind: ``fp32``, ``int8`` or ``int8-qdq``.
        samples: what is measured on; ``int8-qdq`` cannot be made without.
        reference: outputs to compare with, for all samples; None measures nothing.
        held: the newest live version of this variant, whose scales are kept where they fit.

    Raises:
        RepositoryError: no samples where they are needed.
        ReleaseError: model, graph and samples do not fit together.
    """
    model, graph, notes = contents.model, contents.graph, list(contents.notes)
    variant: Variant = "fp32" if kind == "fp32" else "lattice"
    if kind == "int8" and not any(isinstance(t, LatticeTensor) for t in model.tensors.values()):
        notes.append("no tensor is on a lattice: weights.bin holds float32 (see --bits)")
        kind = "fp32"
    if kind == "int8-qdq":
        if samples is None:
            raise RepositoryError("int8-qdq measures activations: give samples (--calibration)")
        made = quantise(graph, model, fit_inputs(samples.inputs, _input_types(graph)), held=held)
        notes.append(
            f"{made.kernels} weights compute in integers, {made.direct} of them as published; "
            f"{len(made.fresh)} of {made.activations} activation scales are new"
        )
        # What stays float is dequantised on disk: a session that fuses integers would otherwise
        # dequantise it at every inference.
        model, graph, variant = made.model, made.graph, "fp32"
    numerics = {"export_difference": graph.max_difference}
    if samples is not None and reference is not None:
        numerics |= _measure(model, graph, variant, reference, samples)
    return replace(
        contents,
        model=model,
        graph=graph,
        variant=variant,
        kind=kind,
        numerics=numerics,
        notes=tuple(notes),
    )


def _input_types(graph: ExportedGraph) -> dict[str, str]:
    import onnx
    from onnx import helper

    proto = onnx.ModelProto.FromString(graph.skeleton)
    return {
        i.name: np.dtype(helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type)).name
        for i in proto.graph.input
    }


def reference_outputs(
    graph: ExportedGraph, weights: Mapping[str, NDArray[Any]], samples: Samples
) -> dict[str, NDArray[np.generic]]:
    """Outputs of a graph with dense weights, in float32, for all samples."""
    exact = PublishedModel({name: RawTensor(values) for name, values in weights.items()})
    with bound_session(graph, exact, "fp32") as session:
        return run_samples(session, samples)


def _measure(
    model: PublishedModel,
    graph: ExportedGraph,
    variant: Variant,
    reference: Arrays,
    samples: Samples,
) -> dict[str, float]:
    with bound_session(graph, model, variant) as session:
        outputs = run_samples(session, samples)
    difference = differ(reference, outputs)
    first = next(iter(outputs))
    count = len(outputs[first]) if outputs[first].ndim else 1
    numerics = {
        "samples": float(count),
        "max_difference": difference.absolute,
        "relative_difference": difference.relative,
        "classes_changed": difference.classes,
    }
    if samples.labels is not None:
        numerics["accuracy"] = _accuracy(outputs[first], samples.labels)
        numerics["reference_accuracy"] = _accuracy(reference[first], samples.labels)
    return numerics


def run_samples(session: InferenceSession, samples: Samples) -> dict[str, NDArray[np.generic]]:
    """Outputs of a model for all samples, by name."""
    inputs = fit_inputs(samples.inputs, {s.name: s.dtype for s in session.inputs})
    shapes = {s.name: s.shape for s in session.inputs}
    parts = [session.run(part) for part in batches(inputs, shapes)]
    return {
        name: np.concatenate([np.atleast_1d(part[name]) for part in parts]) for name in parts[0]
    }


def _accuracy(outputs: NDArray[np.generic], labels: NDArray[np.integer]) -> float:
    if outputs.ndim != 2 or len(outputs) > len(labels):
        raise RepositoryError(
            f"labels need an output of one row of classes a sample, not {list(outputs.shape)}"
        )
    return float((outputs.argmax(axis=1) == labels[: len(outputs)]).mean())
