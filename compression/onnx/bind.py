"""Bind the weights of a published model to an exported graph. Deterministic: same in, same bytes.

Two variants hold the same values bit for bit:

* ``lattice``: a lattice tensor is stored as its integers (int8, int16 or int32, whichever holds
  them) and its step, and a ``DequantizeLinear`` node computes ``float32(q) * step``, the very
  multiplication that defines the published model. ``DequantizeLinear`` on int16 needs opset 21.
* ``fp32``: a lattice tensor is stored dense, in its own dtype.

Steps lie in ``weights.bin`` too, so ``model.onnx`` stays the same file from version to version as
long as no tensor changes its width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import helper

from prunecast.common.files import write_atomically
from prunecast.compression.codec import TensorSpec
from prunecast.compression.onnx import BindError
from prunecast.compression.onnx.graph import ExportedGraph, replace_items
from prunecast.compression.release.layout import Segment, WeightsLayout, place
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor, Tensor

__all__ = [
    "WRAPPERS",
    "BoundModel",
    "Variant",
    "bind_weights",
    "explain_names",
    "export_single",
    "single_file_size",
]

Variant = Literal["lattice", "fp32"]
_WEIGHTS = "weights.bin"
_PROTOBUF_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class BoundModel:
    """Files that `bind_weights` wrote.

    Attributes:
        model: path of `model.onnx`.
        weights: path of `weights.bin`, which `model.onnx` refers to by name.
        layout: where each tensor lies in `weights.bin`.
        weights_sha256: hex digest of `weights.bin`.
    """

    model: Path
    weights: Path
    layout: WeightsLayout
    weights_sha256: str


def bind_weights(
    graph: ExportedGraph,
    model: PublishedModel,
    directory: Path,
    *,
    variant: Variant = "lattice",
) -> BoundModel:
    """Write `model.onnx` and `weights.bin` into `directory`.

    Args:
        graph: the architecture.
        model: the weights. Tied weights may appear under any of their names, or under several
            with equal values. Tensors that inference does not read are ignored.
        directory: created when missing.
        variant: ``lattice`` or ``fp32``.

    Raises:
        BindError: the model does not fit the graph.
        StorageError: a file cannot be written.
    """
    directory = Path(directory)
    proto, layout = _bound(graph, model, variant)
    path = directory / "model.onnx"
    write_atomically(path, proto.SerializeToString(deterministic=True))
    sha256 = layout.write(model, directory / _WEIGHTS)
    return BoundModel(path, directory / _WEIGHTS, layout, sha256)


def single_file_size(graph: ExportedGraph, model: PublishedModel, variant: Variant = "fp32") -> int:
    """Size in bytes of what `export_single` would write, without writing it.

    Raises:
        BindError: as there, or the model does not fit the graph.
    """
    proto, layout = _bound(graph, model, variant)
    return int(_inlined(proto, layout, model).ByteSize())


def export_single(graph: bytes, layout: WeightsLayout, model: PublishedModel, path: Path) -> int:
    """Put the weights of a release into its graph and write one file; returns its size in bytes.

    The values are those a device runs, bit for bit, in the release's own variant.

    Args:
        graph: content of `model.onnx`.
        layout: content of `layout.json`.
        model: the published model.
        path: file to write.

    Raises:
        BindError: graph and layout do not belong together, or the result exceeds 2 GiB.
        LayoutError: layout and model do not belong together.
        StorageError: the file cannot be written.
    """
    try:
        proto = onnx.ModelProto.FromString(graph)
    except DecodeError as error:
        raise BindError(f"model.onnx of the release is damaged: {error}") from error
    data = _inlined(proto, layout, model).SerializeToString(deterministic=True)
    write_atomically(Path(path), data)
    return len(data)


def _inlined(proto: Any, layout: WeightsLayout, model: PublishedModel) -> Any:
    if layout.size + proto.ByteSize() > _PROTOBUF_LIMIT:
        raise BindError(f"{layout.size} bytes of weights do not fit into one protobuf file")
    segments = {segment.name: segment for segment in layout.segments}
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        segment = segments.get(tensor.name)
        if segment is None:
            raise BindError(
                f"layout.json does not place {tensor.name!r}, which model.onnx refers to"
            )
        values = segment.values(model)
        tensor.raw_data = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    return proto


def resolve(graph: ExportedGraph, model: PublishedModel) -> list[tuple[str, str, Tensor]]:
    """Each parameter of the graph, the name under which the model has it, and its tensor.

    Raises:
        BindError: the model does not fit the graph.
    """
    known = {*graph.parameters, *graph.aliases, *graph.unused}
    unknown = [name for name in model.tensors if name not in known]
    if unknown:
        few = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise BindError(f"the graph has no place for {few}: {explain_names(model, known)}")
    chosen = []
    for parameter, spec in graph.parameters.items():
        names = [name for name in graph.names_of(parameter) if name in model.tensors]
        if not names:
            raise BindError(
                f"the model lacks tensor {parameter!r}, which the graph needs: save all of "
                "state_dict(), or export the module that this checkpoint is of"
            )
        tensor = model.tensors[names[0]]
        found = TensorSpec(np.dtype(tensor.dtype), tensor.shape)
        if found != spec:
            raise BindError(
                f"tensor {names[0]!r} is {found.dtype}{list(found.shape)}, the graph needs "
                f"{spec.dtype}{list(spec.shape)}: "
                + (
                    "export the module that this checkpoint is of"
                    if found.shape != spec.shape
                    else f"convert the checkpoint to {spec.dtype}, or export the module in "
                    f"{found.dtype}"
                )
            )
        for other in names[1:]:
            if not _equal(tensor, model.tensors[other]):
                raise BindError(
                    f"{names[0]!r} and {other!r} are one tied weight but have different values: "
                    "untie them in the module and export again, or publish one of them"
                )
        chosen.append((parameter, names[0], tensor))
    return chosen


def explain_names(names: Iterable[str], known: Collection[str]) -> str:
    """Why tensors of a checkpoint are not those of a graph or module, and what to do.

    Args:
        names: of the checkpoint's tensors.
        known: names that fit.
    """
    names, wanted = list(names), set(known)
    for wrapper in WRAPPERS:
        if any(wrapper in name for name in names):
            fitting = sum(name.replace(wrapper, "") in wanted for name in names)
            if 2 * fitting > len(wanted):
                return (
                    f"its names hold {wrapper!r}, {_BY[wrapper]}; drop that with "
                    f"--strip-prefix {wrapper}"
                )
    prefix, count = _wrapped(names, wanted)
    if 2 * count > len(wanted):
        by = _BY.get(prefix, "as a module that holds the model names them")
        return f"its names begin with {prefix!r}, {by}; drop that with --strip-prefix {prefix}"
    prefix, count = _wrapped(known, set(names))
    if 2 * count > len(wanted):
        by = _BY.get(prefix, "of a module that holds the model")
        return (
            f"the names of the graph begin with {prefix!r}, {by}; export the model itself, without "
            "what wraps it"
        )
    share = len(wanted.intersection(names))
    if share == len(wanted):
        return "it has all that it knows, so leave these out of the checkpoint"
    if all(name.startswith("arr_") for name in names):
        return "so numpy.savez names arrays that are given without names: give them by name"
    return (
        f"only {share} of the {len(wanted)} names that it knows are there, so it was exported from "
        "another architecture: export it anew, from the module that this checkpoint is of"
    )


WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch puts into names wherever it wraps a module; nobody else does."""
_BY = {
    "_orig_mod.": "as torch.compile names a module",
    "_fsdp_wrapped_module.": "as FullyShardedDataParallel names a module",
    "_checkpoint_wrapped_module.": "as activation checkpointing names a module",
    "module.": "as DataParallel and DistributedDataParallel name a module",
    "model.": "as a LightningModule names its model",
    "state_dict.": "as checkpoints that hold more than weights do",
    "state_dict.model.": "as checkpoints of Lightning do",
}


