"""`prunecast release create`: the next release, from a checkpoint or from an ``.onnx`` file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from prunecast.cli.console import AsJson, MaxBytes, MaxSeconds, make_console, show
from prunecast.common.references import load_callable

__all__ = ["Fleets", "Folder", "Keys", "Name", "create"]

Folder = Annotated[Path, typer.Argument(help="Folder of the release repository.")]
Keys = Annotated[
    list[Path],
    typer.Option(
        "--keys", help="Folder with private keys; give it twice if offline keys lie apart."
    ),
]
Name = Annotated[str, typer.Argument(help="Name of the release.")]
Fleets = Annotated[
    list[str] | None,
    typer.Option(
        "--fleet",
        help="Database of a fleet to ask what it stands on, besides those that the repository "
        "remembers (`prunecast release fleets`); may be given several times.",
    ),
]


def create(
    repository: Folder,
    name: Name,
    keys: Annotated[
        list[Path] | None,
        typer.Option(
            "--keys", help="Folder with private keys; give it twice if offline keys lie apart."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Saved published model, or a .safetensors or .npz checkpoint."),
    ] = None,
    strip_prefix: Annotated[
        str,
        typer.Option(
            help="Take the tensors of --model whose names begin so (module. say), under the rest "
            "of their names."
        ),
    ] = "",
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Any .onnx file, with its weights, instead of --model and a graph."
        ),
    ] = None,
    selftest: Annotated[
        Path | None,
        typer.Option(
            help=".npz with a few real inputs, one array per input of the model. Without, the "
            "first samples of --calibration, or with --from drawn inputs, take their place."
        ),
    ] = None,
    module: Annotated[
        str | None,
        typer.Option(help="Torch module as package.module:factory; exported to a graph."),
    ] = None,
    graph: Annotated[Path | None, typer.Option(help="Exported graph, instead of --module.")] = None,
    graph_cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps exported graphs; default in the user's cache."),
    ] = None,
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
            help="How lattice steps are chosen: held (as the newest live release has them, for "
            "small patches), range or error."
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
    variant: Annotated[
        str,
        typer.Option(
            help="What devices run: fp32; int8 (weights as integers, values unchanged); int8-qdq "
            "(arithmetic in integers, needs --calibration); structured (fewer channels, heads or "
            "layers)."
        ),
    ] = "int8",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help=".npz with real samples, one array per input, and labels if known: activations "
            "are measured on them, and the release states how far it is from float32."
        ),
    ] = None,
    channels: Annotated[
        float | None,
        typer.Option(
            help="Share of the channels that remain, with any variant of a --module; structured "
            "alone means 0.5.",
            min=0.0,
            max=1.0,
        ),
    ] = None,
    heads: Annotated[
        float | None,
        typer.Option(
            help="Share of the heads of every attention layer that remain; likewise.",
            min=0.0,
            max=1.0,
        ),
    ] = None,
    layers: Annotated[
        float | None,
        typer.Option(
            help="Share of the residual layers that remain, those that change the outputs for "
            "--calibration (or --selftest) the most; likewise.",
            min=0.0,
            max=1.0,
        ),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="name=value, measured on this very model.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="SPDX expression of the weights.")] = None,
    window: Annotated[
        int,
        typer.Option(help="How many releases stay live, besides those that a fleet needs.", min=1),
    ] = 16,
    fleet: Fleets = None,
    at_least: Annotated[
        int, typer.Option(help="Lowest number of the release, to overtake one of a thief.", min=1)
    ] = 1,
    export: Annotated[
        Path | None, typer.Option(help="Write what was published as a single .onnx file, too.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what the release would be to a device, and publish nothing; without --keys.",
        ),
    ] = False,
    max_bytes: MaxBytes = None,
    max_seconds: MaxSeconds = None,
    as_json: AsJson = False,
) -> None:
    """Publish a model as the next release: keyframe, patches from live releases, self-test."""
    from prunecast.compression.onnx.graph import save_graph
    from prunecast.server.repository import KeyRing, RecipeError, Repository
    from prunecast.server.repository.authoring import (
        NewestRelease,
        export_release,
        read_checkpoint,
        read_recipe,
    )
    from prunecast.server.repository.authoring.gains import gain_notes, rehearse
    from prunecast.server.repository.reading import RepositoryReader

    if not (keys or dry_run):
        raise typer.BadParameter("is missing; only --dry-run does without", param_hint="--keys")
    if dry_run and export is not None:
        raise typer.BadParameter("there will be nothing to export", param_hint="--dry-run")
    if source is None and (model is None or (selftest is None and calibration is None)):
        raise typer.BadParameter(
            "give --model and --selftest (or --calibration), or an .onnx file with --from"
        )
    if source is not None and (model, module, graph) != (None, None, None):
        raise typer.BadParameter("--from has graph and weights: no --model, --module, --graph")
    metrics = dict(map(_metric, metric or []))
    target = (
        RepositoryReader(repository)
        if dry_run
        else Repository(repository, KeyRing(*(keys or ())), window=window, fleets=fleet or ())
    )
    try:
        recipe = read_recipe(
            graph=graph,
            module=None if module is None else _factory(module),
            onnx=source,
            selftest=selftest,
            calibration=calibration,
            removed=_removed(model) if module is not None else None,
            variant=variant,
            channels=channels,
            heads=heads,
            layers=layers,
            bits=bits,
            steps=steps,
            most_difference=most_difference,
            seed=seed,
            licence=licence,
            cache=graph_cache,
            max_bytes=max_bytes,
            max_seconds=max_seconds,
            measure=True,
        )
        weights = (
            None
            if model is None
            else read_checkpoint(model, max_bytes=max_bytes, prefix=strip_prefix)
        )
        with make_console(stderr=True).status(f"making {name} from {source or module or graph}"):
            made = recipe.make(weights, metrics, newest=NewestRelease(target, name))
    except RecipeError as error:
        raise typer.BadParameter(error.message, param_hint=f"--{error.option}") from error
    if save_graph_to and made.exported:
        save_graph(made.exported, save_graph_to)
    if isinstance(target, Repository):
        published = target.publish(name, made, at_least=at_least)
    else:
        published = rehearse(target, name, made, at_least=at_least)
    manifest = published.manifest
    files = {file: ref.travels.length for file, ref in manifest.files.items()}
    result: dict[str, Any] = {
        "name": name,
        "version": published.version,
        "published": not dry_run,
        "onnx_bytes": published.onnx_bytes,
        "weights_bytes": manifest.weights.length,
        "keyframe_bytes": manifest.keyframe.length,
        "patch_bytes": {str(base): size for base, size in published.patch_bytes.items()},
        "file_bytes": {**files, "release.json": len(manifest.to_bytes())},
        "retired": list(published.retired),
        "kept": {str(version): why for version, why in published.kept.items()},
        "variant": made.variant,
        "kind": made.kind,
        "numerics": dict(made.numerics),
        "settings": dict(published.settings),
        "gains": dict(made.gains),
        "notes": [*made.notes, *_refused(published.settings), *gain_notes(made.gains)],
        **{key: value for key, value in made.metrics.items() if key not in metrics},
    }
    if export is not None:
        result["exported_bytes"] = export_release(target, manifest, export)
    show(result, as_json, _created(result))


def _refused(settings: Mapping[str, str]) -> list[str]:
    """A note for each of onnxruntime's settings that the model cannot be run with."""
    from prunecast.compression.release.runtime import REFUSED

    return [
        f"onnxruntime refuses {name} for this model: it is run without, here and on devices"
        for name, value in settings.items()
        if value == REFUSED
    ]


