"""One way to open a model in onnxruntime, on the server and on the device."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import re
import sys
import threading
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.text import first_line
from prunecast.compression.release import InputRefused, OutOfMemory, OutOfTime, RuntimeFailure
from prunecast.compression.release.overseer import OVERSEER
from prunecast.compression.release.selftest import dtype_name

__all__ = [
    "REFUSED",
    "InferenceSession",
    "Signature",
    "computes_in_integers",
    "fit_inputs",
    "import_onnxruntime",
    "one_example",
    "open_session",
    "return_freed_memory",
    "settings_text",
]

REFUSED = "refused"
"""Stands for the value of a setting that onnxruntime refuses for a model."""
_OLDEST = (1, 24)
_ARENAS = "session.use_env_allocators"
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

    Args:
        session: of onnxruntime.
        settings: that it was opened with.
        memory: bytes that it may take; what an inference took is then given back when it ends,
            except for that of its outputs. None: no limit.

    Attributes:
        inputs: what `run` takes.
        outputs: what `run` gives.
        settings: onnxruntime's session settings beyond its defaults, with their values; of those
            that it refused for this model the value is ``refused``.
    """

    def __init__(
        self,
        session: Any,
        settings: Mapping[str, str] | None = None,
        *,
        memory: int | None = None,
    ) -> None:
        self._session, self._memory = session, memory
        self.settings = dict(settings or {})
        self.inputs = tuple(_signature(node) for node in session.get_inputs())
        self.outputs = tuple(_signature(node) for node in session.get_outputs())

    def run(
        self, inputs: Mapping[str, NDArray[np.generic]], *, seconds: float = math.inf
    ) -> dict[str, NDArray[np.generic]]:
        """Outputs by name; texts as objects, since one long one would set the size of all.

        Args:
            inputs: arrays by name.
            seconds: after which it is broken off, between two operators.

        Raises:
            InputRefused: an input is missing, unknown, or has the wrong dtype or shape.
            OutOfTime: it took longer than `seconds`, or `OVERSEER.end_all` ended it.
            OutOfMemory: it needs more memory than the session may take.
            RuntimeFailure: onnxruntime failed.
        """
        self._check(inputs)
        options = import_onnxruntime().RunOptions()
        if self._memory is not None:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

        def end() -> None:
            options.terminate = True

        with OVERSEER.watching(seconds, end) as watched:
            try:
                # onnxruntime takes texts as objects
                given = {
                    n: a.astype(object) if a.dtype.kind == "U" else a for n, a in inputs.items()
                }
                values = self._session.run(None, given, options)
            except Exception as error:  # onnxruntime raises its own and RuntimeError
                if watched.ended == "time":
                    raise OutOfTime(f"inference did not end within {seconds:g} seconds") from error
                if watched.ended:
                    raise OutOfTime(f"inference was broken off: {watched.ended}") from error
                raise _failure("inference failed", error, self._memory) from error
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


def one_example(
    session: InferenceSession, inputs: Mapping[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]]:
    """What a session takes of the first example alone, in the model's own dtypes.

    Args:
        session: of the model.
        inputs: of any examples, by name; the first is taken where the batch is free.
    """
    free = {s.name for s in session.inputs if s.shape and isinstance(s.shape[0], str)}
    one = {name: array[:1] if name in free else array for name, array in inputs.items()}
    return fit_inputs(one, {s.name: s.dtype for s in session.inputs})


