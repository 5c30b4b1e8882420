"""Integer arithmetic on the device: a graph with quantised activations, and its weights.

onnxruntime's static quantisation places ``QuantizeLinear`` and ``DequantizeLinear`` around what
can compute in integers (Jacob et al. 2018, "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference"; 8 bits, activations asymmetric per tensor, weights
symmetric per channel, ranges by the smallest and largest value on samples). The numbers in it are
then replaced by ours, so that versions differ by little:

* **weights**: where the published integers fit into 8 bits they *are* the weights. A folded
  ``BatchNormalization`` goes into the scale of each channel and its sign, never into the integers.
  Wider lattices and dense weights get a step per channel, which is held from version to version
  and changes by powers of two;
* **scales and zero points of activations** are held from the version before as long as its range
  fits the samples: it reaches at most a twentieth less far and is at most twice as wide;
* everything that depends on the weights of the day lies in the published model, so `model.onnx`
  stays the same file.

==================== =============================================== ==================
tensor               content                                         dtype
==================== =============================================== ==================
``<w>``              integers of a weight                            lattice, int8
``<w>::scale``       scale of each channel, with the folded gain     float32 (C,)
``<w>::base``        step of each channel before anything is folded  float32 (C,), unread
``<w>::offset``      bias over (scale of the input * ``::scale``)    int32 (C,)
``<a>_scale`` ...    scale and zero point of an activation           float32, uint8
==================== =============================================== ==================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from prunecast.compression.codec import TensorSpec
from prunecast.compression.onnx import QuantisationError
from prunecast.compression.onnx.bind import resolve
from prunecast.compression.onnx.calibration import calibrate
from prunecast.compression.onnx.folding import Kernel, prepare
from prunecast.compression.onnx.graph import ExportedGraph, replace_items
from prunecast.compression.onnx.lattice import channel_steps
from prunecast.compression.release.selftest import Arrays
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    RawTensor,
    Tensor,
)

__all__ = ["QuantisedModel", "quantise"]

_TOP = 127
_LARGEST_BIAS = 2.0**30
_SMALLEST_SCALE = 2.0**-60
_BEYOND, _WIDER = 0.05, 0.5  # of the held range
_Values = Mapping[str, NDArray[Any]]
_Scaling = tuple[NDArray[Any], NDArray[Any]]  # scale and zero point


@dataclass(frozen=True)
class QuantisedModel:
    """A graph that computes in integers, and weights for it.

    Attributes:
        graph: the architecture; the same for every version of the weights.
        model: the weights.
        kernels: how many weights are integers.
        direct: how many of them are the published integers.
        activations: how many activations are quantised.
        fresh: names of those whose scale is new.
    """

    graph: ExportedGraph
    model: PublishedModel
    kernels: int
    direct: int
    activations: int
    fresh: tuple[str, ...]


def quantise(
    graph: ExportedGraph,
    model: PublishedModel,
    samples: Arrays,
    *,
    held: PublishedModel | None = None,
) -> QuantisedModel:
    """Quantise weights and activations to 8 bits.

    Deterministic: the same arguments and versions of onnxruntime give the same bytes.

    Args:
        graph: the architecture.
        model: the weights.
        samples: real inputs by name, the batch first; what activations are measured on.
        held: the version that devices hold, made by this function before; its scales are kept
            where they fit.

    Raises:
        QuantisationError: nothing can be quantised, or the samples do not fit.
        BindError: the model does not fit the graph.
    """
    tensors = {parameter: tensor for parameter, _, tensor in resolve(graph, model)}
    values = {name: tensor.dense() for name, tensor in tensors.items()}
    prepared = prepare(graph)
    if not prepared.kernels:
        raise QuantisationError(
            "no weight can become integers: they are those of Conv, Gemm and MatMul, float32, "
            "each read by one node alone"
        )
    arrays = {name: values[name] for name in prepared.parameters}
    for kernel in prepared.kernels:
        arrays |= kernel.folded(values)
    proto = calibrate(
        prepared.proto, arrays, [k.node for k in prepared.kernels], prepared.passing, samples
    )
    work = {name: tensors[name] for name in prepared.parameters}
    activations = _activations(proto, held)
    fresh = []
    for name, (scale, zero, kept) in activations.items():
        work[f"{name}_scale"] = RawTensor(scale)
        work[f"{name}_zero_point"] = RawTensor(zero)
        if not kept:
            fresh.append(name)
    parts, direct = _Parts(proto), 0
    for kernel in prepared.kernels:
        source = _input_scale(parts, kernel)
        into = float(activations[source][0])
        direct += _weigh(work, kernel, tensors[kernel.source], values, into, held)
        parts.rewire(kernel, source)
    parts.measure_integers()
    constants = [i for i in proto.graph.initializer if i.name not in work]
    skeleton = parts.finish(constants, work)
    integers = tuple(k.source for k in prepared.kernels)
    unread = tuple(f"{k.source}::base" for k in prepared.kernels)
    read = {n: t for n, t in work.items() if n not in unread}
    exported = ExportedGraph(
        skeleton,
        {n: TensorSpec(np.dtype(t.dtype), t.shape) for n, t in read.items()},
        unused=unread,
        max_difference=graph.max_difference,
        integers=integers,
    )
    made = PublishedModel(work, model.counter)
    return QuantisedModel(
        exported, made, len(prepared.kernels), direct, len(activations), tuple(fresh)
    )


def _activations(
    proto: Any, held: PublishedModel | None
) -> dict[str, tuple[NDArray[Any], NDArray[Any], bool]]:
    """Scale, zero point, and whether they are the held ones, of each quantised activation."""
    constants = {i.name: i for i in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[1] not in constants:
            continue
        name = node.input[1].removesuffix("_scale")
        if name in found or node.input[2] != f"{name}_zero_point":
            continue
        scale, zero = (numpy_helper.to_array(constants[n]) for n in node.input[1:3])
        before = _held(held, name, scale, zero)
        if before is not None and _fits(before, (scale, zero)):
            found[name] = (*before, True)
        else:
            found[name] = (scale, zero, False)
    return found


def _held(
    held: PublishedModel | None, name: str, scale: NDArray[Any], zero: NDArray[Any]
) -> _Scaling | None:
    found = []
    for part, like in (("scale", scale), ("zero_point", zero)):
        tensor = held.tensors.get(f"{name}_{part}") if held is not None else None
        if not isinstance(tensor, RawTensor):
            return None
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            return None
        found.append(tensor.values)
    return found[0], found[1]


def _fits(before: _Scaling, now: _Scaling) -> bool:
    (low, high), (least, most) = map(_range, (before, now))
    slack = _BEYOND * (high - low)
    return low - slack <= least and most <= high + slack and most - least >= _WIDER * (high - low)


def _range(scaling: _Scaling) -> tuple[float, float]:
    scale, zero = scaling
    info = np.iinfo(zero.dtype)
    return float(scale) * (info.min - int(zero)), float(scale) * (info.max - int(zero))


def _weigh(
    work: dict[str, Tensor],
    kernel: Kernel,
    tensor: Tensor,
    values: _Values,
    into: float,
    held: PublishedModel | None,
) -> bool:
    """Integers, scale and bias of one kernel, `into` being the scale of its input.

    Returns:
        Whether the integers are the published ones.
    """
    name, axis = kernel.source, kernel.axis
    gain, bias = kernel.gain_and_bias(values, tensor.shape[axis])
    shape = [1] * len(tensor.shape)
    shape[axis] = -1
    lattice = tensor if isinstance(tensor, LatticeTensor) else None
    published = None if lattice is None else lattice.step
    direct = lattice is not None and int(np.abs(lattice.q.astype(np.int32)).max()) <= _TOP
    if lattice is not None and direct:
        q, step = lattice.q.astype(np.float64), lattice.step
        base = np.full(gain.shape, step)
    else:
        wide = values[name].astype(np.float64)
        before, found = (held.tensors.get(n) if held else None for n in (f"{name}::base", name))
        step = 1.0 if published is None else published
        base = channel_steps(wide, axis, _TOP, before=before, lattice=published)
        q = np.clip(np.rint(wide / base.reshape(shape)), -_TOP, _TOP)
        if isinstance(before, RawTensor) and isinstance(found, LatticeTensor):
            step = found.step  # in name only; another one would tell a patch that q has moved
    # Always there: a model in which a weight outgrows 8 bits has the same tensors as before.
    work[f"{name}::base"] = RawTensor(base.astype(np.float32))
    exact = base * np.abs(gain)
    # A bias must fit into 32 bits: a channel whose gain all but vanishes gets a larger scale.
    scale = np.maximum(exact, np.abs(bias) / (into * _LARGEST_BIAS))
    scale = np.maximum(scale, _SMALLEST_SCALE).astype(np.float32)
    ratio = np.where(exact < scale * 0.999, exact / scale, 1.0) * np.where(gain < 0, -1.0, 1.0)
    q = np.rint(q * ratio.reshape(shape)).astype(np.int32)
    pruned = lattice is not None and lattice.pruned
    work[name] = LatticeTensor(q, step, pruned, np.dtype(np.float32))
    work[f"{name}::scale"] = RawTensor(scale)
    if kernel.bias is not None:
        unit = (np.float32(into) * scale).astype(np.float64)  # as the device multiplies
        offset = np.clip(np.rint(bias / unit), -(2.0**31), 2.0**31 - 1)
        work[f"{name}::offset"] = RawTensor(offset.astype(np.int32))
    return direct


def _input_scale(parts: _Parts, kernel: Kernel) -> str:
    node = parts.made[parts.nodes[kernel.node].input[0]]
    return str(node.input[1]).removesuffix("_scale")


class _Parts:
    """The quantised model, taken apart and put together with our names."""

    def __init__(self, proto: Any) -> None:
        self._proto = proto
        self.nodes = {node.name: node for node in proto.graph.node}
        self.made = {o: node for node in proto.graph.node for o in node.output}
        self._early: list[Any] = []
        self._zeros: dict[str, NDArray[Any]] = {}

    def rewire(self, kernel: Kernel, activation: str) -> None:
        """Let a kernel read its weight and bias by our names."""
        node, name = self.nodes[kernel.node], kernel.source
        weight, integers = self.made[node.input[1]], f"{name}::q"
        if weight.op_type != "DequantizeLinear":
            raise QuantisationError(f"the weight {name!r} was not quantised")
        if kernel.perm is not None:
            self._early.append(
                helper.make_node(
                    "Transpose", [integers], [f"{name}::turned"], f"{name}::turn", perm=kernel.perm
                )
            )
            integers = f"{name}::turned"
        zero = next(i for i in self._proto.graph.initializer if i.name == weight.input[2])
        self._zeros[f"{name}::zero"] = numpy_helper.to_array(zero)
        weight.input[:] = [integers, f"{name}::scale", f"{name}::zero"]
        if kernel.bias is not None:
            bias = self.made[node.input[2]]
            self._early.append(
                helper.make_node(
                    "Mul",
                    [f"{activation}_scale", f"{name}::scale"],
                    [f"{name}::unit"],
                    f"{name}::unit",
                )
            )
            bias.input[:] = [f"{name}::offset", f"{name}::unit"]

    def measure_integers(self) -> None:
        """Let shapes be read off the integers: whoever else reads floats keeps them in the way."""
        for node in self._proto.graph.node:
            source = self.made.get(node.input[0]) if node.op_type == "Shape" else None
            if source is not None and source.op_type == "DequantizeLinear":
                node.input[0] = source.input[0]

    def finish(self, constants: list[Any], tensors: Mapping[str, Tensor]) -> bytes:
        """The skeleton: constants that are still read, and no weights."""
        body = self._proto.graph
        read = {name for node in [*self._early, *body.node] for name in node.input}
        kept = [i for i in constants if i.name in read]
        kept += [numpy_helper.from_array(v, n) for n, v in sorted(self._zeros.items())]
        replace_items(body.initializer, sorted(kept, key=lambda i: str(i.name)))
        replace_items(body.node, [*self._early, *body.node])
        del body.value_info[:]
        self._proto.producer_name, self._proto.producer_version = "prunecast", ""
        return bytes(self._proto.SerializeToString(deterministic=True))
