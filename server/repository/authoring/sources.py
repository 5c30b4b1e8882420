"""What releases are made from: graphs and ``.onnx`` files of any origin, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.files import StorageError
from prunecast.compression.codec import Limits
from prunecast.compression.files import FilesError
from prunecast.compression.files.contents import content_hint
from prunecast.compression.files.formats import open_tensors
from prunecast.compression.files.tensors import FOREIGN, FileTensor
from prunecast.compression.onnx import ExportError, ForeignModel, NumericsError
from prunecast.compression.onnx.bind import WRAPPERS, Variant, export_single
from prunecast.compression.onnx.compare import Difference, differ, draw_inputs, record
from prunecast.compression.onnx.graph import ExportedGraph, is_self_contained, load_graph
from prunecast.compression.onnx.lattice import Steps, snap
from prunecast.compression.onnx.lift import LiftedModel, lift_model
from prunecast.compression.pruning.plan import Shares
from prunecast.compression.release import RuntimeFailure
from prunecast.compression.release.layout import WeightsLayout
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.compression.release.runtime import fit_inputs, open_session
from prunecast.compression.release.selftest import Arrays
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor, load_model
from prunecast.server.repository.authoring.build import ReleaseContents, bound_session, check_names
from prunecast.server.repository.errors import RecipeError, RepositoryError
from prunecast.server.repository.reading import RepositoryReader

__all__ = [
    "GraphFile",
    "export_release",
    "from_arrays",
    "from_onnx",
    "read_checkpoint",
]


@dataclass(frozen=True)
class GraphFile:
    """A graph that `save_graph` wrote, on whosever behalf, and that has been looked at.

    Attributes:
        path: of the file.
        shares: of channels, heads and layers that remain in it; None for all.
    """

    path: Path
    shares: Shares | None = None

    def load(self) -> ExportedGraph:
        """Read it in this process.

        Raises:
            RecipeError: it is no graph, or refers to other files.
        """
        try:
            graph = load_graph(self.path)
        except ExportError as error:
            raise RecipeError("graph", str(error)) from error
        if not is_self_contained(graph):
            raise RecipeError("graph", f"{self.path} refers to other files: no graph does")
        return graph


# What onnxruntime says of a model that no device could run, and what to do.
_REFUSED = (
    ("not a registered function/op", "; devices have ONNX's own operators: export it with these"),
    ("No Op registered", "; devices have ONNX's own operators: export it with these"),
    ("IR version", "; save it with a lower ir_version, by an earlier release of onnx say"),
    ("*guarantees* support", "; export it with a lower opset"),
)
_REWRITTEN = 1e-4  # relative; moving weights must not change what a model computes
_DEQUANTISES_INT8, _DEQUANTISES_INT16 = 10, 21  # opsets
_NARROW = (np.dtype(np.int8), np.dtype(np.int32))


def from_onnx(
    path: Path,
    *,
    bits: int | None = None,
    steps: Steps = "held",
    variant: Variant = "lattice",
    held: PublishedModel | None = None,
    inputs: Arrays | None = None,
    seed: int = 0,
    most_difference: float | None = None,
    max_bytes: int | None = None,
) -> ReleaseContents:
    """Take a model apart, quantise it, and compare it with the original in onnxruntime.

    The metrics state the difference between the outputs, on the inputs: ``onnx_max_difference``,
    ``onnx_relative_difference`` (of the largest value), ``onnx_classes_changed``.

    Args:
        path: the ``.onnx`` file; external data in its folder or below.
        bits: for kernels and embeddings, see `from_arrays`, and so `steps` and `held`.
        steps: how lattice steps are chosen.
        variant: what `weights.bin` should hold; ``fp32`` where the opset allows nothing else.
        held: the newest live version of the same release, for ``steps="held"``.
        inputs: real inputs by name; drawn from `seed` when not given.
        seed: of drawn inputs.
        most_difference: refuse a relative difference above this.
        max_bytes: most bytes that its tensors may take, see `TensorReader`; what running it takes
            is bounded by `authoring.foreign`.

    Raises:
        ForeignModel: the file is damaged, draws random numbers, or refers to
            files outside its folder.
        NumericsError: the rebuilt model computes something else, or differs too much.
        RuntimeFailure: onnxruntime refuses the original or its inputs.
    """
    lifted = lift_model(
        path, max_bytes=max_bytes
    )  # checks what the original refers to, before anything runs it
    try:
        original = open_session(path)
    except RuntimeFailure as error:
        remedy = next((text for words, text in _REFUSED if words in str(error)), "")
        raise RuntimeFailure(f"{error}{remedy}") from error
    if inputs is not None:
        check_names(original, inputs)
    wanted_types = {s.name: s.dtype for s in original.inputs}
    given = draw_inputs(original, seed) if inputs is None else fit_inputs(inputs, wanted_types)
    wanted = record(original, given)
    del original
    exact = PublishedModel({name: RawTensor(a) for name, a in lifted.arrays.items()})
    moved = _difference(lifted.graph, exact, "fp32", given, wanted)
    if moved.relative > _REWRITTEN:
        raise NumericsError(
            f"{path} computes something else when its weights are moved out of its graph "
            f"(relative difference {moved.relative:.2g}): please report the model"
        )
    counter = held.counter + 1 if held is not None else 1
    model = snap(lifted.arrays, lifted.kernels, bits=bits, steps=steps, held=held, counter=counter)
    chosen, notes = _variant(lifted, model, variant, bits)
    difference = moved if bits is None else _difference(lifted.graph, model, chosen, given, wanted)
    if most_difference is not None and difference.relative > most_difference:
        raise NumericsError(
            f"at {bits} bits the outputs differ by {difference.relative:.2g} of the largest value, "
            f"accepted are {most_difference:.2g}: use more bits, or none"
        )
    if inputs is None:
        notes.append(f"the self-test holds drawn inputs (seed {seed}): give real ones if you can")
    graph = replace(lifted.graph, max_difference=moved.absolute)
    return ReleaseContents(
        model,
        graph,
        given,
        chosen,
        metrics={
            "onnx_max_difference": difference.absolute,
            "onnx_relative_difference": difference.relative,
            "onnx_classes_changed": difference.classes,
        },
        kind="int8" if chosen == "lattice" else "fp32",
        notes=(*lifted.notes, *notes),
        exported=graph,
    )


def _difference(
    graph: ExportedGraph, model: PublishedModel, variant: Variant, given: Arrays, wanted: Arrays
) -> Difference:
    with bound_session(graph, model, variant) as session:
        return differ(wanted, session.run(given))


def _variant(
    lifted: LiftedModel, model: PublishedModel, variant: Variant, bits: int | None
) -> tuple[Variant, list[str]]:
    lattice: list[Any] = [t for t in model.tensors.values() if isinstance(t, LatticeTensor)]
    if bits is None:
        return "fp32", []
    notes = [f"{len(lattice)} of {len(model.tensors)} tensors are on the lattice"]
    wide, why = any(t.q.dtype not in _NARROW for t in lattice), ""
    if variant == "lattice" and lifted.opset < _DEQUANTISES_INT8:
        why = "has no DequantizeLinear"
    elif variant == "lattice" and wide and lifted.opset < _DEQUANTISES_INT16:
        why = "cannot dequantise 16 bits"
    if not why:
        return variant, notes
    stay = "weights.bin holds float32; integers travel all the same"
    return "fp32", [*notes, f"opset {lifted.opset} {why}: {stay}"]


def export_release(repository: RepositoryReader, manifest: ReleaseManifest, path: Path) -> int:
    """Write a release as one self-contained ``.onnx`` file; returns its size in bytes.

    Raises:
        RepositoryCorrupt: a file of the release is missing or damaged.
        ReleaseError: graph and weights do not fit together, or exceed 2 GiB.
        StorageError: the file cannot be written.
    """
    layout = WeightsLayout.from_bytes(repository.blob(manifest.files["layout.json"]))
    graph = repository.blob(manifest.files["model.onnx"])
    return export_single(graph, layout, repository.model(manifest), path)


def read_checkpoint(
    path: Path,
    *,
    bits: int | None = None,
    steps: Steps = "range",
    held: PublishedModel | None = None,
    max_bytes: int | None = None,
    prefix: str = "",
) -> PublishedModel:
    """Read a published model, or a dense checkpoint as one.

    Args:
        path: ``.safetensors``, ``.npz``, or a file that `save_model` wrote.
        bits: for dense checkpoints, see `from_arrays`, and so the others.
        max_bytes: most bytes that its tensors may take together; default 1 GiB, or 64 times what
            the file takes on disk if that is more.
        prefix: take the tensors whose names begin so, under the rest of their names, and no
            others; what torch itself puts into names, such as ``_orig_mod.``, goes wherever it is.

    Raises:
        RepositoryError: not readable as its suffix says, or `bits` given for a published model.
        StorageError: no such file, or not a published model.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        if bits is not None:
            raise RepositoryError(f"{path} is a published model: its lattice is fixed already")
        try:
            model = load_model(path, limits=_limits(path, max_bytes))
        except StorageError as error:
            if not path.is_file():
                raise
            if "above the limits" in str(error):
                raise RepositoryError(f"{error} (--max-bytes)") from error
            raise RepositoryError(f"{error}{_no_checkpoint(path)}") from error
        return _stripped(path, model, prefix)
    try:
        tensors = open_tensors(path, max_bytes=max_bytes)
        arrays = {name: _plain(path, name, tensor) for name, tensor in tensors.items()}
    except FilesError as error:
        raise RepositoryError(str(error)) from error
    return _stripped(path, from_arrays(arrays, bits=bits, steps=steps, held=held), prefix)


