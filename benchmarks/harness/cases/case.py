"""One thing to code: tensors, and what sender and receiver both know beforehand."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import Context, TensorSpec

__all__ = ["KINDS", "Array", "Case", "Tensors", "case"]

Array = NDArray[Any]
Tensors = dict[str, Array]

KINDS = {
    "dense": "dense weights on a lattice",
    "update": "client update, alone",
    "update-known": "client update, receiver's weights as context",
    "top": "largest 1 % of a client update",
    "pruned": "weights, 90 % of them pruned",
    "delta": "difference of two published versions",
    "masked": "client update under the mask of a pruned model",
    "float": "float32 weights, lossless",
    "float-delta": "float32 weights, given those a round before",
}
"""Classes of cases and what they hold."""


@dataclass(frozen=True)
class Case:
    """Tensors to code.

    Attributes:
        name: ``model/what``.
        kind: a key of :data:`KINDS`.
        tensors: int32 or float32 by name, in order.
        context: what both sides know; always at least names and shapes.
    """

    name: str
    kind: str
    tensors: Tensors = field(repr=False)
    context: Context = field(repr=False)

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return sum(v.size for v in self.tensors.values())

    @cached_property
    def digest(self) -> str:
        """Tells whether two runs measured the same tensors and context; 16 hex digits."""
        h = hashlib.sha256(self.context.digest)
        for name, values in self.tensors.items():
            h.update(f"{name} {values.dtype} {values.shape} ".encode())
            h.update(np.ascontiguousarray(values).data)
        return h.hexdigest()[:16]

    def known(self, name: str) -> tuple[NDArray[np.bool_] | None, Array | None]:
        """Mask and previous value of a tensor, each None where there is none."""
        return (self.context.mask or {}).get(name), (self.context.previous or {}).get(name)


def case(
    name: str,
    kind: str,
    tensors: Tensors,
    *,
    mask: Tensors | None = None,
    previous: Tensors | None = None,
) -> Case:
    """Make a case whose context always holds names, dtypes and shapes, as on the wire."""
    layout = {k: TensorSpec(v.dtype, v.shape) for k, v in tensors.items()}
    return Case(name, kind, tensors, Context(layout=layout, mask=mask, previous=previous))
