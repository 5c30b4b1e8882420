"""Which channels remain: structured pruning as a plan that narrows any later weights.

Removing a channel of one layer removes slices of every layer that is coupled with it, through
additions, norms and flattenings. torch-pruning computes these groups (Fang et al. 2023, "DepGraph:
Towards Any Structural Pruning"); the channels with the least norm over their whole group go.

The choice is made once, on some version of the weights. What comes out is a `ChannelPlan`: for
each tensor the positions along each axis that remain. Later versions are narrowed by the same
plan, in numpy and without torch, so that the narrow models of two rounds differ by as little as
the wide ones. A narrowed tensor keeps its lattice: its integers are a part of the wide ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor, Tensor

__all__ = ["Axes", "ChannelPlan", "Steps"]

_SCHEMA = 1
Axes = tuple[NDArray[np.bool_] | None, ...]
Steps = tuple[tuple[str, bool, tuple[int, ...]], ...]


@dataclass(frozen=True, eq=False)
class ChannelPlan:
    """What remains of each tensor.

    Attributes:
        kept: for each tensor a mask per axis, True where it remains; None where all of it does.
            Tensors that stay whole are not listed.
        steps: how to narrow a torch module: layer, whether its outputs (or else its inputs) are
            meant, and the channels that go, in the order of their removal.
        share: of the channels that were to remain.
    """

    kept: Mapping[str, Axes]
    steps: Steps = ()
    share: float = 1.0

    def narrow(self, model: PublishedModel) -> PublishedModel:
        """The part of a model that remains; lattice, steps and pruned flags stay.

        Raises:
            PlanError: a tensor has another shape than the plan's.

        >>> plan = ChannelPlan({"w": (np.array([True, False, True]), None)})
        >>> wide = PublishedModel({"w": LatticeTensor(np.array([[1], [2], [3]]), 0.5)})
        >>> plan.narrow(wide)["w"].q.tolist()
        [[1], [3]]
        """
        missing = [name for name in self.kept if name not in model.tensors]
        if missing:
            raise PlanError(f"the model lacks tensor {missing[0]!r}: the plan is of another module")
        tensors = {name: self._narrow(name, tensor) for name, tensor in model.tensors.items()}
        return PublishedModel(tensors, model.counter)

    def _narrow(self, name: str, tensor: Tensor) -> Tensor:
        axes = self.kept.get(name)
        if axes is None:
            return tensor
        sizes = tuple(n if mask is None else mask.size for n, mask in zip(
            tensor.shape, axes, strict=False))  # fmt: skip
        if len(axes) != len(tensor.shape) or sizes != tensor.shape:
            raise PlanError(
                f"tensor {name!r} is {list(tensor.shape)}, the plan was made for another shape"
            )
        places = np.ix_(*(
            np.arange(n) if mask is None else np.flatnonzero(mask)
            for n, mask in zip(tensor.shape, axes, strict=True)
        ))  # fmt: skip
        if isinstance(tensor, LatticeTensor):
            return LatticeTensor(tensor.q[places], tensor.step, tensor.pruned, tensor.dtype)
        return RawTensor(tensor.values[places])

    def to_text(self) -> str:
        """JSON; masks in hexadecimal, each written once."""
        masks: dict[str, int] = {}

        def number(mask: NDArray[np.bool_] | None) -> int | None:
            if mask is None:
                return None
            return masks.setdefault(f"{mask.size}:{np.packbits(mask).tobytes().hex()}", len(masks))

        kept = {name: [number(mask) for mask in axes] for name, axes in self.kept.items()}
        steps = [[layer, outputs, list(gone)] for layer, outputs, gone in self.steps]
        document = {
            "schema": _SCHEMA,
            "share": self.share,
            "kept": kept,
            "masks": list(masks),
            "steps": steps,
        }
        return json.dumps(document, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> ChannelPlan:
        """Read what `to_text` wrote.

        Raises:
            PlanError: no such plan.
        """
        try:
            document: Any = json.loads(text)
            if document["schema"] != _SCHEMA:
                raise PlanError(f"the plan is of schema {document['schema']}, not {_SCHEMA}")
            masks = [_mask(str(entry)) for entry in document["masks"]]
            kept = {
                str(name): tuple(None if i is None else masks[i] for i in axes)
                for name, axes in document["kept"].items()
            }
            steps = tuple(
                (str(layer), bool(outputs), tuple(int(i) for i in gone))
                for layer, outputs, gone in document["steps"]
            )
            share = float(document["share"])
        except PlanError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"the plan of channels is damaged: {error}") from error
        return cls(kept, steps, share)


def _mask(entry: str) -> NDArray[np.bool_]:
    size, _, digits = entry.partition(":")
    packed = np.frombuffer(bytes.fromhex(digits), np.uint8)
    if not 0 <= 8 * packed.size - int(size) < 8:  # NumPy would pad with any number of zeros
        raise ValueError(f"a mask of {size} places in {packed.size} bytes")
    return np.unpackbits(packed, count=int(size)).astype(np.bool_)
