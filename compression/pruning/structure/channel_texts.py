"""The text of a plan of channels: JSON, read without trust in who wrote it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.plan import PlanError, Shares
from prunecast.compression.pruning.structure.axes import Axes
from prunecast.compression.versions.errors import BadPayload
from prunecast.compression.versions.frame import inflate

__all__ = ["PlanParts", "Steps", "deflated", "inflated", "layers_of", "parts_of", "text_of"]

_SCHEMA = 1
_WITH_HEADS = 2  # and layers, of which a reader of 1 would make a module that does not run
_MOST_TEXT = 1 << 24  # bytes, inflated
_NAMES = 1 << 16  # bytes of text that even a plan of the smallest model may have
_DEEPEST = 64  # modules inside one another
_DAMAGES = (LookupError, ValueError, TypeError, AttributeError, RecursionError, OverflowError)
Steps = tuple[tuple[str, bool, tuple[int, ...]], ...]


class PlanParts(NamedTuple):
    """What a plan says; see `ChannelPlan`."""

    kept: Mapping[str, Axes]
    steps: Steps
    shares: Shares
    heads: Mapping[str, NDArray[np.bool_]]
    gone: tuple[str, ...]


def text_of(plan: PlanParts) -> str:
    """JSON; masks in hexadecimal, each written once. Schema 1 where no head or layer goes."""
    masks: dict[str, int] = {}

    def number(mask: NDArray[np.bool_] | None) -> int | None:
        if mask is None:
            return None
        return masks.setdefault(f"{mask.size}:{np.packbits(mask).tobytes().hex()}", len(masks))

    channels, *others = plan.shares
    whole = others == [1, 1] and not (plan.heads or plan.gone)
    document: dict[str, Any] = {
        "schema": _SCHEMA if whole else _WITH_HEADS,
        "share": channels,
        "kept": {name: [number(mask) for mask in axes] for name, axes in plan.kept.items()},
    }
    heads = {name: number(mask) for name, mask in plan.heads.items()}
    document["masks"] = list(masks)
    document["steps"] = [[layer, outputs, list(gone)] for layer, outputs, gone in plan.steps]
    if not whole:
        document |= {"heads": heads, "gone": list(plan.gone), "shares": others}
    return json.dumps(document, separators=(",", ":"))


def parts_of(text: str, most: int | None = None) -> PlanParts:
    """Read what `text_of` wrote.

    Args:
        text: of a file, or of whoever sent it.
        most: places that its masks may have together; None for any number.

    Raises:
        PlanError: no such plan, or one under which a layer would vanish.
    """
    try:
        document: Any = json.loads(text)
        schema = document["schema"]
        if schema not in (_SCHEMA, _WITH_HEADS):
            raise PlanError(f"the plan is of schema {schema}, not {_SCHEMA} or {_WITH_HEADS}")
        masks = _masks(document["masks"], most)
        kept = {
            name: tuple(None if i is None else masks[_count(i)] for i in axes)
            for name, axes in document["kept"].items()
        }
        used = {i for axes in document["kept"].values() for i in axes if i is not None}
        heads: dict[str, NDArray[np.bool_]] = {}
        gone: tuple[str, ...] = ()
        shares = [float(document["share"])]
        if schema == _WITH_HEADS:
            heads = {name: masks[_count(i)] for name, i in document["heads"].items()}
            used |= set(document["heads"].values())
            gone = _layers(document["gone"], [*kept, *(f"{name}." for name in heads)])
            shares += map(float, document["shares"])
        if len(used) < len(masks):
            raise ValueError(f"no tensor has {len(masks) - len(used)} of its masks")
        steps = tuple(
            (str(layer), bool(outputs), tuple(map(_count, places)))
            for layer, outputs, places in document["steps"]
        )
        of = Shares(*shares)
        if len(shares) != (1 if schema == _SCHEMA else len(of)):
            raise ValueError(f"{len(shares)} shares")
        for share in of:
            if not 0 < share <= 1:
                raise ValueError(f"the share that remains lies in (0, 1], not {share}")
    except PlanError:
        raise
    except _DAMAGES as error:
        raise PlanError(f"the plan of channels is damaged: {error}") from error
    return PlanParts(kept, steps, of, heads, gone)


def deflated(text: str) -> bytes:
    """The text as it travels."""
    return zlib.compress(text.encode(), 9)


def inflated(data: bytes, most: int | None = None) -> str:
    """Inverse of `deflated`; at most 16 MiB of text.

    Args:
        data: of whoever sent it.
        most: bytes of the largest model that the plan may be of; None for any.

    Raises:
        PlanError: no such text, or too long a one.
    """
    try:
        bound = _MOST_TEXT if most is None else min(_MOST_TEXT, most + _NAMES)
        return inflate(data, bound).decode()
    except (BadPayload, UnicodeDecodeError) as error:
        raise PlanError(f"the plan of channels is damaged: {error}") from error


def layers_of(tensor: str) -> Iterator[str]:
    """Names of the modules that a tensor is inside of, the outermost first."""
    return accumulate(tensor.split(".")[:-1], "{}.{}".format)


def _masks(entries: list[str], most: int | None) -> list[NDArray[np.bool_]]:
    """Masks of a plan's text, none of which is made before their places have been counted."""
    if len(set(entries)) < len(entries):
        raise ValueError("a mask is written twice")
    parts = [entry.partition(":") for entry in entries]
    places = sum(_places_of(size, digits) for size, _, digits in parts)
    if most is not None and places > most:
        raise ValueError(f"masks of {places} places are of no model of at most {most} bytes")
    return [_mask(int(size), digits) for size, _, digits in parts]


def _places_of(size: str, digits: str) -> int:
    places, packed = int(size), len(digits) // 2
    if places < 1 or not 0 <= 8 * packed - places < 8:  # NumPy would pad with any number of zeros
        raise ValueError(f"a mask of {places} places in {packed} bytes")
    return places


def _mask(size: int, digits: str) -> NDArray[np.bool_]:
    packed = np.frombuffer(bytes.fromhex(digits), np.uint8)
    if 8 * packed.size < size:  # there was space between the digits
        raise ValueError(f"a mask of {size} places in {packed.size} bytes")
    mask = np.unpackbits(packed, count=size).astype(np.bool_)
    if not mask.any():
        raise ValueError(f"a layer would vanish: a mask keeps none of {size} places")
    return mask


def _layers(names: Any, kept: Iterable[str]) -> tuple[str, ...]:
    """Names of layers that are gone; nothing is kept of them, and none is inside another."""
    if not (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
        raise ValueError("layers that are gone have names")
    gone = frozenset(names)
    if len(gone) < len(names):
        raise ValueError("a layer goes twice")
    for name in (*kept, *names) if gone else ():
        if name.count(".") > _DEEPEST:
            raise ValueError(f"a name of more than {_DEEPEST} parts is of no module")
        if not gone.isdisjoint(layers_of(name)):
            raise ValueError(f"{name!r} is of a layer that is gone")
    return tuple(names)


def _count(number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{number!r} counts nothing")
    return number
