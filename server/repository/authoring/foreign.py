"""Releases of graphs and ``.onnx`` files from elsewhere, made in a process of its own.

There the file is taken apart, quantised, compared and run for its self-test, under bounds on memory
and time (`prunecast.server.repository.apart`), and comes back as what a device will get. The
process reads and writes files of a folder; nothing is pickled.
"""

from __future__ import annotations

import json
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prunecast.common.bounded import bound_process
from prunecast.common.bounds import disk_bytes
from prunecast.common.npz import NpzArchive
from prunecast.compression.files.onnx_files import TensorReader, read_proto
from prunecast.compression.onnx import ForeignModel
from prunecast.compression.onnx.graph import load_graph, save_graph, tensors
from prunecast.compression.pruning.plan import Shares
from prunecast.compression.release.runtime import Signature
from prunecast.compression.release.selftest import Arrays, Tolerance, pack_arrays
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor, Tensor
from prunecast.server.repository.apart import allowance, run_apart
from prunecast.server.repository.authoring.build import (
    RecordedModel,
    ReleaseContents,
    record_selftest,
)
from prunecast.server.repository.authoring.modules import plan_of
from prunecast.server.repository.authoring.recipe import ReleaseRecipe
from prunecast.server.repository.authoring.sources import GraphFile
from prunecast.server.repository.authoring.variants import split_samples
from prunecast.server.repository.errors import RecipeError

__all__ = ["look_at_graph", "make_bounded"]

_OPTIONS = (
    *("variant", "channels", "heads", "layers", "bits", "steps", "most_difference", "seed"),
    *("max_bytes", "max_seconds", "measure"),
)


def make_bounded(
    recipe: ReleaseRecipe, model: PublishedModel | None, held: PublishedModel | None
) -> ReleaseContents:
    """Make the release of a recipe whose graph or model lies in a file, elsewhere.

    Args:
        recipe: with `onnx`, or with a `GraphFile`.
        model: the weights of a graph.
        held: the newest live version, see `ReleaseRecipe.make_here`.

    Raises:
        ForeignModel: it takes more memory or time than is allowed, or crashes.
        ReleaseError, RepositoryError, PlanError, VersionsError: nothing can be released.
    """
    file = _file(recipe)
    if file.exists() and not file.is_file():
        raise ForeignModel(f"cannot read {file}: it is no regular file")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_order(folder, recipe, model, held)
        try:
            size = _size([file], folder)
        except OSError as error:
            raise ForeignModel(f"cannot read {file}: {error.strerror or error}") from error
        run_apart(
            f"{__name__}:make",
            {"name": name},
            what=f"making a release of {file}",
            size=size,
            max_bytes=recipe.max_bytes,
            max_seconds=recipe.max_seconds,
            refusal=ForeignModel,
        )
        return _read_contents(folder)


