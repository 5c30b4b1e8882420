"""Tensors that a coder of the standard library takes fewer bytes for.

Trying every coder on everything would take a hundred times as long as coding does, so only a
thorough encoder does that, and looks at large tensors first: at how the quick settings do on a
sample, and at strings that occur again anywhere in the payload. Vectors of bytes alone (uint8,
one axis: somebody's own serialisation, such as trees) are always tried: coded as numbers, they
would take more bytes than any archiver makes of them.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .context import Context, Limits, TensorSpec
from .costs import measure_costs
from .entropy.packs import CODERS, Pack, pack, shuffled
from .modelling.forming import Formed
from .modelling.forms import Equal, Packed, may_have_form
from .modelling.planning import entropy_bits

__all__ = ["Packing", "packed"]

_LZMA = 2
_TRY_ALL = 1 << 18
"""Bytes up to which everything is tried on everything."""
_TRY_TOGETHER = 1 << 20
_CHUNK, _CHUNKS = 1 << 14, 4
_NEAR = 1.02  # of what is estimated for our own coding
_WINDOW = {True: 4, False: 5}  # logarithm of elements: floats, which seldom repeat; integers
_RIVAL = 1.1
_ONE_IN = 6  # logarithm
_AGAIN = 0.02
_OVERHEAD = 6  # bytes that the head says of a pack
_SHORT = 64  # bytes, below which nothing repeats that would pay for a pack

_BLOCK = 1 << 16
_ODD = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = [np.uint64(0xBF58476D1CE4E5B9 + 2 * j) for j in range(8)]
_ANY = Limits(**dict.fromkeys((f.name for f in fields(Limits)), 1 << 62))

Packing = list[tuple[Pack, bytes]]
"""Packs and their bytes."""


@dataclass(frozen=True)
class _Trial:
    coder: int
    shuffle: bool
    data: bytes


def packed(
    arrays: Mapping[str, NDArray[Any]],
    specs: Mapping[str, TensorSpec],
    context: Context,
    formed: Mapping[str, Formed],
    payload: bytes,
    write: Callable[[Mapping[str, Formed], Packing], bytes],
    *,
    thorough: bool,
) -> bytes:
    """Return the shortest of a payload and of those with some tensors in packs.

    Args:
        arrays: the tensors.
        specs: of them.
        context: of the payload.
        formed: their forms in it.
        payload: without packs.
        write: makes a payload of forms and packs.
        thorough: try it on all of them, and not only on vectors of bytes.
    """
    names = [
        name
        for name, spec in specs.items()
        if (thorough or _is_bytes(spec))
        and may_have_form(name, spec, context)
        and not (name in formed and isinstance(formed[name][0], Equal))
    ]
    total = sum(specs[name].nbytes for name in names)
    if total > _TRY_ALL:
        again = _repeating({name: arrays[name] for name in names})
        names = [n for n in names if n in again or _may_pay(arrays[n], formed.get(n))]
    if not names:
        return payload
    costs = measure_costs(payload, context=context, limits=_ANY).tensors
    own = {n: costs[n].nbytes - costs[n].sections.get("layout", 0) for n in names}
    alone = {name: _best([arrays[name]]) for name in names}
    chosen = [n for n in names if len(alone[n].data) + _OVERHEAD < own[n]]
    tried = [payload]

    def attempt(groups: Sequence[Sequence[str]], trials: Sequence[_Trial]) -> None:
        inside = {n: Packed(number) for number, group in enumerate(groups) for n in group}
        forms = {n: f for n, f in formed.items() if n not in inside}
        forms |= {n: (form, []) for n, form in inside.items()}
        packs = [
            (Pack(t.coder, t.shuffle, len(t.data), list(group)), t.data)
            for group, t in zip(groups, trials, strict=True)
        ]
        tried.append(write(forms, packs))

    if chosen:
        attempt([[n] for n in chosen], [alone[n] for n in chosen])
    apart = sum(min(own[n], len(alone[n].data) + _OVERHEAD) for n in names)
    if len(names) > 1:
        # strings that occur in several tensors
        coders = None if total <= _TRY_TOGETHER else (_LZMA,)
        together = _best([arrays[n] for n in names], coders)
        if len(together.data) < apart:
            attempt([names], [together])
    return min(tried, key=len)


def _is_bytes(spec: TensorSpec) -> bool:
    """Whether a tensor is a string of bytes, long enough for a pack to pay."""
    return spec.dtype == np.uint8 and len(spec.shape) == 1 and spec.size >= _SHORT


def _best(arrays: Sequence[NDArray[Any]], coders: Sequence[int] | None = None) -> _Trial:
    """The shortest of what the coders make of some arrays, one after the other.

    Of large ones, only those are tried that come near the best on a sample.
    """
    wide = any(a.itemsize > 1 for a in arrays)
    ways = [
        (coder, shuffle)
        for coder in (range(len(CODERS)) if coders is None else coders)
        for shuffle in ((False, True) if wide else (False,))
    ]
    if sum(a.nbytes for a in arrays) > _TRY_TOGETHER:
        some = [_sampled(np.ascontiguousarray(a).reshape(-1)) for a in arrays]
        sizes = {(c, s): len(pack(some, c, shuffle=s)) for c, s in ways}
        ways = [way for way in ways if sizes[way] < _RIVAL * min(sizes.values())]
    trials = [_Trial(coder, s, pack(arrays, coder, shuffle=s)) for coder, s in ways]
    return min(trials, key=lambda trial: len(trial.data))


def _may_pay(array: NDArray[Any], formed: Formed | None) -> bool:
    """Whether quick coders come near to our own coding on a sample of an array."""
    flat = np.ascontiguousarray(array).reshape(-1)
    sample = _sampled(flat)
    bits = _own_bits(sample)
    if formed is not None:  # its parts are what is coded
        bits = min(bits, _own_bits(_sampled(formed[1][-1].reshape(-1))) * len(sample))
    quick = [
        len(squeeze(data))
        for data in dict.fromkeys((sample.tobytes(), shuffled(sample)))
        for squeeze in (_deflated, _lzma)
    ]
    return 8 * min(quick) < _NEAR * bits * len(sample)


def _deflated(data: bytes) -> bytes:
    return zlib.compress(data, 1)


def _lzma(data: bytes) -> bytes:
    return lzma.compress(data, preset=0)


def _sampled(flat: NDArray[Any]) -> NDArray[Any]:
    """Some chunks of a flat array."""
    each = _CHUNK // flat.itemsize
    if len(flat) <= _CHUNKS * each:
        return flat
    starts = np.linspace(0, len(flat) - each, _CHUNKS).astype(np.int64).tolist()
    return np.concatenate([flat[s : s + each] for s in starts])


def _own_bits(sample: NDArray[Any]) -> float:
    """Bits an element: the smaller of what its values take, with their table, and its bytes."""
    counts = np.unique(sample.view(f"u{sample.itemsize}"), return_counts=True)[1]
    values = float(entropy_bits(counts[None])[0]) + 8.0 * sample.itemsize * len(counts)
    width = 8 * sample.itemsize
    bits = sample.view(f"u{sample.itemsize}")
    turned = (bits << 1) | (bits >> (width - 1)) if sample.dtype.kind == "f" else bits
    planes = np.ascontiguousarray(turned).view(np.uint8).reshape(-1, sample.itemsize).T
    apart = sum(float(entropy_bits(np.bincount(p, minlength=256)[None])[0]) for p in planes)
    return min(values, apart) / len(sample)


def _repeating(arrays: Mapping[str, NDArray[Any]]) -> set[str]:
    """Names of arrays that hold strings which occur again, in them or in others."""
    hashes, owners = [], []
    for number, array in enumerate(arrays.values()):
        found = _marks(np.ascontiguousarray(array).reshape(-1))
        hashes.append(found)
        owners.append(np.full(len(found), number))
    every, owner = np.concatenate(hashes), np.concatenate(owners)
    _, place, often = np.unique(every, return_inverse=True, return_counts=True)
    again = often[place] > 1
    counts = np.bincount(owner, minlength=len(arrays))
    repeated = np.bincount(owner, again, minlength=len(arrays))
    return {n for n, c, r in zip(arrays, counts, repeated, strict=True) if r > max(2, _AGAIN * c)}


def _marks(flat: NDArray[Any]) -> NDArray[np.uint64]:
    """Hashes of one window in so many, chosen by what is in it, so that a string that occurs
    again is marked at the same places."""
    found = []
    depth = _WINDOW[flat.dtype.kind == "f"]
    for s in range(0, len(flat), _BLOCK):
        h = flat[s : s + _BLOCK + (1 << depth)].view(f"u{flat.itemsize}").astype(np.uint64)
        h *= _ODD
        for j in range(depth):
            h = h[: -(1 << j)] * _FACTORS[j] + h[1 << j :]
            h ^= h >> np.uint64(29)
        h *= _ODD
        found.append(h[(h >> np.uint64(64 - _ONE_IN) == 0) & (h != 0)])
    return np.concatenate(found)