def _no_checkpoint(path: Path) -> str:
    """What to do with a file that is neither a published model nor a checkpoint."""
    if path.suffix.lower() == ".onnx":
        return ": an .onnx file has graph and weights, give it with --from"
    known = "; a checkpoint is a .safetensors or .npz file"
    return known + content_hint(path)


def _stripped(path: Path, model: PublishedModel, prefix: str) -> PublishedModel:
    """The tensors under a prefix, named without it."""
    if not prefix:
        return model
    wrapper = prefix in WRAPPERS
    has = [
        name for name in model.tensors if (prefix in name if wrapper else name.startswith(prefix))
    ]
    if not has:
        few = ", ".join(map(repr, list(model.tensors)[:3]))
        raise RepositoryError(f"{path}: no name begins with {prefix!r}; there are {few}, ...")
    kept = list(model.tensors) if wrapper else has
    found = {name.replace(prefix, "", -1 if wrapper else 1): model.tensors[name] for name in kept}
    if len(found) != len(kept):
        raise RepositoryError(f"{path}: without {prefix!r} two tensors have the same name")
    return PublishedModel(found, model.counter)


def _limits(path: Path, max_bytes: int | None) -> Limits | None:
    """Of a file that the user names; a published model is smaller than its weights by far."""
    if max_bytes is None or not path.is_file():
        return None
    size = path.stat().st_size
    most = {"elements": max_bytes, "decoded_bytes": max_bytes, "free_bytes": max_bytes}
    return replace(Limits(), payload_bytes=max(size, Limits().payload_bytes), **most)