def look_at_graph(path: Path, max_bytes: int | None = None) -> GraphFile:
    """What a recipe must know of a graph in a file, which is read elsewhere.

    Raises:
        RecipeError: it is no graph, or refers to other files.
        OSError: it cannot be read.
        PlanError: its channels are damaged.
        ForeignModel: it takes more memory or time than is allowed.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise RecipeError("graph", f"{path} is no regular file")
    shares: list[float] | None = run_apart(
        f"{__name__}:shares_of",
        {"path": str(path)},
        what=f"reading {path}",
        size=disk_bytes(path),
        max_bytes=max_bytes,
        refusal=ForeignModel,
    )
    return GraphFile(path, None if shares is None else Shares(*shares))


def _file(recipe: ReleaseRecipe) -> Path:
    if isinstance(recipe.graph, GraphFile):
        return recipe.graph.path
    assert recipe.onnx is not None
    return recipe.onnx


def _size(files: list[Path], folder: Path) -> int:
    return sum(disk_bytes(path) for path in (*files, *folder.iterdir()))


# -- what both sides write and read ---------------------------------------------------------------


def _write_order(
    folder: Path, recipe: ReleaseRecipe, model: PublishedModel | None, held: PublishedModel | None
) -> None:
    document: dict[str, Any] = {key: getattr(recipe, key) for key in _OPTIONS}
    # the process begins in the same folder
    if isinstance(recipe.graph, GraphFile):
        document["graph"] = [str(recipe.graph.path), recipe.graph.shares]
    else:
        document["onnx"] = str(recipe.onnx)
    if recipe.selftest is not None:
        document["named"] = isinstance(recipe.selftest, Mapping)
        given = recipe.selftest if isinstance(recipe.selftest, Mapping) else {"": recipe.selftest}
        _write_arrays(folder / "given.npz", given)
    if recipe.samples is not None:
        labels = {} if recipe.samples.labels is None else {"labels": recipe.samples.labels}
        _write_arrays(folder / "samples.npz", {**recipe.samples.inputs, **labels})
    for key, weights in (("model", model), ("held", held)):
        if weights is not None:
            document[key] = _write_model(folder / f"{key}.npz", weights)
    (folder / "order.json").write_text(json.dumps(document))


def _read_order(
    folder: Path,
) -> tuple[ReleaseRecipe, PublishedModel | None, PublishedModel | None]:
    document: dict[str, Any] = json.loads((folder / "order.json").read_bytes())
    weights = {
        key: _read_model(folder / f"{key}.npz", document.pop(key)) if key in document else None
        for key in ("model", "held")
    }
    if "onnx" in document:
        document["onnx"] = Path(document["onnx"])
    else:
        path, shares = document["graph"]
        document["graph"] = GraphFile(Path(path), None if shares is None else Shares(*shares))
    selftest: Any = None
    if (named := document.pop("named", None)) is not None:
        selftest = _read_arrays(folder / "given.npz")
        selftest = selftest if named else selftest[""]
    samples = folder / "samples.npz"
    recipe = ReleaseRecipe(
        **document,
        selftest=selftest,
        samples=split_samples(_read_arrays(samples)) if samples.is_file() else None,
    )
    return recipe, weights["model"], weights["held"]


def _write_contents(folder: Path, made: ReleaseContents) -> None:
    recorded = made.recorded
    assert recorded is not None
    inputs = made.inputs if isinstance(made.inputs, Mapping) else recorded.inputs
    document = {
        "model": _write_model(folder / "model.npz", made.model),
        "variant": made.variant,
        "metrics": dict(made.metrics),
        "kind": made.kind,
        "numerics": dict(made.numerics),
        "notes": list(made.notes),
        "gains": dict(made.gains),
        "tolerance": asdict(recorded.tolerance),
        "takes": [[s.name, s.dtype, s.shape] for s in recorded.takes],
        "gives": [[s.name, s.dtype, s.shape] for s in recorded.gives],
        "settings": dict(recorded.settings),
    }
    save_graph(made.graph, folder / "graph.onnx")
    save_graph(made.exported or made.graph, folder / "exported.onnx")
    _write_arrays(folder / "inputs.npz", inputs)
    _write_arrays(folder / "tested.npz", recorded.inputs)
    _write_arrays(folder / "expected.npz", recorded.expected)
    (folder / "made.json").write_text(json.dumps(document))


def _read_contents(folder: Path) -> ReleaseContents:
    document: dict[str, Any] = json.loads((folder / "made.json").read_bytes())
    return ReleaseContents(
        _read_model(folder / "model.npz", document["model"]),
        load_graph(folder / "graph.onnx"),
        _read_arrays(folder / "inputs.npz"),
        document["variant"],
        metrics=document["metrics"],
        kind=document["kind"],
        numerics=document["numerics"],
        notes=tuple(document["notes"]),
        exported=load_graph(folder / "exported.onnx"),
        gains=document["gains"],
        recorded=RecordedModel(
            _read_arrays(folder / "tested.npz"),
            _read_arrays(folder / "expected.npz"),
            Tolerance(**document["tolerance"]),
            _signatures(document["takes"]),
            _signatures(document["gives"]),
            settings=document["settings"],
        ),
    )


def _signatures(rows: list[Any]) -> tuple[Signature, ...]:
    return tuple(Signature(name, dtype, tuple(shape)) for name, dtype, shape in rows)


def _write_arrays(path: Path, arrays: Arrays) -> None:
    path.write_bytes(pack_arrays(arrays, level=0))


def _read_arrays(path: Path) -> dict[str, Any]:
    return NpzArchive(path, max_bytes=path.stat().st_size).read_all()


def _write_model(path: Path, model: PublishedModel) -> dict[str, Any]:
    """Write the arrays of a model; returns what else there is to it."""
    rows: list[tuple[str, tuple[float, bool, str] | None]] = []
    arrays: dict[str, Any] = {}
    for number, (name, tensor) in enumerate(model.tensors.items()):
        if isinstance(tensor, LatticeTensor):
            arrays[str(number)] = tensor.q
            rows.append((name, (tensor.step, tensor.pruned, tensor.dtype.name)))
        else:
            arrays[str(number)] = tensor.values
            rows.append((name, None))
    _write_arrays(path, arrays)
    return {"counter": model.counter, "tensors": rows}


def _read_model(path: Path, document: dict[str, Any]) -> PublishedModel:
    arrays, found = _read_arrays(path), dict[str, Tensor]()
    for number, (name, lattice) in enumerate(document["tensors"]):
        values = arrays[str(number)]
        found[name] = RawTensor(values) if lattice is None else LatticeTensor(values, *lattice)
    return PublishedModel(found, document["counter"])


# -- the process ----------------------------------------------------------------------------------


def make(name: str) -> None:
    """What the process does: an order out of the folder `name`, what was made into it."""
    folder = Path(name)
    recipe, model, held = _read_order(folder)
    if recipe.onnx is not None:
        proto, reader = read_proto(recipe.onnx), TensorReader(recipe.onnx, recipe.max_bytes)
        for tensor in tensors(proto):
            if tensor.external_data:
                reader.place(tensor)
        del proto
        size = _size(reader.files, folder)
        # now that all files are known
        bound_process(**allowance(size, recipe.max_bytes, recipe.max_seconds))
    made = recipe.make_here(model, held)
    _write_contents(folder, replace(made, recorded=record_selftest(made)))


def shares_of(path: str) -> Shares | None:
    """What remains of the channels, heads and layers of a graph; None for all."""
    plan = plan_of(GraphFile(Path(path)).load().skeleton)
    return None if plan is None else plan.shares
