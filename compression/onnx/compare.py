"""How far a rebuilt model computes from the original, both in onnxruntime on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.onnx import ForeignModel, NumericsError
from prunecast.compression.release import RuntimeFailure
from prunecast.compression.release.runtime import InferenceSession, Signature
from prunecast.compression.release.selftest import Arrays, distances, dtype_name, same_values

__all__ = ["Difference", "differ", "draw_inputs", "record"]

_BATCH = 2
_SIZES = (16, 32, 8, 64, 128, 224, 4, 2, 1)  # tried for other free dimensions
_REPEAT = 1e-4  # relative; sums in another order stay below, drawn numbers do not


@dataclass(frozen=True)
class Difference:
    """Between two models' outputs on the same inputs.

    Attributes:
        absolute: largest absolute difference.
        relative: that over the largest absolute value of the same output, the largest of all; 1
            where a text differs.
        classes: share of argmax decisions over the last axis that differ; 0 where none are made.
    """

    absolute: float
    relative: float
    classes: float


def draw_inputs(session: InferenceSession, seed: int) -> dict[str, NDArray[np.generic]]:
    """Inputs that a model accepts: normal floats, small integers, coin flips, short texts.

    Args:
        session: the model.
        seed: of the values.

    Raises:
        ForeignModel: none of the tried sizes runs.
    """
    reason = ""
    for sizes in _tried(session.inputs):
        for most in (10, 2):
            inputs = {
                s.name: _draw(s, sizes, most, [seed, i]) for i, s in enumerate(session.inputs)
            }
            try:
                session.run(inputs)
            except RuntimeFailure as error:
                reason = str(error)
            else:
                return inputs
    raise ForeignModel(f"no drawn inputs run, give real ones (--selftest): {reason}")


def _tried(signatures: tuple[Signature, ...]) -> Iterator[dict[str, int]]:
    free = {d for s in signatures for d in s.shape if isinstance(d, str)}
    batch = {s.shape[0] for s in signatures if s.shape and isinstance(s.shape[0], str)}
    for count in (_BATCH, 1):
        for size in _SIZES if free - batch else _SIZES[:1]:
            yield {d: count if d in batch else size for d in free}


def _draw(
    signature: Signature, sizes: dict[str, int], most: int, seed: list[int]
) -> NDArray[np.generic]:
    rng = np.random.default_rng(seed)
    shape = tuple(d if isinstance(d, int) else sizes[d] for d in signature.shape)
    dtype = np.dtype(signature.dtype)
    if dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    if dtype.kind == "U":
        return np.asarray(rng.integers(0, most, shape)).astype(str)
    if dtype.kind == "b":
        return np.asarray(rng.random(shape) < 0.5)
    return np.asarray(rng.integers(0, 256 if dtype == np.uint8 else most, shape)).astype(dtype)


def record(session: InferenceSession, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
    """Outputs of a model, computed twice.

    Raises:
        ForeignModel: it draws random numbers, so that no self-test can hold.
        RuntimeFailure: it does not accept the inputs.
    """
    first, again = session.run(inputs), session.run(inputs)
    if differ(first, again).relative > _REPEAT:
        raise ForeignModel(
            "the model gives other outputs for the same inputs (it draws random numbers): export "
            "it in evaluation mode"
        )
    return first


def differ(wanted: Arrays, found: Arrays) -> Difference:
    """How far `found` lies from `wanted`.

    Raises:
        NumericsError: another set of outputs, shapes or dtypes, or values that are not finite
            where the original's are.
    """
    absolute, relative, decisions, changed = 0.0, 0.0, 0, 0
    if list(wanted) != list(found):
        raise NumericsError(f"the outputs are {list(found)}, the original's {list(wanted)}")
    for name, want in wanted.items():
        have = found[name]
        if (want.shape, dtype_name(want)) != (have.shape, dtype_name(have)):
            raise NumericsError(
                f"output {name!r} is {dtype_name(have)}{list(have.shape)}, the original's "
                f"{dtype_name(want)}{list(want.shape)}"
            )
        if not want.size:
            continue
        if dtype_name(want) == "str":  # a text differs or not: as far as can be
            relative = max(relative, float(not same_values(want, have)))
            continue
        far = float(distances(want, have).max())
        if not np.isfinite(far):
            raise NumericsError(
                f"output {name!r} is not finite where the original's is, or vice versa"
            )
        sizes = np.abs(want.astype(np.float64))
        scale = float(sizes.max(initial=0.0, where=np.isfinite(sizes)))
        absolute = max(absolute, far)
        relative = max(relative, far / scale if scale else float(far > 0))
        if want.dtype.kind == "f" and want.ndim >= 2 and want.shape[-1] > 1:
            decisions += want.size // want.shape[-1]
            changed += int((want.argmax(-1) != have.argmax(-1)).sum())
    return Difference(absolute, relative, changed / decisions if decisions else 0.0)