def _wrapped(names: Iterable[str], wanted: Collection[str]) -> tuple[str, int]:
    """The prefix that most names have before one that is wanted, and how many."""
    found: Counter[str] = Counter()
    for name in names:
        at = 0
        while at := name.find(".", at) + 1:
            if name[at:] in wanted:
                found[name[:at]] += 1
    return found.most_common(1)[0] if found else ("", 0)


def _equal(a: Tensor, b: Tensor) -> bool:
    if isinstance(a, LatticeTensor) and isinstance(b, LatticeTensor):
        return a.step == b.step and a.dtype == b.dtype and np.array_equal(a.q, b.q)
    left, right = a.dense(), b.dense()
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()


def _bound(
    graph: ExportedGraph, model: PublishedModel, variant: Variant
) -> tuple[Any, WeightsLayout]:
    """The graph that refers to `weights.bin`, and where each tensor lies in there."""
    chosen = resolve(graph, model)
    layout = place(_rows(graph, chosen, variant))
    proto = onnx.ModelProto.FromString(graph.skeleton)
    placed = {segment.name for segment in layout.segments}
    nodes = []
    for name, _, tensor in chosen:
        if name in graph.integers:
            continue  # the graph dequantises them itself
        if f"{name}::q" in placed and isinstance(tensor, LatticeTensor):
            nodes += _dequantise(name, tensor)
        elif name not in placed:
            empty = helper.make_tensor(name, _onnx_type(tensor.dtype), tensor.shape, [])
            proto.graph.initializer.append(empty)
    proto.graph.initializer.extend(map(_initialiser, layout.segments))
    replace_items(proto.graph.node, [*nodes, *proto.graph.node])
    return proto, layout


