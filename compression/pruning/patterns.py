"""Patterns: masks that hardware can use, N of every M weights or whole blocks.

Both look at a tensor as matrices of output channels (axis 0) by input channels (axis 1), one for
each position of a kernel, as NVIDIA's sparse tensor cores and TensorRT take 2:4: a group of four
are neighbouring *input channels* of one output, at the same position. For a linear layer, an
embedding or a recurrent matrix that is a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.allocation import Allocation, keep_highest
from prunecast.compression.pruning.criteria import Scores

__all__ = ["Blocks", "NOfM", "Pattern", "parse_pattern"]

_N_OF_M = re.compile(r"([0-9]{1,4}):([0-9]{1,4})")
_BLOCKS = re.compile(r"([0-9]{1,4})x([0-9]{1,4})")


class Pattern(Protocol):
    """Which weights of a tensor may be removed together."""

    @property
    def sparsity(self) -> float | None:
        """What it comes to in the end; None where that is a free choice."""

    @property
    def unit(self) -> int:
        """How many weights stay or go as one."""

    def misfit(self, shape: tuple[int, ...]) -> str:
        """Why it does not divide a tensor of two axes or more; "" where it does."""

    def masks(
        self, scores: Scores, sparsity: float, allocation: Allocation
    ) -> dict[str, NDArray[np.bool_]]:
        """Masks that obey the pattern, for tensors that it fits."""


@dataclass(frozen=True)
class NOfM:
    """At most N of every M neighbouring weights along the input channels (Mishra et al. 2021).

    Below the sparsity that it comes to, every group keeps N or more: of each the M - N lowest are
    candidates, and of these the lowest of the tensor are removed, so dense turns into the pattern
    gradually and what is removed early is removed later, too. Every tensor has the same sparsity.

    Attributes:
        kept: N, 1 or more.
        of: M, above N.
    """

    kept: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.of:
            raise ValueError(
                f"{self.kept}:{self.of} keeps nothing or everything: give N:M with 1 <= N < M"
            )

    @property
    def sparsity(self) -> float:
        """1 - N / M."""
        return 1 - self.kept / self.of

    @property
    def unit(self) -> int:
        """1: of every M weights any may go."""
        return 1

    def misfit(self, shape: tuple[int, ...]) -> str:
        """Why it does not divide a tensor; "" where it does."""
        fits = shape[1] % self.of == 0
        return "" if fits else f"{shape[1]} input channels are no multiple of {self.of}"

    def masks(
        self, scores: Scores, sparsity: float, allocation: Allocation
    ) -> dict[str, NDArray[np.bool_]]:
        """Masks with at least N of every M, and N once the pattern's sparsity is reached.

        Args:
            scores: of weights, by tensor.
            sparsity: of every tensor; what is beyond the pattern's own is that.
            allocation: has no say.
        """
        return {name: self._mask(score, sparsity) for name, score in scores.items()}

    def _mask(self, score: NDArray[np.floating], sparsity: float) -> NDArray[np.bool_]:
        last = np.moveaxis(score, 1, -1)
        groups = last.reshape(-1, self.of)
        falling = np.argsort(-groups, axis=1, kind="stable")  # of equals the earlier stays
        candidates = np.take_along_axis(groups, falling[:, self.kept :], axis=1)
        most = candidates.size
        share = sparsity / self.sparsity
        remove = most if share > 1 - 1e-9 else min(most, int(sparsity * score.size))
        stay = np.ones(groups.shape, np.bool_)
        stay[:, self.kept :] = keep_highest(candidates.ravel(), remove).reshape(candidates.shape)
        mask = np.empty(groups.shape, np.bool_)
        np.put_along_axis(mask, falling, stay, axis=1)
        return np.ascontiguousarray(np.moveaxis(mask.reshape(last.shape), -1, 1))


@dataclass(frozen=True)
class Blocks:
    """Whole blocks of output by input channels (Narang et al. 2017, "Block-Sparse RNNs").

    A block scores the mean of its weights. The allocation spreads blocks as it spreads weights: a
    matrix of 64 x 64 in blocks of 4 x 4 is one of 16 x 16 to it.

    Attributes:
        rows: output channels of a block, 1 or more.
        columns: input channels; not both are 1.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1 or self.rows * self.columns == 1:
            raise ValueError(
                f"blocks of {self.rows}x{self.columns} hold no two weights: give some such as 4x4"
            )

    @property
    def sparsity(self) -> None:
        """A free choice."""
        return

    @property
    def unit(self) -> int:
        """All of a block."""
        return self.rows * self.columns

    def misfit(self, shape: tuple[int, ...]) -> str:
        """Why it does not divide a tensor; "" where it does."""
        fits = shape[0] % self.rows == 0 and shape[1] % self.columns == 0
        channels = f"{shape[0]} output and {shape[1]} input channels"
        return "" if fits else f"{channels} are no whole blocks of {self.rows}x{self.columns}"

    def masks(
        self, scores: Scores, sparsity: float, allocation: Allocation
    ) -> dict[str, NDArray[np.bool_]]:
        """Masks of whole blocks.

        Args:
            scores: of weights, by tensor.
            sparsity: of blocks, and so of weights.
            allocation: spreads it over tensors.
        """
        pooled = {}
        for name, score in scores.items():
            rows, columns, *kernel = score.shape
            grid = (rows // self.rows, self.rows, columns // self.columns, self.columns)
            pooled[name] = score.reshape(*grid, *kernel).mean((1, 3), dtype=np.float64)
        masks = allocation(pooled, sparsity)
        return {n: m.repeat(self.rows, 0).repeat(self.columns, 1) for n, m in masks.items()}


def parse_pattern(text: str) -> Pattern | None:
    """The pattern that a policy's `pruning_pattern` states.

    Args:
        text: "N:M", such as "2:4"; "RxC", blocks such as "4x4"; or "" for none.

    Raises:
        ValueError: it states none, or an impossible one.

    Examples:
        >>> parse_pattern("2:4"), parse_pattern("4x1"), parse_pattern("")
        (NOfM(kept=2, of=4), Blocks(rows=4, columns=1), None)
    """
    if not text:
        return None
    if found := _N_OF_M.fullmatch(text):
        return NOfM(int(found[1]), int(found[2]))
    if found := _BLOCKS.fullmatch(text):
        return Blocks(int(found[1]), int(found[2]))
    raise ValueError(f"{text!r} is no pattern: give N:M such as '2:4', or blocks such as '4x4'")
