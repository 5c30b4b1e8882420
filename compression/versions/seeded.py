"""From-scratch models that both sides draw from a seed, so that only the seed travels.

A fresh model is noise: coding it costs about five bits a weight, and nobody needs those very
bits. Drawn by an integer generator from a shared seed, the first keyframe is a few bytes. The
generator (`CounterStream`) computes with integers only, so every machine draws the same model,
which the digest in the frame verifies.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import CounterStream
from prunecast.compression.versions.errors import BadPayload, InvalidModel
from prunecast.compression.versions.model import LatticeTensor, PublishedModel, Tensor

__all__ = ["Draw", "Seed", "draw", "draw_like"]

_MASK = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Draw:
    """Integers of one tensor: uniform on ``centre - bound .. centre + bound``, both included."""

    centre: int
    bound: int


@dataclass(frozen=True)
class Seed:
    """What the lattice tensors of a model are drawn from.

    Attributes:
        seed: 0 to 2**64 - 1.
        draws: tensor name to its distribution; one for every lattice tensor.
    """

    seed: int
    draws: Mapping[str, Draw]

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= _MASK:
            raise InvalidModel(f"seed {self.seed} is outside 0..2**64-1")
        for name, item in self.draws.items():
            if not 0 <= item.bound <= 0x3FFFFFFF or abs(item.centre) > 0x3FFFFFFF:
                raise InvalidModel(f"tensor {name!r} cannot be drawn from {item}")


def draw(shape: tuple[int, ...], item: Draw, seed: int, name: str) -> NDArray[np.int32]:
    """Integers of one tensor; the same on every machine.

    Number ``i`` is the high 32 bits of word ``i`` of the tensor's stream, times the number of
    values, shifted right by 32 (Lemire 2019, without rejection). The stream is that of seed and
    name, so tensors are independent and can be drawn alone.
    """
    stream = CounterStream.of(struct.pack("<Q", seed) + name.encode())
    size = int(np.prod(shape, dtype=np.int64))
    out = np.empty(size, np.int32)
    count = np.uint64(2 * item.bound + 1)
    for begin, words in stream.blocks(size):
        scaled = ((words >> np.uint64(32)) * count) >> np.uint64(32)
        out[begin : begin + len(words)] = scaled.astype(np.int64) - item.bound + item.centre
    return out.reshape(shape)


def draw_like(model: PublishedModel, seed: int) -> tuple[PublishedModel, Seed]:
    """A model with the layout and spread of another, and about its steps, drawn from a seed.

    Every lattice tensor becomes uniform with the mean and standard deviation of the original;
    raw tensors stay. A tensor that is constant (norm weights, zero biases) stays constant.

    Args:
        model: a freshly initialised model, nothing pruned.
        seed: 0 to 2**64 - 1.

    Raises:
        InvalidModel: a tensor is pruned, or the seed is outside its range.
    """
    Seed(seed, {})  # refuses an impossible seed before anything is drawn
    draws: dict[str, Draw] = {}
    tensors: dict[str, Tensor] = dict(model.tensors)
    for name, tensor in model.tensors.items():
        if not isinstance(tensor, LatticeTensor):
            continue
        if tensor.pruned:
            raise InvalidModel(f"tensor {name!r} is pruned already: draw before training")
        q = tensor.q.astype(np.float64)
        mean, spread = (float(q.mean()), float(q.std())) if q.size else (0.0, 0.0)
        # a mean within its own sampling error is zero
        centre = 0 if abs(mean) < 4 * spread / max(q.size, 1) ** 0.5 else round(mean)
        # variance of the uniform integers on -b..b is b (b + 1) / 3
        bound = round((np.sqrt(1 + 12 * spread**2) - 1) / 2)
        draws[name] = Draw(centre, bound)
        q_drawn = draw(tensor.shape, draws[name], seed, name)
        step = tensor.step
        if 1 < spread < 2 and not centre:  # so few integers are to have the original's spread, too
            wanted = np.sqrt(spread**2 - 1 / 12)  # without what rounding added to it
            step = float(np.float32(step * wanted / np.sqrt(bound * (bound + 1) / 3)))
        tensors[name] = LatticeTensor(q_drawn, step, False, tensor.dtype)
    return PublishedModel(tensors, model.counter), Seed(seed, draws)


def pack_seed(seed: Seed) -> bytes:
    """Seed, then centre and bound of every lattice tensor in order."""
    draws = b"".join(struct.pack("<ii", d.centre, d.bound) for d in seed.draws.values())
    return struct.pack("<Q", seed.seed) + draws


def unpack_seed(data: bytes, names: list[str]) -> Seed:
    """Inverse of `pack_seed` for the lattice tensors `names`.

    Raises:
        BadPayload: of another length, or distributions that do not fit int32.
    """
    if len(data) != 8 + 8 * len(names):
        raise BadPayload("seed section does not fit the number of lattice tensors")
    draws = struct.iter_unpack("<ii", data[8:])
    try:
        return Seed(
            int(struct.unpack_from("<Q", data)[0]),
            {name: Draw(centre, bound) for name, (centre, bound) in zip(names, draws, strict=True)},
        )
    except InvalidModel as error:
        raise BadPayload(str(error)) from error