def _factory(reference: str) -> Callable[[], Any]:
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in the current folder, as `python -m` finds it
    try:
        return load_callable(reference)
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error), param_hint="--module") from error


def _removed(model: Path | None) -> Path | None:
    """The plan beside a model that a run trained without some of its channels; None for none."""
    from prunecast.compression.pruning.structure.channels import channels_beside

    beside = None if model is None else channels_beside(model)
    return beside if beside is not None and beside.is_file() else None


def _metric(text: str) -> tuple[str, float]:
    name, sep, value = text.partition("=")
    with suppress(ValueError):
        if sep and name:
            return name, float(value)
    raise typer.BadParameter(f"{text!r} is not name=value", param_hint="--metric")


def _created(result: dict[str, Any]) -> str:
    what = "one .onnx file" if "int8-qdq" in result["kind"] else "one fp32 .onnx file"
    sizes = {
        what: result["onnx_bytes"],
        "exported .onnx file": result.get("exported_bytes"),
        "keyframe": result["keyframe_bytes"],
        **{f"patch from {base}": size for base, size in result["patch_bytes"].items()},
    }
    would = "is live" if result["published"] else "would be the next release: nothing is published"
    lines = [f"{result['name']} {result['version']} {would}"]
    lines += [f"{what:<21} {size:>12,} bytes" for what, size in sizes.items() if size]
    if "onnx_max_difference" in result:
        lines.append(
            f"outputs differ from the original by at most {result['onnx_max_difference']:.3g}, "
            f"{result['onnx_relative_difference']:.2%} of the largest value; "
            f"{result['onnx_classes_changed']:.2%} of the classes change"
        )
    numerics = result["numerics"]
    if "samples" in numerics:
        lines.append(
            f"{result['kind']} differs from float32 by at most {numerics['max_difference']:.3g} on "
            f"{numerics['samples']:.0f} samples, {numerics['relative_difference']:.2%} of the "
            f"largest value; {numerics['classes_changed']:.2%} of the classes change"
        )
    if "accuracy" in numerics:
        lines.append(
            f"accuracy {numerics['accuracy']:.4f}, float32 {numerics['reference_accuracy']:.4f}"
        )
    lines += _gains(result)
    lines += [f"note: {note}" for note in result.get("notes", ())]
    if result["retired"]:
        lines.append(f"retired {', '.join(map(str, result['retired']))}: outside the window")
    lines += [
        f"kept {version} outside the window: {why}" for version, why in result["kept"].items()
    ]
    return "\n".join(lines)


def _gains(result: dict[str, Any]) -> list[str]:
    from prunecast.server.repository.authoring.gains import gain_rows

    header, rows = gain_rows(result["gains"], result["keyframe_bytes"], result["patch_bytes"])
    return [f"{row[0]:<28}" + "".join(f"{cell:>14}" for cell in row[1:]) for row in (header, *rows)]
