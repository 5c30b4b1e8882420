"""What a model costs to run, and what pruning took from it: counts, ratios, energy; no torch.

Terms, as Blalock et al. 2020 ("What is the state of neural network pruning?", section 2) have them:
a *MAC* is one multiplication with its addition; the *compression ratio* is the original number of
parameters over the number that are kept. A zero that lies among other weights is multiplied like
them by dense kernels such as onnxruntime's: what is called *effective* leaves such zeros out, and
says what hardware or kernels that skip them could save, not that anything here is faster.
"""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = [
    "FLOAT32",
    "INT8",
    "Arithmetic",
    "Kept",
    "MaskCost",
    "Operations",
    "Tally",
    "contracted",
]

# Horowitz 2014, "Computing's energy problem", ISSCC, figure 1.1.9: 45 nm, 0.9 V; each weight read
# once from DRAM, activations from a cache of 32 kB
_DRAM, _CACHE = 160.0, 2.5  # picojoules a byte: 1.3 nJ and 20 pJ for each 64 bits


@dataclass(frozen=True)
class Operations:
    """Multiply-accumulates of one example, by the tensor that holds the weights.

    Convolutions, linear and recurrent layers, attention and products of matrices count; norms,
    activations, pooling and biases do not. An embedding multiplies nothing.

    Attributes:
        uses: by tensor, how often each of its weights is multiplied.
        sizes: by tensor, its number of weights.
        others: MACs of two activations, as in attention, or with constants of the graph.
        activations: elements that the counted layers read and write.
        largest: the most that one of them does.

    >>> linear = Operations({"weight": 1.0}, {"weight": 200}, activations=30)
    >>> linear.macs, linear.effective({"weight": 20})
    (200, 20)
    """

    uses: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    others: int = 0
    activations: int = 0
    largest: int = 0

    @property
    def macs(self) -> int:
        """Of all weights, zeros included: what dense kernels compute."""
        return self.effective({})

    def effective(self, kept: Mapping[str, int]) -> int:
        """Without those of zeros.

        Args:
            kept: by tensor, how many weights are not zero; tensors left out count whole.
        """
        products = (uses * kept.get(name, self.sizes[name]) for name, uses in self.uses.items())
        return round(sum(products)) + self.others


class Tally:
    """Sums up `Operations`, whatever it is that is counted."""

    def __init__(self) -> None:
        self._macs: dict[str, int] = {}
        self._others = self._activations = self._largest = 0

    def add(self, name: str | None, macs: int) -> None:
        """Count MACs of a tensor of weights; None of two activations, or with constants."""
        if name is None:
            self._others += macs
        else:
            self._macs[name] = self._macs.get(name, 0) + macs

    def move(self, elements: int) -> None:
        """Count what a layer reads and writes."""
        self._activations += elements
        self._largest = max(self._largest, elements)

    def found(self, size: Callable[[str], int]) -> Operations:
        """What has been counted.

        Args:
            size: number of weights of a tensor that was counted.
        """
        sizes = {name: size(name) for name in self._macs}
        uses = {name: macs / (sizes[name] or 1) for name, macs in self._macs.items()}
        return Operations(uses, sizes, self._others, self._activations, self._largest)


def contracted(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """Over how many pairs each output of an einsum sums.

    Args:
        equation: with an output, as in "bi,ji->bj".
        shapes: of the operands.

    >>> contracted("bi,...ji->...bj", [(2, 5), (7, 3, 5)])
    5
    """
    left, _, right = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for letters, shape in zip(left.split(","), shapes, strict=False):
        before, dots, after = letters.partition("...")
        sizes.update(zip(before, shape, strict=False))
        if dots:
            sizes.update(zip(reversed(after), reversed(shape), strict=False))
    return math.prod(size for letter, size in sizes.items() if letter not in right)


@dataclass(frozen=True)
class Arithmetic:
    """What one kind of numbers costs, after Horowitz 2014 ("Computing's energy problem", ISSCC).

    Attributes:
        mac: picojoules of a multiplication and an addition.
        width: bytes of a weight or an activation.
    """

    mac: float
    width: int

    def joules(self, macs: int, weights: int, activations: int) -> float:
        """An *estimate* of the energy of one inference.

        Args:
            macs: multiply-accumulates.
            weights: that are read.
            activations: elements that are read and written.
        """
        moved = self.width * (_DRAM * weights + _CACHE * activations)
        return 1e-12 * (self.mac * macs + moved)

    def memory(self, weights: int, largest: int) -> int:
        """An *estimate* of the bytes that an inference needs: all weights, and its largest layer.

        Args:
            weights: that are stored.
            largest: see `Operations.largest`.
        """
        return self.width * (weights + largest)


FLOAT32 = Arithmetic(3.7 + 0.9, 4)
"""Products and sums in float32."""
INT8 = Arithmetic(0.2 + 0.1, 1)
"""Products of 8 bits, summed in 32."""


@dataclass(frozen=True)
class Kept:
    """How many parameters a model had, and how many of them are left.

    Attributes:
        original: before anything was pruned.
        parameters: that are stored: fewer where channels were removed.
        nonzero: of these that are not zero.

    >>> kept = Kept(1000, 1000, 100)
    >>> kept.compression_ratio, kept.efficiency
    (10.0, 0.9)
    """

    original: int
    parameters: int
    nonzero: int

    @property
    def compression_ratio(self) -> float | None:
        """Original over what is not zero; None where nothing is left."""
        return self.original / self.nonzero if self.nonzero else None

    @property
    def efficiency(self) -> float:
        """Pruning efficiency, (original - pruned) / original: the share that was removed."""
        return (self.original - self.nonzero) / self.original if self.original else 0.0


class MaskCost:
    """What making masks takes of a server, summed over versions.

    Attributes:
        seconds: wall-clock time.
        peak_bytes: the most that Python and NumPy allocated at a time while masks were made, beyond
            what was there before.
        made: how often they were made.
    """

    def __init__(self) -> None:
        self.seconds, self.peak_bytes, self.made = 0.0, 0, 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count what is done meanwhile; allocations are traced for as long as it takes."""
        traced = tracemalloc.is_tracing()
        if traced:
            tracemalloc.reset_peak()
        else:
            tracemalloc.start()
        before, began = tracemalloc.get_traced_memory()[0], time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began
            self.peak_bytes = max(self.peak_bytes, tracemalloc.get_traced_memory()[1] - before)
            self.made += 1
            if not traced:
                tracemalloc.stop()
