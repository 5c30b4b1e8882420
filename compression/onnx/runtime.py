"""One way to open a model in onnxruntime, on the server and on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.onnx.errors import InputRefused, RuntimeFailure

__all__ = ["InferenceSession", "Signature", "open_session"]

_DTYPES = {
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{
        f"tensor({sign}int{bits})": f"{sign}int{bits}"
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


@dataclass(frozen=True)
class Signature:
    """Name, numpy dtype name and shape of one input or output; a free dimension is a string."""

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
        """Outputs by name.

        Raises:
            InputRefused: an input is missing, unknown, or has the wrong dtype or shape.
            RuntimeFailure: onnxruntime failed.
        """
        self._check(inputs)
        try:
            values = self._session.run(None, dict(inputs))
        except Exception as error:  # onnxruntime raises its own and RuntimeError
            raise RuntimeFailure(f"inference failed: {_first_line(error)}") from error
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
            if array.dtype.name != want.dtype or not fits:
                raise InputRefused(
                    f"input {name!r} must be {want.dtype}{list(want.shape)}, "
                    f"not {array.dtype.name}{list(array.shape)}"
                )


def open_session(path: Path, *, threads: int | None = None) -> InferenceSession:
    """Load a model file (and the `weights.bin` beside it) on the CPU.

    Args:
        path: the ``.onnx`` file.
        threads: threads within an operator; None leaves the choice to onnxruntime.

    Raises:
        RuntimeFailure: onnxruntime is not installed or refuses the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeFailure("onnxruntime is missing: pip install 'prunecast[edge]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: they reach the caller as exceptions
    # Without this, DequantizeLinear stays in the graph and dequantises at every inference. With
    # it, lattice weights become float constants while loading: same values, speed of fp32.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime raises its own and RuntimeError
        raise RuntimeFailure(f"onnxruntime refuses {path}: {_first_line(error)}") from error
    return InferenceSession(session)


def _signature(node: Any) -> Signature:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise RuntimeFailure(f"{node.name!r} is a {node.type}, which is not supported")
    shape = tuple(n if isinstance(n, int) else str(n or "dynamic") for n in node.shape)
    return Signature(str(node.name), dtype, shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
