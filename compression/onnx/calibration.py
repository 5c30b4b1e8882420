"""onnxruntime's static quantisation, with the settings of a release."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from prunecast.common.text import first_line, quiet
from prunecast.compression.onnx import QuantisationError
from prunecast.compression.release.selftest import Arrays

__all__ = ["batches", "calibrate"]

_BATCH = 32
_LOWEST_OPSET = 13  # DequantizeLinear along an axis
_PREPARED = ("onnx.infer", "onnxruntime.quant")  # otherwise the tool asks for pre-processing
_OPTIONS = {
    # Outputs of layers without a channel axis stay float: integers would cost precision there,
    # in logits above all, and win no time.
    "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
    "ActivationSymmetric": False,
    "WeightSymmetric": True,
    "QDQDisableWeightAdjustForInt32Bias": True,  # done where our own scales are chosen
}


def batches(
    samples: Arrays, shapes: Mapping[str, Sequence[int | str]]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Samples in the order given, as many at a time as the model takes.

    Args:
        samples: inputs by name, the batch first.
        shapes: what the model takes, by name; a free dimension is a string.

    Raises:
        QuantisationError: other inputs than the model's, or fewer samples than one batch.
    """
    if set(samples) != set(shapes):
        raise QuantisationError(
            f"the samples hold {sorted(samples)}, the model takes {sorted(shapes)}"
        )
    if any(not np.ndim(a) for a in samples.values()):
        raise QuantisationError("samples have the batch as their first dimension")
    counts = {len(a) for a in samples.values()}
    if len(counts) != 1:
        raise QuantisationError(f"the inputs hold {sorted(counts)} samples: give equally many")
    fixed = {shape[0] for shape in shapes.values() if shape and isinstance(shape[0], int)}
    size, count = int(min(fixed, default=_BATCH)), counts.pop()
    whole = count - count % size if fixed else count
    if not whole:
        raise QuantisationError(f"{count} samples do not fill one batch of {size}")
    for start in range(0, whole, size):
        yield {name: np.asarray(a[start : start + size]) for name, a in samples.items()}


def calibrate(
    proto: Any,
    arrays: Mapping[str, NDArray[Any]],
    kernels: Collection[str],
    passing: Collection[str],
    samples: Arrays,
) -> Any:
    """Quantise weights of `kernels` and the activations between them.

    Args:
        proto: a model whose nodes have names; `arrays` are its missing initialisers.
        arrays: weights and biases by name.
        kernels: names of nodes that compute in integers.
        passing: names of nodes that integers pass through.
        samples: inputs by name.

    Returns:
        The model that onnxruntime made, with everything inside.

    Raises:
        QuantisationError: the tool refuses, or the samples do not fit.
    """
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset < _LOWEST_OPSET:
        raise QuantisationError(
            f"opset {opset} cannot dequantise along an axis: export with {_LOWEST_OPSET} or later"
        )
    try:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    except ImportError as error:
        raise QuantisationError("this needs onnxruntime: install prunecast[server]") from error
    whole = type(proto)()
    whole.CopyFrom(proto)
    whole.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    entry = whole.metadata_props.add()
    entry.key, entry.value = _PREPARED
    shapes = {
        i.name: [
            d.dim_value if d.HasField("dim_value") else str(d.dim_param or "free")
            for d in i.type.tensor_type.shape.dim
        ]
        for i in proto.graph.input
    }
    chosen = {*kernels, *passing}
    types = sorted({node.op_type for node in whole.graph.node if node.name in chosen})
    _declare(whole.graph, chosen)
    parts = iter(list(batches(samples, shapes)))
    reader = SimpleNamespace(get_next=lambda: next(parts, None))
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "quantised.onnx"
        try:
            quantize_static(
                whole,
                path,
                reader,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=types,
                nodes_to_quantize=sorted(chosen),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options=dict(_OPTIONS),
            )
        except Exception as error:  # the tool raises its own, onnx's and plain errors
            raise QuantisationError(
                f"onnxruntime cannot quantise the model: {first_line(error)}"
            ) from error
        made = onnx.load(path)
    del made.metadata_props[:]
    made.metadata_props.extend(proto.metadata_props)
    return made


def _declare(body: Any, chosen: Collection[str]) -> None:
    """Say that what flows between the chosen nodes is float32.

    The tool measures tensors of a known type only, and operators that onnx defines as functions
    (``GroupNormalization``) end its inference of types.
    """
    known = {i.name for i in (*body.input, *body.output, *body.initializer)}
    for node in body.node:
        if node.name in chosen:
            carried = node.input if node.op_type in ("Add", "Concat") else node.input[:1]
            for name in (*carried, *node.output):
                if name and name not in known:
                    known.add(name)
                    entry = body.value_info.add(name=name)
                    entry.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
