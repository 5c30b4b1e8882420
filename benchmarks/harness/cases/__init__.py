"""What is coded: synthetic tensors, tensors of trained models, the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import store
from .case import KINDS, Case, case
from .entropy import case_entropy, entropy
from .known import from_arrays, sizes, to_arrays
from .own import own_cases
from .synthetic import ARCHITECTURES, QUICK, synthetic_cases
from .trained import trained_cases

__all__ = [
    "KINDS",
    "Case",
    "all_cases",
    "case",
    "case_entropy",
    "entropy",
    "from_arrays",
    "sizes",
    "to_arrays",
]


def all_cases(
    *, trained: Path | None, own: Path | None, wanted: Sequence[str] = (), quick: bool = False
) -> Iterator[Case]:
    """Cases whose name contains one of `wanted` (all, if empty).

    Args:
        trained: folder of trained models; None for the synthetic cases instead.
        own: folder of further ``.npz`` files, or None.
        wanted: parts of names; a group is made only if one of its names may match.
        quick: only the small ones of the synthetic cases.
    """

    def chosen(cases: Iterator[Case]) -> Iterator[Case]:
        return (c for c in cases if not wanted or any(w in c.name for w in wanted))

    invented = QUICK if quick else tuple(ARCHITECTURES)
    groups = [f"synthetic-{n}" for n in invented] if trained is None else list(store.MODELS)
    # making a model's cases takes time: leave models out that `wanted` cannot mean
    kept = set()
    for part in wanted or [""]:
        model = part.partition("/")[0]
        kept |= {g for g in groups if model in g} or set(groups)
    for group in groups:
        if group in kept:
            yield from chosen(
                synthetic_cases(group.removeprefix("synthetic-"))
                if trained is None
                else trained_cases(trained, group)
            )
    for path in sorted(own.glob("*.npz")) if own else ():
        yield from chosen(own_cases(path))
