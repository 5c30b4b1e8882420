"""Variants of a release, and how far each computes from the float32 reference.

============== ===================================================== ==========================
kind           the device computes                                   its weights
============== ===================================================== ==========================
``fp32``       in floats                                             float32 in `weights.bin`
``int8``       in floats, the same values                            the published integers
``int8-qdq``   convolutions and linear layers in integers            the published integers
``structured`` ``int8`` on fewer channels, see `structured`          the published integers
============== ===================================================== ==========================

A variant is a release of its own name: a device follows one of them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.onnx import (
    ExportedGraph,
    Variant,
    bind_weights,
    quantise,
    read_note,
    with_note,
)
from prunecast.compression.onnx.calibration import batches
from prunecast.compression.onnx.compare import differ
from prunecast.compression.pruning import ChannelPlan, PlanError
from prunecast.compression.release import InferenceSession, open_session
from prunecast.compression.release.runtime import fit_inputs
from prunecast.compression.release.selftest import Arrays
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor
from prunecast.server.repository.errors import RepositoryError

if TYPE_CHECKING:
    import torch

__all__ = [
    "KINDS",
    "Kind",
    "Narrowed",
    "Samples",
    "VariantRelease",
    "make_narrow",
    "make_variant",
    "module_outputs",
    "plan_of",
    "reference_outputs",
    "run_samples",
    "split_samples",
    "with_weights",
]

Kind = Literal["fp32", "int8", "int8-qdq"]
KINDS: tuple[Kind, ...] = get_args(Kind)
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


@dataclass(frozen=True)
class VariantRelease:
    """What `Repository.publish` takes.

    Attributes:
        model: the weights.
        graph: the architecture.
        variant: what `weights.bin` holds.
        kind: the variant.
        numerics: how far it computes from the reference; see `make_variant`.
        notes: what a user should know, a sentence each.
    """

    model: PublishedModel
    graph: ExportedGraph
    variant: Variant
    kind: str
    numerics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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
    kind: Kind,
    model: PublishedModel,
    graph: ExportedGraph,
    samples: Samples | None,
    *,
    reference: Arrays | None = None,
    held: PublishedModel | None = None,
) -> VariantRelease:
    """Make a variant of a model and measure it.

    The numerics are, over all samples: ``samples`` (how many), ``max_difference`` (largest absolute
    difference of an output), ``relative_difference`` (that over the output's largest value),
    ``classes_changed`` (share of argmax decisions), and with labels ``accuracy`` and
    ``reference_accuracy``; ``export_difference`` is what the graph was off the torch module by
    when it was exported.

    Args:
        kind: which.
        model: the weights.
        graph: the architecture.
        samples: what is measured on; ``int8-qdq`` cannot be made without.
        reference: outputs to compare with, for all samples; default those of `graph` with the
            values of `model` in float32.
        held: the newest live version of this variant, whose scales are kept where they fit.

    Raises:
        RepositoryError: an unknown kind, or no samples where they are needed.
        ReleaseError: model, graph and samples do not fit together.
    """
    if kind not in KINDS:
        raise RepositoryError(f"variants are {', '.join(KINDS)}, not {kind!r}")
    notes: list[str] = []
    variant: Variant = "fp32" if kind == "fp32" else "lattice"
    label: str = kind
    if kind == "int8" and not any(isinstance(t, LatticeTensor) for t in model.tensors.values()):
        notes.append("no tensor is on a lattice: weights.bin holds float32 (see --bits)")
        label = "fp32"
    if samples is not None:
        wanted = _inputs(graph)
        samples = Samples(fit_inputs(samples.inputs, wanted), samples.labels)
        if reference is None:
            reference = reference_outputs(graph, model.arrays(), samples)
    if kind == "int8-qdq":
        if samples is None:
            raise RepositoryError("int8-qdq measures activations: give samples (--calibration)")
        made = quantise(graph, model, samples.inputs, held=held)
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
    return VariantRelease(model, graph, variant, label, numerics, tuple(notes))


def _inputs(graph: ExportedGraph) -> dict[str, str]:
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
    with tempfile.TemporaryDirectory() as folder:
        bound = bind_weights(graph, exact, Path(folder), variant="fp32")
        return run_samples(open_session(bound.model), samples)


def _measure(
    model: PublishedModel,
    graph: ExportedGraph,
    variant: Variant,
    reference: Arrays,
    samples: Samples,
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        bound = bind_weights(graph, model, Path(folder), variant=variant)
        outputs = run_samples(open_session(bound.model), samples)
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


_NOTE = "prunecast.channels"
_BATCH = 32


@dataclass(frozen=True)
class Narrowed:
    """A network on fewer channels.

    Attributes:
        plan: which remain.
        graph: the smaller architecture; the plan travels in it, for the versions to come.
        held: whether the plan is that of the newest live release.
    """

    plan: ChannelPlan
    graph: ExportedGraph
    held: bool


def plan_of(graph: bytes) -> ChannelPlan | None:
    """The plan that a graph was narrowed by; None for any other graph.

    Raises:
        PlanError: it is damaged.
    """
    text = read_note(graph, _NOTE)
    return None if text is None else ChannelPlan.from_text(text)


def with_weights(module: torch.nn.Module, model: PublishedModel) -> torch.nn.Module:
    """A copy of a module, in evaluation mode, with the values of a model.

    Raises:
        RepositoryError: the model does not fit the module.
    """
    import torch

    copied = copy.deepcopy(module).eval()
    state = {name: torch.from_numpy(np.array(a)) for name, a in model.arrays().items()}
    try:
        copied.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise RepositoryError(
            f"the model does not fit {type(module).__name__}: {reason}"
        ) from error
    return copied


def make_narrow(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    share: float,
    *,
    held: ChannelPlan | None = None,
    cache: Path,
) -> Narrowed:
    """Choose channels, or keep to the choice that devices hold, and export what remains.

    Args:
        module: with weights, in evaluation mode.
        inputs: examples by name, in the order of the module's arguments.
        share: of the channels that remain.
        held: the plan of the newest live release; used if it is for the same share and fits.
        cache: folder of exported graphs.

    Raises:
        PlanError: channels of this module cannot be removed.
        ExportError: what remains cannot be exported.
    """
    from prunecast.compression.onnx.cache import export_cached
    from prunecast.compression.pruning.narrowing import choose_channels, narrow_module

    example = tuple(inputs.values())
    narrow = None
    if held is not None and held.share == share:
        try:
            narrow = narrow_module(module, example, held)
        except PlanError:
            narrow = None  # another architecture: choose anew
    plan = held if narrow is not None and held is not None else None
    if plan is None:
        plan = choose_channels(module, example, share)
    if narrow is None:
        narrow = narrow_module(module, example, plan)
    graph, _ = export_cached(narrow, example, list(inputs), cache)
    return Narrowed(plan, with_note(graph, _NOTE, plan.to_text()), plan is held)


def module_outputs(
    module: torch.nn.Module, inputs: Arrays, names: tuple[str, ...]
) -> dict[str, NDArray[np.generic]]:
    """Outputs of a torch module for all samples, by the names that its graph gives them."""
    import torch

    count = len(next(iter(inputs.values())))
    parts = []
    with torch.no_grad():
        for start in range(0, count, _BATCH):
            part = [torch.from_numpy(np.array(a[start : start + _BATCH])) for a in inputs.values()]
            made = module(*part)
            parts.append(list(made) if isinstance(made, tuple | list) else [made])
    return {
        name: np.concatenate([np.atleast_1d(part[i].numpy()) for part in parts])
        for i, name in enumerate(names)
    }
