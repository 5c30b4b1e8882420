"""The codec under test."""

from __future__ import annotations

import dataclasses

from prunecast.compression.codec import Context, decode, encode, measure_costs

from ..cases import Case
from .coder import Bound

__all__ = ["OURS", "Ours", "sections"]

OURS = "prunecast"


class Ours:
    """The codec as the rest of the library calls it."""

    name = OURS
    settings = "encode and decode with the case's context; a self-contained payload, all counted"

    def bind(self, case: Case) -> Bound:
        """See :class:`Coder`."""

        def context() -> Context:
            # a new object each time, as it keeps its digest: real payloads differ in context
            return dataclasses.replace(case.context)

        return Bound(
            lambda: encode(case.tensors, context=context()),
            lambda data: list(decode(data, context=context()).values()),
        )


def sections(payload: bytes, case: Case) -> dict[str, int]:
    """Bytes of one of our payloads by section, see ``PayloadCosts.sections``."""
    return dict(measure_costs(payload, context=case.context).sections)
