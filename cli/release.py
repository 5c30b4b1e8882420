"""`prunecast release`: create and keep a release repository."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.console import make_console

if TYPE_CHECKING:
    import torch

    from prunecast.compression.onnx import ExportedGraph
    from prunecast.server.releases import Repository, RepositoryReader

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Publish signed releases of a model for edge devices.")

Folder = Annotated[Path, typer.Argument(help="Folder of the release repository.")]
Keys = Annotated[
    list[Path],
    typer.Option(
        "--keys", help="Folder with private keys; give it twice if offline keys lie apart."
    ),
]
Name = Annotated[str, typer.Argument(help="Name of the release.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def init(repository: Folder, keys: Keys, as_json: AsJson = False) -> None:
    """Hold the key ceremony: make keys where there are none and sign an empty repository.

    The root metadata that is printed goes onto every device. Move root.pem and targets.pem to a
    medium of their own; snapshot.pem and timestamp.pem are needed for every renewal.
    """
    from prunecast.server.releases import ROLES, KeyRing, Repository

    held = [role for role in ROLES if any((f / f"{role}.pem").is_file() for f in keys)]
    ring = KeyRing(*keys) if held else KeyRing.create(keys[0])
    made = Repository.create(repository, ring)
    root = repository / "metadata" / "1.root.json"
    paths = {role: str(ring.path(role)) for role in ROLES}
    result = {
        "repository": str(repository),
        "root": str(root),
        "keys": paths,
        "expires": {role: when.isoformat() for role, when in made.expires().items()},
    }
    _show(
        result,
        as_json,
        lambda: (
            f"created {repository}\nroot for devices: {root}\n"
            + "\n".join(f"{role} key: {path}" for role, path in paths.items())
        ),
    )


@app.command()
def create(
    repository: Folder,
    name: Name,
    keys: Keys,
    model: Annotated[
        Path,
        typer.Option(help="Saved published model, or a .safetensors or .npz checkpoint."),
    ],
    selftest: Annotated[
        Path, typer.Option(help=".npz with a few real inputs, one array per input of the model.")
    ],
    module: Annotated[
        str | None,
        typer.Option(help="Torch module as package.module:factory; exported to a graph."),
    ] = None,
    graph: Annotated[Path | None, typer.Option(help="Exported graph, instead of --module.")] = None,
    save_graph_to: Annotated[
        Path | None, typer.Option("--save-graph", help="Keep the exported graph for next time.")
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="Put a dense checkpoint on a lattice of so many bits.", min=2, max=16),
    ] = None,
    variant: Annotated[str, typer.Option(help="Weights on the device: lattice or fp32.")] = (
        "lattice"
    ),
    metric: Annotated[
        list[str] | None, typer.Option(help="name=value, measured on this very model.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="SPDX expression of the weights.")] = None,
    window: Annotated[int, typer.Option(help="How many releases stay live.", min=1)] = 16,
    as_json: AsJson = False,
) -> None:
    """Publish a model as the next release: keyframe, patches from live releases, self-test."""
    from prunecast.compression.onnx import save_graph, unpack_arrays
    from prunecast.server.releases import KeyRing, Repository, read_checkpoint

    if (module is None) == (graph is None):
        raise typer.BadParameter("give either --module or --graph")
    if variant not in ("lattice", "fp32"):
        raise typer.BadParameter("must be lattice or fp32", param_hint="--variant")
    metrics = dict(map(_metric, metric or []))
    weights = read_checkpoint(model, bits=bits)
    inputs = unpack_arrays(selftest.read_bytes())
    exported = _graph(module, graph, inputs)
    if save_graph_to:
        save_graph(exported, save_graph_to)
    target = Repository(repository, KeyRing(*keys), window=window)
    made = target.publish(
        name,
        weights,
        exported,
        selftest_inputs=inputs,
        metrics=metrics,
        variant=variant,  # type: ignore[arg-type]
        licence=licence,
    )
    result = {
        "name": made.name,
        "version": made.version,
        "onnx_bytes": made.onnx_bytes,
        "weights_bytes": made.weights_bytes,
        "keyframe_bytes": made.keyframe_bytes,
        "patch_bytes": {str(base): size for base, size in made.patch_bytes.items()},
        "file_bytes": dict(made.file_bytes),
        "retired": list(made.retired),
    }
    _show(result, as_json, lambda: _created(result))


@app.command(name="list")
def list_(repository: Folder, as_json: AsJson = False) -> None:
    """List the live releases and when the metadata expires."""
    target = _reader(repository)
    entries = target.releases()
    manifests = [target.show(e.name, e.version) for e in entries]
    rows = [
        {
            "name": m.name,
            "version": m.version,
            "created": m.created,
            "model": m.model_digest,
            "keyframe_bytes": m.keyframe.length,
            "patches_from": [p.base_version for p in m.patches],
            "metrics": dict(m.metrics),
        }
        for m in manifests
    ]
    expires = {role: when.isoformat() for role, when in target.expires().items()}
    _show({"releases": rows, "expires": expires}, as_json, lambda: _table(rows, expires))


@app.command()
def show(
    repository: Folder,
    name: Name,
    version: Annotated[
        int | None, typer.Argument(help="Number of the release; default the newest.")
    ] = None,
) -> None:
    """Print the manifest of a release, as JSON."""
    manifest = _reader(repository).show(name, version)
    print(json.dumps(json.loads(manifest.to_bytes()), indent=2))  # noqa: T201


@app.command()
def verify(
    repository: Folder,
    root: Annotated[Path, typer.Option(help="Root metadata that devices were given.")],
    as_json: AsJson = False,
) -> None:
    """Check everything as a device would: signatures, digests, payloads, weights, self-tests."""
    from dataclasses import asdict

    from prunecast.server.releases import verify_repository

    verified = verify_repository(_reader(repository), root.read_bytes())
    _show(
        {"verified": [asdict(v) for v in verified]},
        as_json,
        lambda: (
            "\n".join(
                f"{v.name} {v.version}: verified, {v.patches} patches, self-test differs by "
                f"{v.difference:.2g}"
                for v in verified
            )
            or "the metadata is valid; there is no release yet"
        ),
    )


@app.command()
def retire(
    repository: Folder,
    name: Name,
    version: Annotated[int, typer.Argument(help="Number of the release.")],
    keys: Keys,
) -> None:
    """Withdraw a release; devices that run it keep it until a later one appears."""
    _writer(repository, keys).retire(name, version)
    print(f"retired {name} {version}")  # noqa: T201


@app.command()
def renew(
    repository: Folder,
    keys: Keys,
    role: Annotated[
        list[str] | None, typer.Option(help="root, targets, snapshot or timestamp.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sign metadata anew before it expires; by default the two online roles.

    Meant for a timer, at least as often as half the lifetime of the timestamp (7 days).
    """
    from prunecast.server.releases import ONLINE_ROLES

    renewed = _writer(repository, keys).renew(role or ONLINE_ROLES)
    result = {name: when.isoformat() for name, when in renewed.items()}
    _show(
        result,
        as_json,
        lambda: "\n".join(f"{name} is valid until {when}" for name, when in result.items()),
    )


