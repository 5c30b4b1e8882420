"""Variants of a model, and how far each is from float32 on real samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.onnx.bind import Variant
from prunecast.compression.onnx.calibration import batches
from prunecast.compression.onnx.compare import differ
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.onnx.qdq import quantise
from prunecast.compression.release.runtime import InferenceSession, fit_inputs
from prunecast.compression.release.selftest import Arrays
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor
from prunecast.server.repository.authoring.build import ReleaseContents, bound_session
from prunecast.server.repository.errors import RepositoryError

__all__ = ["Samples", "make_variant", "reference_outputs", "run_samples", "split_samples"]

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
    ``reference_accuracy``; ``export_difference`` is a power of ten that the graph was off the torch
    module by at most when it was exported.

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
    numerics = {"export_difference": _at_most(graph.max_difference)}
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


def _at_most(difference: float) -> float:
    """The next power of ten: further digits follow threads, and would change a release's bytes."""
    return 10.0 ** math.ceil(math.log10(difference)) if 0 < difference < math.inf else difference
