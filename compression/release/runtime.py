"""One way to open a model in onnxruntime, on the server and on the device."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.text import first_line
from prunecast.compression.release import InputRefused, RuntimeFailure
from prunecast.compression.release.selftest import dtype_name

__all__ = [
    "InferenceSession",
    "Signature",
    "computes_in_integers",
    "fit_inputs",
    "import_onnxruntime",
    "open_session",
]

_SWITCH = "ORT_DISABLE_TELEMETRY"

# A node's operator (field 4 of NodeProto) as it is serialised: the device has no onnx to ask.
_QUANTISES = b"\x22\x0eQuantizeLinear"

_DTYPES = {
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    "tensor(string)": "str",
    **{
        f"tensor({sign}int{bits})": f"{sign}int{bits}"
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


@dataclass(frozen=True)
class Signature:
    """Name, numpy dtype name and shape of one input or output; a free dimension is a string.

    Texts are of dtype ``str``, whatever their length.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class InferenceSession:
    """An onnxruntime session on the CPU; safe to call from several threads.

    Attributes:
        inputs: what `run` takes.
        outputs: what `run` gives.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = tuple(_signature(node) for node in session.get_inputs())
        self.outputs = tuple(_signature(node) for node in session.get_outputs())

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Outputs by name; texts as objects, since one long one would set the size of all.

        Raises:
            InputRefused: an input is missing, unknown, or has the wrong dtype or shape.
            RuntimeFailure: onnxruntime failed.
        """
        self._check(inputs)
        try:
            # onnxruntime takes texts as objects
            given = {n: a.astype(object) if a.dtype.kind == "U" else a for n, a in inputs.items()}
            values = self._session.run(None, given)
        except Exception as error:  # onnxruntime raises its own and RuntimeError
            raise RuntimeFailure(f"inference failed: {first_line(error)}") from error
        return {s.name: np.asarray(v) for s, v in zip(self.outputs, values, strict=True)}

    def _check(self, inputs: Mapping[str, NDArray[np.generic]]) -> None:
        wanted = {s.name: s for s in self.inputs}
        if set(inputs) != set(wanted):
            raise InputRefused(
                f"the model takes the inputs {sorted(wanted)}, not {sorted(map(str, inputs))}"
            )
        for name, array in inputs.items():
            want = wanted[name]
            fits = len(array.shape) == len(want.shape) and all(
                isinstance(n, str) or n == m for n, m in zip(want.shape, array.shape, strict=True)
            )
            if dtype_name(array) != want.dtype or not fits:
                raise InputRefused(
                    f"input {name!r} must be {want.dtype}{list(want.shape)}, "
                    f"not {dtype_name(array)}{list(array.shape)}"
                )


def computes_in_integers(path: Path) -> bool:
    """Whether a model file quantises activations (``QuantizeLinear``).

    Raises:
        RuntimeFailure: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if not file.seek(0, 2):
                return False  # nothing to map
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return data.find(_QUANTISES) >= 0
    except OSError as error:
        raise RuntimeFailure(f"cannot read {path}: {error.strerror or error}") from error


def fit_inputs(
    given: Mapping[str, NDArray[np.generic]], wanted: Mapping[str, str]
) -> dict[str, NDArray[np.generic]]:
    """Inputs in the model's own dtypes, as far as that loses nothing but float precision.

    Files of samples often hold float64 or int32 where a model takes float32 or int64. Floats
    become floats and integers that fit become integers; anything else is left for the runtime to
    refuse by name.

    Args:
        given: inputs by name.
        wanted: numpy dtype names by name.

    >>> fit_inputs({"x": np.array([0.5])}, {"x": "float32"})["x"].dtype.name
    'float32'
    """
    fitted: dict[str, NDArray[np.generic]] = {}
    for name, values in given.items():
        array = np.asarray(values)
        dtype = np.dtype(wanted.get(name, array.dtype))
        if array.dtype.kind == dtype.kind == "f":
            array = array.astype(dtype, copy=False)
        elif array.dtype.kind in "iu" and dtype.kind in "iu" and array.size:
            info = np.iinfo(dtype)
            if info.min <= int(array.min()) and int(array.max()) <= info.max:
                array = array.astype(dtype, copy=False)
        fitted[name] = array
    return fitted


def import_onnxruntime() -> Any:
    """The module onnxruntime, which sends nothing to its makers.

    From 1.29 on, its Linux builds report sessions (names and hashes of models, times) to Microsoft,
    through a database in the user's cache folder, from the moment of the import. Only a variable
    in the environment keeps it from beginning. One that is set already, to whatever, is respected.

    Raises:
        RuntimeFailure: it is not installed.
    """
    try:
        if _SWITCH in os.environ or "onnxruntime" in sys.modules:
            return import_module("onnxruntime")
        os.environ[_SWITCH] = "1"
        try:
            return import_module("onnxruntime")
        finally:
            del os.environ[_SWITCH]
    except ImportError as error:
        raise RuntimeFailure("onnxruntime is missing: pip install 'prunecast[edge]'") from error


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    integers: bool | None = None,
    optimise: bool = True,
    save_optimised: Path | None = None,
) -> InferenceSession:
    """Load a model file (and the `weights.bin` beside it) on the CPU.

    Args:
        path: the ``.onnx`` file.
        threads: threads within an operator; None leaves the choice to onnxruntime.
        integers: compute in integers what the model quantises; None: if it quantises activations.
        optimise: False for a file that was written as `save_optimised`.
        save_optimised: where to write the optimised graph; its weights go beside it, into
            `weights.bin`. Both are for this CPU and this onnxruntime alone.

    Raises:
        RuntimeFailure: onnxruntime is not installed or refuses the file.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: they reach the caller as exceptions
    if computes_in_integers(path) if integers is None else integers:
        # x86 without VNNI adds pairs of products in 16 bits and saturates; with this it does not,
        # so that such a device computes what the server recorded.
        options.add_session_config_entry("session.x64quantprecision", "1")
    else:
        # Without this, DequantizeLinear stays in the graph and dequantises at every inference.
        # With it, lattice weights become float constants while loading: same values, speed of
        # fp32.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_optimised is not None:
        options.optimized_model_filepath = str(save_optimised)
        # weights in a file of their own are mapped, not copied, when they are loaded again
        external = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{external}file_name", "weights.bin")
        options.add_session_config_entry(f"{external}min_size_in_bytes", "1024")
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime raises its own and RuntimeError
        raise RuntimeFailure(f"onnxruntime refuses {path}: {first_line(error)}") from error
    return InferenceSession(session)


def _signature(node: Any) -> Signature:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise RuntimeFailure(f"{node.name!r} is a {node.type}, which is not supported")
    shape = tuple(n if isinstance(n, int) else str(n or "dynamic") for n in node.shape)
    return Signature(str(node.name), dtype, shape)
