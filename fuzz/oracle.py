"""What must hold whatever the bytes: the check behind every execution and behind the tests.

An *input* is one byte that says how to read (:class:`Mode`), then a payload. The contexts are
fixed, so an input means the same on every machine and in every run.
"""

from __future__ import annotations

import time
import tracemalloc
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import (
    CodecError,
    Context,
    Limits,
    Payload,
    TensorSpec,
    decode,
    encode,
    measure_costs,
    open_payload,
    outline_payload,
    payload_length,
)

__all__ = ["CONTEXTS", "TIGHT", "Finding", "Mode", "Outcome", "check"]

TIGHT = Limits(
    payload_bytes=1 << 16,
    tensors=32,
    name_bytes=32,
    dimensions=6,
    elements=1 << 14,
    decoded_bytes=1 << 17,
    free_bytes=1 << 15,
    expansion=64,
    serial_symbols=1 << 12,
    levels=1 << 9,
    segments=48,
    lanes=48,
    all_name_bytes=1 << 9,
    steps=1 << 12,
    table_slots=1 << 16,
)
_READ_BELOW = 1 << 20
"""Decoded bytes up to which tensors are read under the default limits."""

# The bound on traced memory: so much for each byte that the specs state, for each of the payload,
# for each slot of tables that the limits admit, and for the models of the head and its maps.
_PER_DECODED_BYTE = 24
_PER_PAYLOAD_BYTE = 64
_PER_SLOT = 16
_ALWAYS = 4 << 20
_SECONDS = 20.0
"""Processor time of one input: a hang detector, generous because coverage slows code down."""


class Finding(Exception):
    """An input breaks a promise of the decoder."""


@dataclass(frozen=True)
class Mode:
    """How an input is read.

    Attributes:
        context: index into :data:`CONTEXTS`.
        generous: the default limits instead of :data:`TIGHT`.
        order: 0 ``decode`` (under the default limits: one by one), 1 last tensor first, 2 every
            tensor twice in turn, 3 an unknown name first, then from both ends.
    """

    context: int = 0
    generous: bool = False
    order: int = 0

    @classmethod
    def of(cls, byte: int) -> Mode:
        """Read a mode byte; its two highest bits are not used."""
        return cls(byte & 7, bool(byte >> 3 & 1), byte >> 4 & 3)

    @property
    def byte(self) -> int:
        """The first byte of an input in this mode."""
        return self.context | self.generous << 3 | self.order << 4

    @property
    def limits(self) -> Limits:
        """What the receiver accepts."""
        return Limits() if self.generous else TIGHT


@dataclass(frozen=True)
class Outcome:
    """What one execution came to."""

    result: str
    """``decoded``, ``opened`` (too large to read), or the class of the first error."""
    seconds: float
    peak: int = 0
    """Traced bytes at the highest point; 0 where memory was not traced."""
    unforeseen: str = ""
    """Foreign exception behind the error, if no check of the decoder's own came first."""


def _spec(dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(np.dtype(dtype), shape)


def _contexts() -> tuple[Context, ...]:
    rng = np.random.default_rng(20240701)
    held = np.rint(rng.laplace(size=(9, 12)) * 6).astype(np.int32)
    held[np.abs(held) < 4] = 0
    wide = rng.integers(-(2**63), 2**63 - 1, 7, endpoint=True)
    wide[:3] = -(2**63), 2**63 - 1, 0
    f4 = (rng.normal(size=(5, 4)) * 0.1).astype("f4")
    f4[0] = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], "u4").view("f4")
    mask = rng.random((9, 12)) < 0.3
    mixed = {
        "w": _spec("i4", 6, 10), "b": _spec("i1", 10), "h": _spec("f2", 3),
        "none": _spec("u8", 0, 5), "t": _spec("?", 9), "s": _spec("i8"),
    }  # fmt: skip
    both = {"w": _spec("i4", 9, 12), "v": _spec("i8", 7), "n": _spec("i1", 9, 12)}
    integers: dict[str, NDArray[Any]] = {
        "w": held, "v": wide, "n": held.astype("i1"), "u": held.astype("u1"),
    }  # fmt: skip
    floats = {"w": f4, "d": np.array([np.inf, -0.0, 5e-324]), "h": f4.astype("f2")}
    return (
        Context(),
        Context(layout=mixed),
        Context(mask={"w": mask, "v": np.ones(7, bool), "e": np.zeros((3, 4), bool)}),
        Context(previous=integers),
        Context(previous=floats),
        Context(layout=both, mask={"w": mask, "n": mask}, previous=integers),
        Context(mask={"w": rng.random((5, 4)) < 0.5}, previous=floats),
        Context(layout={"w": _spec("i2", 12, 15), "x": _spec("i4", 64, 8), "f": _spec("f4", 3, 7)}),
    )


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # float16 of the extremes overflows, as it should
    CONTEXTS = _contexts()
