"""Cases from the models that ``benchmarks/models.py`` trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .. import store
from ..lattice import Integers, Lattice, is_prunable, masked_update
from .case import Case, case
from .quantising import largest, to_error

__all__ = ["trained_cases"]


def trained_cases(folder: Path, model: str) -> Iterator[Case]:
    """Cases of one model, named ``MODEL/what-when``; `when` is mid or late in training."""
    tensors = store.load(folder, model)
    for when in ("mid", "late"):
        yield from _dense(tensors, model, when)
        yield from _pruned(tensors, model, when)


def _minus(a: Integers, b: Integers) -> Integers:
    return {k: a[k] - b[k] for k in a}


def _dense(tensors: dict[str, store.Tensors], model: str, when: str) -> Iterator[Case]:
    def name(what: str) -> str:
        return f"{model}/{what}-{when}"

    before, after, update = (tensors[f"dense-{when}.{w}"] for w in ("before", "after", "update"))
    lattice = Lattice(before)
    held, following = lattice.publish(before, 0.0), lattice.publish(after, 0.0)
    yield case(name("dense"), "dense", dict(following))
    yield case(name("update-0.25"), "update", dict(to_error(update, 0.25)))
    if when == "mid":
        return
    for error in (0.01, 0.6):
        yield case(name(f"update-{error}"), "update", dict(to_error(update, error)))
    sent, _ = masked_update(update, {})
    yield case(name("update-known"), "update-known", dict(sent), previous=dict(held))
    yield case(name("top-1%"), "top", dict(largest(to_error(update, 0.3), 0.01)))
    moved = _minus(following, held)
    yield case(name("delta-dense"), "delta", dict(moved), previous=dict(held))
    yield case(name("float"), "float", dict(after))
    yield case(name("float-delta"), "float-delta", dict(after), previous=dict(before))


def _pruned(tensors: dict[str, store.Tensors], model: str, when: str) -> Iterator[Case]:
    def name(what: str) -> str:
        return f"{model}/{what}-{when}"

    held, following, update = (
        {k: q.astype(np.int32) for k, q in tensors[f"pruned-{when}.{what}"].items()}
        for what in ("held", "next", "update")
    )
    if when == "late":
        yield case(name("pruned"), "pruned", dict(following))
    yield case(name("delta"), "delta", dict(_minus(following, held)), previous=dict(held))
    mask = {k: q != 0 for k, q in held.items() if is_prunable(q)}
    yield case(name("masked"), "masked", dict(update), mask=dict(mask), previous=dict(held))
    if when == "late":
        yield case(name("masked-only"), "masked", dict(update), mask=dict(mask))
