"""Which tensors are quantised, and with which step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import (
    relative_error,
    spread,
    step_for_bits,
    step_for_error,
)
from prunecast.compression.files.codings import Coded, lattice_coding, put_on_lattice, restore
from prunecast.compression.files.errors import FilesError, UnsupportedTensor
from prunecast.compression.files.tensors import FileSpec, FileTensor, TensorFile

__all__ = ["KEPT", "Lossy", "choose_steps"]

KEPT = ("*running_mean", "*running_var", "*num_batches_tracked")
"""Names that are never quantised: statistics, on which every output depends."""

_SMALLEST = 16  # elements; below, the step alone costs more than rounding saves
_VECTOR = 0.25  # biases and norms are few and sensitive: a finer lattice for them

Measure = Callable[[Mapping[str, Coded]], int]


@dataclass(frozen=True)
class Lossy:
    """How floating tensors are quantised; exactly one of step, error and bits.

    Attributes:
        step: lattice step of all tensors, in the unit of the values.
        error: relative L2 error, ``||x - restored|| / ||x||``, of every tensor by itself.
        bits: bits per parameter of the whole file; steps follow each tensor's standard deviation,
            and are four times finer for tensors of fewer than two dimensions.
        common: for `error` and `bits`, one step for all tensors instead; the error is then that
            of all together, before bfloat16 is rounded.
        dead_zone: part of a step, above 0 and up to 1, below which a magnitude is rounded down.
        kept: further name patterns that stay exact, see `KEPT`.
    """

    step: float | None = None
    error: float | None = None
    bits: float | None = None
    common: bool = False
    dead_zone: float = 0.5
    kept: Sequence[str] = ()

    def __post_init__(self) -> None:
        given = [v for v in (self.step, self.error, self.bits) if v is not None]
        if len(given) != 1:
            raise FilesError("give exactly one of step, error and bits")
        if not (math.isfinite(given[0]) and given[0] > 0):
            raise FilesError(f"step, error and bits are numbers above zero, not {given[0]}")

    def takes(self, name: str, spec: FileSpec) -> bool:
        """Whether a tensor is quantised: large enough, floating, and not to be kept."""
        patterns = (*KEPT, *self.kept)
        kept = any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)
        return spec.floating and spec.size >= _SMALLEST and not kept


def choose_steps(source: TensorFile, lossy: Lossy, measure: Measure) -> dict[str, float]:
    """Return the step of every tensor to be quantised.

    Args:
        source: the tensors.
        lossy: what is wanted.
        measure: bytes of the whole file, given these tensors as they would be coded.

    Raises:
        UnsupportedTensor: a tensor to be quantised holds NaN or an infinity.
        QuantiseError: what is wanted cannot be had; the message says what can.
    """
    reals: dict[str, NDArray[Any]] = {}
    dtypes: dict[str, str] = {}
    steps: dict[str, float] = {}
    together = lossy.bits is not None or lossy.common
    for name, spec in source.specs.items():
        if not lossy.takes(name, spec):
            continue
        tensor = source[name]
        real = tensor.real()
        if not np.isfinite(real).all():
            raise UnsupportedTensor(
                f"tensor {name!r} holds NaN or an infinity and cannot be quantised; keep it as it "
                f"is with --keep {name!r}"
            )
        if lossy.step is not None:
            steps[name] = float(np.float32(lossy.step))
        elif together:
            reals[name], dtypes[name] = real, tensor.dtype
        else:
            steps[name] = _step_of_one(name, tensor, lossy)
    if not reals:
        if lossy.bits is not None:
            raise UnsupportedTensor(f"{source.path} holds no floats to quantise to so many bits")
        return steps
    if lossy.error is not None:
        return step_for_error(reals, lossy.error, dead_zone=lossy.dead_zone)

    def length(q: Mapping[str, NDArray[np.int32]], chosen: Mapping[str, float]) -> int:
        return measure({n: Coded(v, lattice_coding(dtypes[n]), chosen[n]) for n, v in q.items()})

    assert lossy.bits is not None
    return step_for_bits(
        reals,
        lossy.bits,
        dead_zone=lossy.dead_zone,
        relative_to=None if lossy.common else {n: _scale(x) for n, x in reals.items()},
        measure=length,
        parameters=source.size,
    )


def _scale(real: NDArray[Any]) -> float:
    unit = max(spread(real, "std"), 1e-3 * spread(real, "rms")) or 1.0
    return unit * (1.0 if real.ndim > 1 else _VECTOR)


def _step_of_one(name: str, tensor: FileTensor, lossy: Lossy) -> float:
    """Step at which a tensor's own error is at most the wanted one, after its dtype's rounding."""
    assert lossy.error is not None
    real, wanted = tensor.real(), lossy.error
    while True:
        step = step_for_error({name: real}, wanted, dead_zone=lossy.dead_zone)[name]
        coded = put_on_lattice(tensor, step, dead_zone=lossy.dead_zone, name=name)
        error = relative_error(real, restore(coded).real())
        if error <= lossy.error:
            return step
        wanted *= 0.99 * lossy.error / error  # bfloat16 rounds what the lattice gives