def import_onnxruntime() -> Any:
    """The module onnxruntime, which sends nothing to its makers.

    From 1.29 on, its Linux builds report sessions (names and hashes of models, times) to Microsoft,
    through a database in the user's cache folder, from the moment of the import. Only a variable
    in the environment keeps it from beginning. One that is set already, to whatever, is respected.

    Raises:
        RuntimeFailure: it is not installed, or too old: before 1.24 it reads external files of
            a model outside of the model's folder.
    """
    try:
        module = _import()
    except ImportError as error:
        raise RuntimeFailure("onnxruntime is missing: pip install 'prunecast[edge]'") from error
    found = re.match(r"(\d+)\.(\d+)", str(module.__version__))
    if found and (int(found[1]), int(found[2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise RuntimeFailure(
            f"onnxruntime {module.__version__} is too old, {oldest} is needed: "
            "pip install --upgrade 'prunecast[edge]'"
        )
    return module


def _import() -> Any:
    if _SWITCH in os.environ or "onnxruntime" in sys.modules:
        return import_module("onnxruntime")
    os.environ[_SWITCH] = "1"
    try:
        return import_module("onnxruntime")
    finally:
        del os.environ[_SWITCH]


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    integers: bool | None = None,
    optimise: bool = True,
    save_optimised: Path | None = None,
    memory: int | None = None,
) -> InferenceSession:
    """Load a model file (and the `weights.bin` beside it) on the CPU.

    Settings that this onnxruntime refuses for this model are left out and named so in
    `InferenceSession.settings`.

    Args:
        path: the ``.onnx`` file.
        threads: threads within an operator; None leaves the choice to onnxruntime.
        integers: compute in integers what the model quantises; None: if it quantises activations.
        optimise: False for a file that was written as `save_optimised`.
        save_optimised: where to write the optimised graph; its weights go beside it, into
            `weights.bin`. Both are for this CPU and this onnxruntime alone.
        memory: bytes that the session may take for weights that it converts and for tensors of
            all inferences that run at a time; None: no limit.

    Raises:
        OutOfMemory: the model needs more while it is loaded.
        RuntimeFailure: onnxruntime is not installed or refuses the file.
    """
    onnxruntime = import_onnxruntime()
    entries: dict[str, str] = {}
    if computes_in_integers(path) if integers is None else integers:
        # x86 without VNNI adds pairs of products in 16 bits and saturates; with this it does not,
        # so that such a device computes what the server recorded.
        entries["session.x64quantprecision"] = "1"
    else:
        # Without this, DequantizeLinear stays in the graph and dequantises at every inference.
        # With it, lattice weights become float constants while loading: same values, speed of
        # fp32.
        entries["session.disable_quant_qdq"] = "1"

    def load(entries: Mapping[str, str]) -> InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors reach the caller as exceptions
        for name, value in entries.items():
            options.add_session_config_entry(name, value)
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
        told = dict(entries)
        with nullcontext() if memory is None else _ARENA:
            limited = memory is not None and _limit_arena(onnxruntime, options, memory)
            if memory is not None:
                told[_ARENAS] = "1" if limited else REFUSED
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        return_freed_memory()
        return InferenceSession(session, told, memory=memory if limited else None)

    try:
        try:
            return load(entries)
        except RuntimeFailure:
            raise  # it loads, but has what we do not support
        except Exception as error:
            if isinstance(_failure("", error, memory), OutOfMemory):
                raise
            made = load({})  # refused for this model
            made.settings |= dict.fromkeys(entries, REFUSED)
            return made
    except RuntimeFailure:
        raise
    except Exception as error:  # onnxruntime raises its own and RuntimeError
        raise _failure(f"onnxruntime refuses {path}", error, memory) from error


def return_freed_memory() -> None:
    """Have the C library return to the system what is free.

    Fusing and reordering makes weights twice anew while a model is loaded. glibc would keep
    what the earlier ones took, for as long as the process lives. Other C libraries do as they do.
    """
    with suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


_ARENA = threading.Lock()  # onnxruntime has one place for the memory of the next session
_NO_MEMORY = re.compile(r"bfc_arena|[Ff]ailed to allocate|bad.alloc")


def _limit_arena(onnxruntime: Any, options: Any, memory: int) -> bool:
    """The session takes its memory from an arena of its own, which is as large as that.

    What a model's weights take while they are loaded counts, but is not refused: whoever loads a
    model that may be hostile must do that where memory is limited by other means.

    Returns:
        False where onnxruntime was built without arenas.
    """
    try:
        info = onnxruntime.OrtMemoryInfo(
            "Cpu",
            onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
            0,
            onnxruntime.OrtMemType.DEFAULT,
        )
        # -1: onnxruntime's own choice of how it grows and begins
        arena = onnxruntime.OrtArenaCfg(memory, -1, -1, -1)
        onnxruntime.create_and_register_allocator(info, arena)
    except Exception:  # onnxruntime raises its own and RuntimeError
        return False
    options.add_session_config_entry(_ARENAS, "1")
    return True


def settings_text(settings: Mapping[str, str]) -> str:
    """Session settings for people; those of the memory are left out where they are in force.

    >>> settings_text({"session.x64quantprecision": "refused", "session.use_env_allocators": "1"})
    'session.x64quantprecision refused'
    """
    shown = {k: v for k, v in settings.items() if k != _ARENAS or v == REFUSED}
    return ", ".join(f"{k} {v}" if v == REFUSED else f"{k}={v}" for k, v in shown.items())


def _failure(what: str, error: Exception, memory: int | None) -> RuntimeFailure:
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        allowed = "there is" if memory is None else f"the {memory:,} bytes that it may take"
        return OutOfMemory(f"{what}: it needs more memory than {allowed}")
    return RuntimeFailure(f"{what}: {first_line(error)}")


# What to do with inputs and outputs of other types, by a part of the type's name.
_REMEDIES = (
    (
        "map(",
        "classifiers of scikit-learn end in a ZipMap; export without it (skl2onnx: to_onnx(..., "
        "options={'zipmap': False}); onnxmltools: convert_lightgbm(..., zipmap=False)), so that "
        "the probabilities are one tensor",
    ),
    ("seq(", "export the model so that it takes and gives tensors, concatenated or one by one"),
    ("optional(", "export the model so that it always takes and gives a tensor"),
    ("sparse_tensor(", "export the model so that it takes and gives dense tensors"),
    ("bfloat16", "let the model cast it to float32 at its inputs and outputs"),
    ("", "let the model cast it to float32 or int8, or export it with other inputs and outputs"),
)


def _signature(node: Any) -> Signature:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        remedy = next(text for kind, text in _REMEDIES if kind in node.type)
        raise RuntimeFailure(f"{node.name!r} is a {node.type}, and no tensor of numpy: {remedy}")
    shape = tuple(n if isinstance(n, int) else str(n or "dynamic") for n in node.shape)
    return Signature(str(node.name), dtype, shape)