"""nothing; layout; mask; previous integers; previous floats; all three; mask and floats; layout."""


def check(data: bytes, *, thorough: bool = False, trace: bool = False) -> Outcome:
    """Run one input; Finding where the decoder breaks a promise.

    Args:
        data: mode byte and payload.
        thorough: re-encode whatever decodes (else every 128th, chosen by checksum).
        trace: measure memory with tracemalloc and hold it against the bound.
    """
    mode = Mode.of(data[0] if data else 0)
    payload = data[1:]
    limits, context = mode.limits, CONTEXTS[mode.context]
    if trace:
        tracemalloc.start()
    started = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result, unforeseen, stated, values = _read(payload, context, limits, mode)
        seconds = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1] if trace else 0
    finally:
        if trace:
            tracemalloc.stop()
    if trace:
        bound = _ALWAYS + _PER_SLOT * limits.table_slots
        bound += _PER_DECODED_BYTE * stated + _PER_PAYLOAD_BYTE * len(payload)
        if peak > bound:
            raise Finding(f"{len(payload)} bytes took {peak} bytes of memory, above {bound}")
    if seconds > _SECONDS:
        raise Finding(f"{len(payload)} bytes took {seconds:.1f} s")
    chance = zlib.crc32(data)
    if result == "decoded" and (thorough or chance % 128 == 0):
        _encode_again(values, context)
    if thorough or chance % 16 == 1:
        _measure(payload, context, limits, decodes=result == "decoded")
    return Outcome(result, seconds, peak, unforeseen)


def _read(
    payload: bytes, context: Context, limits: Limits, mode: Mode
) -> tuple[str, str, int, dict[str, NDArray[Any]]]:
    """Result, foreign exception, stated bytes, and all tensors if none failed."""
    if mode.order == 0 and not mode.generous:
        return _decode(payload, context, limits)
    try:
        opened = open_payload(payload, context=context, limits=limits)
    except CodecError as error:
        return type(error).__name__, _foreign(error), 0, {}
    except Exception as error:
        raise Finding(f"open_payload raised {type(error).__name__}: {error}") from error
    specs = dict(opened.specs)
    if list(opened) != list(specs) or len(opened) != len(specs):
        raise Finding("the payload's names are not those of its specs")
    stated = _within(specs, limits)
    if stated > _READ_BELOW:
        return "opened", "", stated, {}
    result, foreign, values = _read_in_order(opened, specs, mode.order)
    return result, foreign, stated, values


def _decode(
    payload: bytes, context: Context, limits: Limits
) -> tuple[str, str, int, dict[str, NDArray[Any]]]:
    try:
        values = decode(payload, context=context, limits=limits)
    except CodecError as error:
        return type(error).__name__, _foreign(error), limits.decoded_bytes, {}
    except Exception as error:
        raise Finding(f"decode raised {type(error).__name__}: {error}") from error
    specs = context.layout
    if specs is None:
        specs = {name: TensorSpec(v.dtype, v.shape) for name, v in values.items()}
    if list(specs) != list(values):
        raise Finding("the tensors are not those of the layout")
    for name, value in values.items():
        _compare_spec(name, value, specs[name])
    return "decoded", "", _within(specs, limits), values


def _within(specs: Mapping[str, TensorSpec], limits: Limits) -> int:
    """Bytes that the specs state; Finding if they are above the limits."""
    stated = sum(max(s.nbytes, 4 * s.size) for s in specs.values())
    elements = sum(s.size for s in specs.values())
    if stated > limits.decoded_bytes or elements > limits.elements or len(specs) > limits.tensors:
        raise Finding(f"{len(specs)} tensors of {stated} bytes were let in, above the limits")
    return stated


