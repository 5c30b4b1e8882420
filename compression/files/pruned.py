"""What became of a checkpoint that was pruned, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunecast.compression.files.checkpoints import Checkpoint
from prunecast.compression.files.zeroing import Zeroed

__all__ = ["PrunedTensor", "PruningResult"]

_SCHEMA = 1


@dataclass(frozen=True)
class PrunedTensor:
    """What became of one tensor.

    Attributes:
        dtype: by name.
        shape: of the tensor.
        removed: how many of its weights are zero now; 0 where it was left whole.
        prunable: whether it could lose any.
        same_as: the tensor that it is tied with, which counts instead of it; "" for none.
    """

    dtype: str
    shape: tuple[int, ...]
    removed: int
    prunable: bool
    same_as: str = ""

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Share of its weights that went."""
        return self.removed / max(1, self.size)


@dataclass(frozen=True)
class PruningResult:
    """What was written.

    Attributes:
        tensors: by name, in the order of the checkpoint.
        nbytes: of its files, before and after: zeros take as much as other weights.
        passes: how often the prunable weights were read, the writing included.
        memory: that was allowed for the work, in bytes: what it stays below in each process.
    """

    tensors: Mapping[str, PrunedTensor]
    nbytes: int
    passes: int
    memory: int

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        jobs: Sequence[Zeroed],
        ties: Mapping[str, str],
        passes: int,
        memory: int,
    ) -> PruningResult:
        """What the jobs made of a checkpoint, with the name that each tied tensor follows."""
        removed: dict[str, int] = {}
        for job in jobs:
            removed[job.part.name] = removed.get(job.part.name, 0) + job.cut.removed
        tensors = {
            t.name: PrunedTensor(
                t.spec.dtype,
                t.spec.shape,
                removed.get(t.name, 0),
                t.name in removed,
                ties.get(t.name, ""),
            )
            for t in checkpoint.tensors
        }
        return cls(tensors, checkpoint.nbytes, passes, memory)

    @property
    def prunable(self) -> int:
        """Weights that could be removed, tied ones once."""
        return sum(t.size for t in self.tensors.values() if t.prunable and not t.same_as)

    @property
    def removed(self) -> int:
        """Weights that were removed, tied ones once."""
        return sum(t.removed for t in self.tensors.values() if not t.same_as)

    @property
    def parameters(self) -> int:
        """Weights of all tensors, tied ones once."""
        return sum(t.size for t in self.tensors.values() if not t.same_as)

    def document(self) -> dict[str, Any]:
        """The figures as JSON has them."""
        return {
            "schema": _SCHEMA,
            "parameters": self.parameters,
            "prunable": self.prunable,
            "removed": self.removed,
            "sparsity": self.removed / max(1, self.prunable),
            "sparsity_of_all": self.removed / max(1, self.parameters),
            "file_bytes": self.nbytes,
            "passes": self.passes,
            "memory_bound_bytes": self.memory,
            "tensors": [
                {
                    "name": name,
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "prunable": tensor.prunable,
                    "removed": tensor.removed,
                    "sparsity": tensor.sparsity,
                    "same_as": tensor.same_as or None,
                }
                for name, tensor in self.tensors.items()
            ],
        }
