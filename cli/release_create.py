"""`prunecast release create`: the next release, from a checkpoint or from an ``.onnx`` file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.console import make_console
from prunecast.cli.release_options import AsJson, Folder, Keys, Name, show_result

if TYPE_CHECKING:
    import torch

    from prunecast.compression.onnx import ExportedGraph
    from prunecast.compression.versions import PublishedModel
    from prunecast.server.releases import Repository

__all__ = ["create"]


@dataclass
class _Source:
    """What is released, however it was given."""

    model: PublishedModel
    graph: ExportedGraph
    inputs: Any
    variant: str
    metrics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def create(
    repository: Folder,
    name: Name,
    keys: Keys,
    model: Annotated[
        Path | None,
        typer.Option(help="Saved published model, or a .safetensors or .npz checkpoint."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Any .onnx file, with its weights, instead of --model and a graph."
        ),
    ] = None,
    selftest: Annotated[
        Path | None,
        typer.Option(
            help=".npz with a few real inputs, one array per input of the model; with --from, "
            "drawn inputs take their place."
        ),
    ] = None,
    module: Annotated[
        str | None,
        typer.Option(help="Torch module as package.module:factory; exported to a graph."),
    ] = None,
    graph: Annotated[Path | None, typer.Option(help="Exported graph, instead of --module.")] = None,
    save_graph_to: Annotated[
        Path | None, typer.Option("--save-graph", help="Keep the graph for next time.")
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            help="Put dense weights on a lattice of so many bits; without it they stay exact.",
            min=2,
            max=16,
        ),
    ] = None,
    steps: Annotated[
        str,
        typer.Option(
            help="With --from, how lattice steps are chosen: held (as the newest live release has "
            "them, for small patches), range or error."
        ),
    ] = "held",
    most_difference: Annotated[
        float | None,
        typer.Option(
            "--max-difference",
            help="With --from, publish nothing if outputs differ by more, of the largest value.",
            min=0.0,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of drawn self-test inputs.", min=0)] = 0,
    variant: Annotated[str, typer.Option(help="Weights on the device: lattice or fp32.")] = (
        "lattice"
    ),
    metric: Annotated[
        list[str] | None, typer.Option(help="name=value, measured on this very model.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="SPDX expression of the weights.")] = None,
    window: Annotated[int, typer.Option(help="How many releases stay live.", min=1)] = 16,
    export: Annotated[
        Path | None, typer.Option(help="Write what was published as a single .onnx file, too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Publish a model as the next release: keyframe, patches from live releases, self-test."""
    from prunecast.compression.onnx import save_graph
    from prunecast.server.releases import KeyRing, Repository, export_release

    if variant not in ("lattice", "fp32"):
        raise typer.BadParameter("must be lattice or fp32", param_hint="--variant")
    metrics = dict(map(_metric, metric or []))
    target = Repository(repository, KeyRing(*keys), window=window)
    if source is not None:
        if (model, module, graph) != (None, None, None):
            raise typer.BadParameter("--from has graph and weights: no --model, --module, --graph")
        made = _from_onnx(
            target, name, source, selftest, bits, steps, variant, seed, most_difference
        )
    else:
        made = _from_checkpoint(model, selftest, module, graph, bits, variant)
    if save_graph_to:
        save_graph(made.graph, save_graph_to)
    published = target.publish(
        name,
        made.model,
        made.graph,
        selftest_inputs=made.inputs,
        metrics={**made.metrics, **metrics},
        variant=made.variant,  # type: ignore[arg-type]
        licence=licence,
    )
    result = {
        "name": published.name,
        "version": published.version,
        "onnx_bytes": published.onnx_bytes,
        "weights_bytes": published.weights_bytes,
        "keyframe_bytes": published.keyframe_bytes,
        "patch_bytes": {str(base): size for base, size in published.patch_bytes.items()},
        "file_bytes": dict(published.file_bytes),
        "retired": list(published.retired),
    }
    if source is not None:
        result |= {"variant": made.variant, "notes": list(made.notes), **made.metrics}
    if export is not None:
        result["exported_bytes"] = export_release(target, published.manifest, export)
    show_result(result, as_json, lambda: _created(result))


def _from_checkpoint(
    model: Path | None,
    selftest: Path | None,
    module: str | None,
    graph: Path | None,
    bits: int | None,
    variant: str,
) -> _Source:
    from prunecast.compression.onnx import unpack_arrays
    from prunecast.server.releases import read_checkpoint

    if model is None or selftest is None:
        raise typer.BadParameter("give --model and --selftest, or an .onnx file with --from")
    if (module is None) == (graph is None):
        raise typer.BadParameter("give either --module or --graph")
    weights = read_checkpoint(model, bits=bits)
    inputs = unpack_arrays(selftest.read_bytes())
    return _Source(weights, _graph(module, graph, inputs), inputs, variant)


def _from_onnx(
    target: Repository,
    name: str,
    source: Path,
    selftest: Path | None,
    bits: int | None,
    steps: str,
    variant: str,
    seed: int,
    most_difference: float | None,
) -> _Source:
    from prunecast.compression.onnx import unpack_arrays
    from prunecast.compression.onnx.lattice import STEPS
    from prunecast.server.releases import from_onnx

    if steps not in STEPS:
        raise typer.BadParameter(f"must be {', '.join(STEPS)}", param_hint="--steps")
    live = [e for e in target.releases() if e.name == name]
    held = target.model(target.show(name)) if live else None
    with make_console(stderr=True).status(f"reading {source}"):
        made = from_onnx(
            source,
            bits=bits,
            steps=steps,
            variant=variant,  # type: ignore[arg-type]
            held=held,
            inputs=unpack_arrays(selftest.read_bytes()) if selftest else None,
            seed=seed,
            most_difference=most_difference,
        )
    return _Source(made.model, made.graph, made.inputs, made.variant, made.metrics, made.notes)


def _metric(text: str) -> tuple[str, float]:
    name, sep, value = text.partition("=")
    try:
        if sep and name:
            return name, float(value)
    except ValueError:
        pass
    raise typer.BadParameter(f"{text!r} is not name=value", param_hint="--metric")


def _graph(module: str | None, graph: Path | None, inputs: dict[str, Any]) -> ExportedGraph:
    from prunecast.compression.onnx import load_graph

    if graph is not None:
        return load_graph(graph)
    import torch

    from prunecast.compression.onnx import export_graph

    examples = tuple(torch.from_numpy(values.copy()) for values in inputs.values())
    with make_console(stderr=True).status(f"exporting {module}"):
        return export_graph(_module(str(module)), examples, input_names=list(inputs))


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


def _created(result: dict[str, Any]) -> str:
    lines = [f"{result['name']} {result['version']} is live"]
    if result["onnx_bytes"]:
        lines.append(f"one fp32 .onnx file   {result['onnx_bytes']:>12,} bytes")
    if "exported_bytes" in result:
        lines.append(f"exported .onnx file   {result['exported_bytes']:>12,} bytes")
    lines.append(f"keyframe              {result['keyframe_bytes']:>12,} bytes")
    for base, size in result["patch_bytes"].items():
        lines.append(f"patch from {base:<10} {size:>13,} bytes")
    if "onnx_max_difference" in result:
        lines.append(
            f"outputs differ from the original by at most {result['onnx_max_difference']:.3g}, "
            f"{result['onnx_relative_difference']:.2%} of the largest value; "
            f"{result['onnx_classes_changed']:.2%} of the classes change"
        )
    lines += [f"note: {note}" for note in result.get("notes", ())]
    return "\n".join(lines)
