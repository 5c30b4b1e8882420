"""What a release is to a device beside the model before pruning: counted, measured, estimated.

Zeros among other weights save bytes and nothing else: onnxruntime multiplies them like any number.
Fewer channels, heads and layers save bytes, operations and time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from prunecast.common.text import ratio_text
from prunecast.compression.onnx import BindError
from prunecast.compression.onnx.bind import bind_weights, single_file_size
from prunecast.compression.onnx.counting import count_graph
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.pruning.operations import FLOAT32, INT8, Kept, Operations
from prunecast.compression.release import ReleaseError
from prunecast.compression.release.selftest import Arrays
from prunecast.compression.release.timing import Inference, measure_inference
from prunecast.compression.versions import LatticeTensor, PublishedModel
from prunecast.server.repository.authoring.build import BuiltRelease, ReleaseContents
from prunecast.server.repository.authoring.variants import Samples, make_variant
from prunecast.server.repository.reading import RepositoryReader
from prunecast.server.repository.repository import PublishedRelease

__all__ = ["gain_notes", "gain_rows", "gains_of", "rehearse"]


def gains_of(
    made: ReleaseContents,
    samples: Samples | None = None,
    *,
    weights: PublishedModel,
    whole: tuple[ExportedGraph, PublishedModel] | None = None,
) -> dict[str, Any]:
    """Count and time a release and the model that it comes from, on this machine.

    Args:
        made: the release.
        samples: real inputs; with them the figures of int8 are those of ``int8-qdq``.
        weights: of the release, before they were quantised.
        whole: graph and weights with all channels, heads and layers; None where the release has
            all of them.

    Returns:
        ``before`` and ``after``, each with ``parameters``, ``nonzero``, ``macs``,
        ``effective_macs`` (without zeros: nothing here skips them), ``onnx_bytes`` (one fp32 file,
        None above 2 GiB), ``fp32`` and ``int8`` (None where nothing can be integers), each with
        ``ms``, ``per_second``, ``memory_bytes``, ``joules`` (measured; None where it is not) and
        ``estimated_joules``; ``int8``: which variant those figures are of; ``structured``;
        ``compression_ratio`` and ``efficiency``, see `Kept`.

    Raises:
        ReleaseError: onnxruntime refuses one of the models.
    """
    graph = made.exported or made.graph
    inputs = _named(graph, made.inputs)
    kind = "int8-qdq" if samples is not None or "int8-qdq" in made.kind else "int8"
    after = _figures(graph, weights, inputs, samples, made if kind in made.kind else None)
    # whole or not: before pruning there were the same operations and no zeros
    before = dict(after) if whole is None else _figures(*whole, inputs, samples)
    before |= {"nonzero": before["parameters"], "effective_macs": before["macs"]}
    kept = Kept(before["parameters"], after["parameters"], after["nonzero"])
    return {
        "before": before,
        "after": after,
        "int8": kind,
        "structured": whole is not None,
        "compression_ratio": kept.compression_ratio,
        "efficiency": kept.efficiency,
    }


def rehearse(
    reader: RepositoryReader, name: str, contents: ReleaseContents, *, at_least: int = 1
) -> PublishedRelease:
    """Everything that publishing would make, in memory: no key is needed, nothing is written.

    Args:
        reader: of the repository, for what devices hold.
        name: of the release.
        contents: what would be released.
        at_least: lowest number.

    Raises:
        RepositoryError, ReleaseError, VersionsError: it could not be published.
    """
    built = BuiltRelease(contents, name)
    live = [reader.show(name, entry.version) for entry in reader.releases() if entry.name == name]
    for base in live:
        if not built.starts_from(base.model_digest):
            built.add_patch(reader.model(base))
    version = max(at_least, 1 + max((base.version for base in live), default=0))
    manifest, _ = built.finish(version, datetime.now(UTC), live)
    return PublishedRelease(manifest, built.onnx_bytes, settings=built.settings)


def _figures(
    graph: ExportedGraph,
    weights: PublishedModel,
    inputs: Arrays,
    samples: Samples | None,
    made: ReleaseContents | None = None,
) -> dict[str, Any]:
    counted = count_graph(graph, weights, inputs)
    nonzero = _nonzero(graph, weights)
    parameters = sum(int(np.prod(spec.shape)) for spec in graph.parameters.values())
    plain = ReleaseContents(weights, graph, inputs, "fp32", kind="fp32")
    small = None
    with suppress(ReleaseError):  # nothing in it can be integers, or not with its opset
        if made is not None:
            small = _timed(replace(made, inputs=inputs))
        elif samples is not None:
            small = _timed(make_variant(plain, "int8-qdq", samples))
        elif any(isinstance(tensor, LatticeTensor) for tensor in weights.tensors.values()):
            small = _timed(replace(plain, variant="lattice"))
    try:
        size: int | None = single_file_size(graph, weights)
    except BindError:
        size = None
    return {
        "parameters": parameters,
        "nonzero": sum(nonzero.values()),
        "macs": counted.macs,
        "effective_macs": counted.effective(nonzero),
        "onnx_bytes": size,
        "fp32": _told(_timed(plain), FLOAT32.joules, counted, parameters),
        "int8": _told(small, INT8.joules, counted, parameters),
    }


def _timed(contents: ReleaseContents) -> Inference:
    with tempfile.TemporaryDirectory() as folder:
        bound = bind_weights(contents.graph, contents.model, Path(folder), variant=contents.variant)
        return measure_inference(bound.model, _named(contents.graph, contents.inputs))


def _told(
    measured: Inference | None, joules: Any, counted: Operations, parameters: int
) -> dict[str, float | None] | None:
    if measured is None:
        return None
    return {
        "ms": round(measured.milliseconds, 4),
        "per_second": round(measured.throughput, 2),
        "memory_bytes": measured.memory,
        "joules": measured.joules,
        "estimated_joules": joules(counted.macs, parameters, counted.activations),
    }


def _named(graph: ExportedGraph, inputs: Any) -> Arrays:
    if isinstance(inputs, Mapping):
        return inputs
    return {ModelProto.FromString(graph.skeleton).graph.input[0].name: inputs}


def _nonzero(graph: ExportedGraph, weights: PublishedModel) -> dict[str, int]:
    found = {}
    for name in graph.parameters:
        held = next((n for n in graph.names_of(name) if n in weights.tensors), None)
        if held is not None:
            tensor = weights[held]
            values = tensor.q if isinstance(tensor, LatticeTensor) else tensor.values
            found[name] = int(np.count_nonzero(values))
    return found


# -- for people -----------------------------------------------------------------------------------


def gain_rows(
    gains: Mapping[str, Any], full: int, patches: Mapping[str, int]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: what a device gains.

    Args:
        gains: of `gains_of`.
        full: bytes that a device without any release downloads.
        patches: bytes from each live release, by its number.
    """
    before, after = gains["before"], gains["after"]

    def row(what: str, was: float | None, now: float | None, text: str = ",.0f") -> list[str]:
        cells = ["–" if value is None else format(value, text) for value in (was, now)]
        return [what, *cells, ratio_text(was / now if was and now else None)]

    size = before["onnx_bytes"]
    rows = [row("bytes, the whole model", size, full)]
    rows += [row(f"bytes, patch from {base}", size, patch) for base, patch in patches.items()]
    for what, key in (
        ("parameters", "parameters"),
        ("parameters that are not zero", "nonzero"),
        ("operations (MACs)", "macs"),
    ):
        rows.append(row(what, before[key], after[key]))
    for name, which in (("fp32", "fp32"), (gains["int8"], "int8")):
        was, now = before[which], after[which]
        if was and now:
            rows.append(row(f"milliseconds, {name}", was["ms"], now["ms"], ".3f"))
            for what, key in (("≈ microjoules", "estimated_joules"), ("microjoules", "joules")):
                if was[key] and now[key]:
                    rows.append(row(f"{what}, {name}", 1e6 * was[key], 1e6 * now[key], ".1f"))
    return ["to a device", "before", "after", "gain"], rows


def gain_notes(gains: Mapping[str, Any]) -> list[str]:
    """What a reader of `gain_rows` must know, a sentence each."""
    after = gains["after"]
    zeros = after["parameters"] - after["nonzero"]
    notes = []
    if zeros:
        notes.append(
            f"{zeros:,} zeros lie among other weights: they save bytes alone, no operations and no "
            f"time; kernels that skip zeros would do {after['effective_macs']:,} MACs"
        )
    notes.append(
        "milliseconds are of one example in onnxruntime with one thread of this machine, median; "
        "≈ is estimated from operations and bytes, joules without it are RAPL's of this machine"
    )
    return notes