@app.command(name="rotate-key")
def rotate_key(
    repository: Folder,
    role: Annotated[str, typer.Argument(help="root, targets, snapshot or timestamp.")],
    keys: Keys,
) -> None:
    """Replace a role's key; devices stop trusting the old one at their next check."""
    _writer(repository, keys).rotate_key(role)
    print(f"rotated the {role} key; destroy {role}.pem.old")  # noqa: T201


def _reader(repository: Path) -> RepositoryReader:
    from prunecast.server.releases import RepositoryReader

    return RepositoryReader(repository)


def _writer(repository: Path, keys: list[Path]) -> Repository:
    from prunecast.server.releases import KeyRing, Repository

    return Repository(repository, KeyRing(*keys))


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


def _show(result: dict[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    if as_json:
        print(json.dumps(result))  # noqa: T201
    else:
        make_console().print(text())


def _created(result: dict[str, Any]) -> str:
    lines = [f"{result['name']} {result['version']} is live"]
    if result["onnx_bytes"]:
        lines.append(f"one fp32 .onnx file   {result['onnx_bytes']:>12,} bytes")
    lines.append(f"keyframe              {result['keyframe_bytes']:>12,} bytes")
    for base, size in result["patch_bytes"].items():
        lines.append(f"patch from {base:<10} {size:>13,} bytes")
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]], expires: dict[str, str]) -> str:
    lines = [
        f"{r['name']} {r['version']}  {r['created']}  keyframe {r['keyframe_bytes']:,} bytes, "
        f"{len(r['patches_from'])} patches"
        + "".join(f", {k} {v:.4g}" for k, v in r["metrics"].items())
        for r in rows
    ]
    ends = ", ".join(f"{role} {when[:10]}" for role, when in expires.items())
    return "\n".join([*(lines or ["no release yet"]), f"metadata expires: {ends}"])