def _rows(
    graph: ExportedGraph, chosen: list[tuple[str, str, Tensor]], variant: Variant
) -> Iterator[tuple[str, str, str, str, tuple[int, ...]]]:
    if variant not in ("lattice", "fp32"):
        raise BindError(f"unknown variant {variant!r}: use 'lattice' or 'fp32'")
    for name, source, tensor in chosen:
        if name in graph.integers:
            if not isinstance(tensor, LatticeTensor) or tensor.q.dtype != np.int8:
                raise BindError(f"the graph reads {source!r} as int8: quantise the model anew")
            yield f"{name}::q", source, "q", "int8", tensor.shape
            continue
        if not tensor.dense().size if isinstance(tensor, RawTensor) else not tensor.q.size:
            continue  # an empty tensor has no bytes; it is written into the graph
        if isinstance(tensor, LatticeTensor) and variant == "lattice":
            yield f"{name}::q", source, "q", tensor.q.dtype.name, tensor.shape
            yield f"{name}::step", source, "step", "float32", ()
        else:
            part = "dense" if isinstance(tensor, LatticeTensor) else "raw"
            yield name, source, part, np.dtype(tensor.dtype).name, tensor.shape


def _dequantise(name: str, tensor: LatticeTensor) -> list[Any]:
    single = tensor.dtype == np.float32
    value = name if single else f"{name}::float32"
    made = [
        helper.make_node(
            "DequantizeLinear", [f"{name}::q", f"{name}::step"], [value], name=f"{name}::dequantise"
        )
    ]
    if not single:
        cast = helper.make_node("Cast", [value], [name], name=f"{name}::cast")
        cast.attribute.append(helper.make_attribute("to", _onnx_type(tensor.dtype)))
        made.append(cast)
    return made


def _onnx_type(dtype: Any) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _initialiser(segment: Segment) -> Any:
    tensor = onnx.TensorProto()
    tensor.name = segment.name
    tensor.data_type = _onnx_type(segment.dtype)
    tensor.dims.extend(segment.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entries = {"location": _WEIGHTS, "offset": segment.offset, "length": segment.length}
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return tensor