def _read_in_order(
    opened: Payload, specs: Mapping[str, TensorSpec], order: int
) -> tuple[str, str, dict[str, NDArray[Any]]]:
    names = list(specs)
    if order == 0:
        sequence = names
    elif order == 1:
        sequence = names[::-1] + names
    elif order == 2:
        sequence = [n for name in names for n in (name, names[0], name)]
    else:
        sequence = [n for pair in zip(names[::-1], names, strict=True) for n in pair]
        try:
            opened["\0 no such tensor"]
        except KeyError:
            pass
        else:
            raise Finding("a tensor that is not there was read")
    values: dict[str, NDArray[Any]] = {}
    errors: dict[str, CodecError] = {}
    for name in sequence:
        try:
            value = opened[name]
        except CodecError as error:
            if name in values:
                raise Finding(f"tensor {name!r} was read once, but not twice") from error
            errors.setdefault(name, error)
            continue
        except Exception as error:
            raise Finding(f"{name!r} raised {type(error).__name__}: {error}") from error
        if name in errors:
            raise Finding(f"tensor {name!r} was refused once, but not twice") from errors[name]
        _compare_spec(name, value, specs[name])
        if name in values and values[name].tobytes() != value.tobytes():
            raise Finding(f"tensor {name!r} changed from one reading to the next")
        values[name] = value
    for first in errors.values():
        return type(first).__name__, _foreign(first), {}
    return "decoded", "", {name: values[name] for name in names}


def _compare_spec(name: str, value: NDArray[Any], spec: TensorSpec) -> None:
    if type(value) is not np.ndarray:
        raise Finding(f"tensor {name!r} is a {type(value).__name__}, not an array")
    if value.dtype != spec.dtype or value.shape != spec.shape:
        raise Finding(f"tensor {name!r} is {value.dtype} {value.shape}, not {spec}")
    if value.dtype == bool and (value.view(np.uint8) > 1).any():
        raise Finding(f"tensor {name!r} is bool, but holds other bytes than 0 and 1")


def _foreign(error: CodecError) -> str:
    """The exception that the outermost safety net caught, if it was that which answered."""
    cause = error.__cause__
    if isinstance(cause, MemoryError):
        raise Finding(f"memory ran out: {error}") from error
    if cause is None or isinstance(cause, (CodecError, UnicodeDecodeError)):
        return ""
    return f"{type(cause).__name__}: {cause}"


def _measure(payload: bytes, context: Context, limits: Limits, *, decodes: bool) -> None:
    """What reports on payloads must stand hostile ones as well, and add up."""
    for look in (payload_length, lambda p: outline_payload(p, limits)):
        try:
            look(payload)
        except CodecError:
            if decodes:
                raise Finding("a payload that decodes has no outline") from None
    if not decodes:
        limits = TIGHT
    try:
        costs = measure_costs(payload, context=context, limits=limits)
    except CodecError as error:
        if decodes:
            raise Finding(f"a payload that decodes cannot be measured: {error}") from error
        return
    except Exception as error:
        raise Finding(f"measure_costs raised {type(error).__name__}: {error}") from error
    whole = sum(costs.sections.values())
    if whole != len(payload) or costs.common < 0:
        raise Finding(f"{len(payload)} bytes are said to be {whole}, {costs.common} of them common")


def _encode_again(values: Mapping[str, NDArray[Any]], context: Context) -> None:
    """Values that came out of a payload must survive a round trip, bit for bit."""
    try:
        again = decode(encode(values, context=context), context=context)
    except Exception as error:
        raise Finding(f"decoded tensors cannot be encoded again: {error!r}") from error
    if list(again) != list(values):
        raise Finding("names changed when encoded again")
    for name, value in values.items():
        if again[name].dtype != value.dtype or again[name].shape != value.shape:
            raise Finding(f"tensor {name!r} changed its spec when encoded again")
        if again[name].tobytes() != value.tobytes():
            raise Finding(f"tensor {name!r} changed its values when encoded again")
