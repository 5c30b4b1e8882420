"""What `prunecast release create` publishes, made of the files that it is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from prunecast.cli.console import make_console

if TYPE_CHECKING:
    import torch

    from prunecast.compression.onnx import ExportedGraph
    from prunecast.compression.versions import PublishedModel
    from prunecast.server.repository import Repository
    from prunecast.server.repository.authoring import Samples

__all__ = ["Chosen", "Source", "from_checkpoint", "from_file"]

_SELFTEST = 4  # samples, where nothing else is given


@dataclass(frozen=True)
class Chosen:
    """The options of the command, as they were given."""

    name: str
    variant: str
    model: Path | None
    source: Path | None
    selftest: Path | None
    calibration: Path | None
    module: str | None
    graph: Path | None
    graph_cache: Path | None
    bits: int | None
    steps: str
    channels: float | None
    most_difference: float | None
    seed: int


@dataclass
class Source:
    """What is released, however it was given; `exported` is the graph for another time."""

    model: PublishedModel
    graph: ExportedGraph
    exported: ExportedGraph
    inputs: Any
    variant: str
    kind: str
    metrics: dict[str, float] = field(default_factory=dict)
    numerics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def from_checkpoint(target: Repository, chosen: Chosen) -> Source:
    """Weights from a checkpoint, the graph from a torch module or a file."""
    from prunecast.compression.release import unpack_arrays
    from prunecast.compression.versions import LatticeTensor
    from prunecast.server.repository.authoring import (
        from_arrays,
        make_variant,
        read_checkpoint,
        reference_outputs,
    )

    if chosen.model is None or (chosen.selftest is None and chosen.calibration is None):
        raise typer.BadParameter(
            "give --model and --selftest (or --calibration), or an .onnx file with --from"
        )
    if (chosen.module is None) == (chosen.graph is None):
        raise typer.BadParameter("give either --module or --graph")
    samples = _samples(chosen)
    if chosen.selftest is not None:
        inputs = unpack_arrays(chosen.selftest.read_bytes())
    else:
        assert samples is not None
        inputs = {name: a[:_SELFTEST] for name, a in samples.inputs.items()}
    held, held_graph = _held(target, chosen.name)
    exact = read_checkpoint(chosen.model)
    if chosen.graph is not None:
        parts = _from_graph(chosen.graph, exact, _share(chosen))
    else:
        parts = _from_module(exact, inputs, samples, chosen, held_graph)
    weights = parts.weights
    if parts.reference is None and samples is not None:
        parts.reference = reference_outputs(parts.graph, weights.arrays(), samples)
    if chosen.bits is not None:
        if any(isinstance(t, LatticeTensor) for t in exact.tensors.values()):
            raise typer.BadParameter(f"{chosen.model} is on a lattice already", param_hint="--bits")
        steps = _steps(chosen.steps)
        weights = from_arrays(weights.arrays(), bits=chosen.bits, steps=steps, held=held)
    kind = {"structured": "int8", "lattice": "int8"}.get(chosen.variant, chosen.variant)
    made = make_variant(
        kind,  # type: ignore[arg-type]
        weights,
        parts.graph,
        samples,
        reference=parts.reference,
        held=held,
    )
    label = made.kind
    if parts.narrow:
        label = "structured" if label != "int8-qdq" else "structured int8-qdq"
    return Source(
        made.model,
        made.graph,
        parts.graph,
        inputs,
        made.variant,
        label,
        numerics=dict(made.numerics),
        notes=(*parts.notes, *made.notes),
    )


@dataclass
class _Parts:
    """A graph, its weights before they are quantised, and what to compare with."""

    graph: ExportedGraph
    weights: PublishedModel
    narrow: bool = False
    reference: Any = None
    notes: tuple[str, ...] = ()


def _from_graph(path: Path, exact: PublishedModel, share: float | None) -> _Parts:
    from prunecast.compression.onnx import load_graph
    from prunecast.server.repository.authoring import plan_of

    graph = load_graph(path)
    plan = plan_of(graph.skeleton)
    if plan is None:
        if share is not None:
            raise typer.BadParameter(f"{path} has all channels: give --module")
        return _Parts(graph, exact)
    if share not in (None, plan.share):
        raise typer.BadParameter(f"{path} has {plan.share:.0%} of the channels, not {share:.0%}")
    notes = (
        f"{plan.share:.0%} of the channels remain, as {path} says",
        "numerics compare with the same channels in float32: give --module to compare with all",
    )
    return _Parts(graph, plan.narrow(exact), narrow=True, notes=notes)


def _from_module(
    exact: PublishedModel,
    inputs: dict[str, Any],
    samples: Samples | None,
    chosen: Chosen,
    held_graph: bytes | None,
) -> _Parts:
    from prunecast.compression.onnx.cache import default_cache, export_cached
    from prunecast.server.repository.authoring import (
        make_narrow,
        module_outputs,
        plan_of,
        with_weights,
    )

    share, cache = _share(chosen), chosen.graph_cache or default_cache()
    wide = with_weights(_module(str(chosen.module)), exact)
    examples = _examples(wide, inputs)
    with make_console(stderr=True).status(f"exporting {chosen.module}"):
        if share is None:
            graph, found = export_cached(wide, tuple(examples.values()), list(examples), cache)
            return _Parts(graph, exact, notes=("the graph was exported before",) if found else ())
        held = plan_of(held_graph) if held_graph else None
        made = make_narrow(wide, examples, share, held=held, cache=cache)
    which = "as in the newest release" if made.held else "chosen by the norm of their groups"
    parts = _Parts(
        made.graph,
        made.plan.narrow(exact),
        narrow=True,
        notes=(f"{share:.0%} of the channels remain, {which}",),
    )
    if samples is not None:
        given = {n: x.numpy() for n, x in _examples(wide, dict(samples.inputs)).items()}
        parts.reference = module_outputs(wide, given, _output_names(made.graph))
    return parts


def from_file(target: Repository, chosen: Chosen) -> Source:
    """Weights and graph from an ``.onnx`` file."""
    from prunecast.compression.release import unpack_arrays
    from prunecast.server.repository.authoring import from_onnx, make_variant, run_original

    if (chosen.model, chosen.module, chosen.graph) != (None, None, None):
        raise typer.BadParameter("--from has graph and weights: no --model, --module, --graph")
    if _share(chosen) is not None:
        raise typer.BadParameter("channels are removed from a torch module: give --module")
    assert chosen.source is not None
    held, _ = _held(target, chosen.name)
    samples = _samples(chosen)
    inputs = unpack_arrays(chosen.selftest.read_bytes()) if chosen.selftest else None
    if inputs is None and samples is not None:
        inputs = {name: a[:_SELFTEST] for name, a in samples.inputs.items()}
    with make_console(stderr=True).status(f"reading {chosen.source}"):
        made = from_onnx(
            chosen.source,
            bits=chosen.bits,
            steps=_steps(chosen.steps),
            variant="fp32" if chosen.variant == "fp32" else "lattice",
            held=held,
            inputs=inputs,
            seed=chosen.seed,
            most_difference=chosen.most_difference,
        )
    kind = made.kind if chosen.variant != "int8-qdq" else "int8-qdq"
    source = Source(
        made.model,
        made.graph,
        made.graph,
        made.inputs,
        made.variant,
        kind,
        made.metrics,
        notes=made.notes,
    )
    if samples is not None or kind == "int8-qdq":
        reference = run_original(chosen.source, samples) if samples is not None else None
        variant = make_variant(
            kind,  # type: ignore[arg-type]
            made.model,
            made.graph,
            samples,
            reference=reference,
            held=held,
        )
        source.model, source.graph, source.numerics = (
            variant.model, variant.graph, dict(variant.numerics),
        )  # fmt: skip
        source.notes += variant.notes
        if kind == "int8-qdq":
            source.variant = variant.variant
    return source


def _samples(chosen: Chosen) -> Samples | None:
    from prunecast.compression.release import unpack_arrays
    from prunecast.server.repository.authoring import split_samples

    if chosen.calibration is None:
        return None
    return split_samples(unpack_arrays(chosen.calibration.read_bytes(), max_bytes=2**33))


def _held(target: Repository, name: str) -> tuple[PublishedModel | None, bytes | None]:
    """Model and graph of the newest live release."""
    if not any(entry.name == name for entry in target.releases()):
        return None, None
    manifest = target.show(name)
    return target.model(manifest), target.blob(manifest.files["model.onnx"])


def _share(chosen: Chosen) -> float | None:
    if chosen.channels is None and chosen.variant == "structured":
        return 0.5
    return chosen.channels


def _steps(text: str) -> Any:
    from prunecast.compression.onnx.lattice import STEPS

    if text not in STEPS:
        raise typer.BadParameter(f"must be {', '.join(STEPS)}", param_hint="--steps")
    return text


def _output_names(graph: ExportedGraph) -> tuple[str, ...]:
    import onnx

    return tuple(o.name for o in onnx.ModelProto.FromString(graph.skeleton).graph.output)


def _examples(module: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Inputs as tensors; floats in the dtype of the module's own, whatever the file holds."""
    import numpy as np
    import torch

    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    tensors = {name: torch.from_numpy(np.array(values)) for name, values in inputs.items()}
    return {n: t.to(own) if t.is_floating_point() else t for n, t in tensors.items()}


def _module(path: str) -> torch.nn.Module:
    import sys
    from importlib import import_module

    import torch

    package, _, factory = path.partition(":")
    if not package or not factory:
        raise typer.BadParameter(f"{path!r} is not package.module:factory", param_hint="--module")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in the current folder, as `python -m` finds it
    try:
        made = getattr(import_module(package), factory)()
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(str(error), param_hint="--module") from error
    if not isinstance(made, torch.nn.Module):
        raise typer.BadParameter(f"{path} made no torch module", param_hint="--module")
    return made