def from_arrays(
    arrays: Mapping[str, NDArray[Any]],
    *,
    bits: int | None = None,
    steps: Steps = "range",
    held: PublishedModel | None = None,
    counter: int = 0,
) -> PublishedModel:
    """A dense checkpoint as a published model.

    Args:
        arrays: tensors by name.
        bits: 2 to 16: put every floating tensor of two or more dimensions on a symmetric lattice,
            rounding to nearest. None keeps every value exactly, which costs more bytes.
        steps: how a step is chosen, see `prunecast.compression.onnx.lattice`; ``held`` is what
            keeps patches small.
        held: the newest live version of the same release, for ``steps="held"``.
        counter: number of the version.

    Raises:
        RepositoryError: `bits` out of range, or a value that is not finite.
    """
    kernels = {name for name, a in arrays.items() if a.dtype.kind == "f" and a.ndim >= 2}
    try:
        return snap(arrays, kernels, bits=bits, steps=steps, held=held, counter=counter)
    except ForeignModel as error:
        raise RepositoryError(str(error)) from error


def _plain(path: Path, name: str, tensor: FileTensor) -> NDArray[Any]:
    if tensor.dtype in FOREIGN and tensor.dtype != "bfloat16":
        raise RepositoryError(f"{path}: tensor {name!r} is {tensor.dtype}: convert it to float32")
    return tensor.real()
