"""What a reply's record is coded as, tensor by tensor: changes, values of its own, exact arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.client.training.store import NonFiniteUpdate
from prunecast.compression.codec import NonFiniteError, QuantiseError, TensorSpec, quantise
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    QuantisedTensor,
    ReplyTensor,
    UpdateRule,
    exact_change,
    is_large,
    is_statistic,
    rounded_floats,
)

__all__ = ["Coded", "align", "compress_reply", "is_own", "kept_whole", "norm_of"]

_MANTISSAS = 16  # of steps, from a power of two to the next
_LARGE = 1024  # elements: a tensor that the version lacks travels exactly below
_FINE = 0.1  # step of such a tensor, in root mean squares of itself: nothing makes up for its error
_CHUNK = 1 << 16  # elements that are wide at a time
_CLEARLY = 2.0  # times smaller one way: then a tensor is coded that way, whatever its record is
_ROUNDING = 1e-6  # relative: what float32 may add to a norm
_AT_THE_CLIP = 1e-3  # relative: a reply above its clip by more was clipped by nobody
# after the name of a tensor: whether its residual is of values, of changes, or of what was both,
# as the tensor that was received is all zero
_KEPT = {True: "\0values", False: "", None: "\0either"}

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Coded:
    """A record, ready for `prunecast.compression.versions.encode_update`.

    Attributes:
        tensors: what the record's arrays are, by name and in its order.
        changes: what is sent, by name: quantised, or exact; absent where it is as the version's.
        dropped: what quantisation dropped, to be added next time; empty without error feedback.
    """

    tensors: dict[str, ReplyTensor]
    changes: dict[str, QuantisedTensor | NDArray[Any]]
    dropped: dict[str, NDArray[Any]]

    @property
    def unlike(self) -> dict[str, int]:
        """Bytes of the arrays that no tensor of the version resembles, by name."""
        return {
            name: tensor.spec.nbytes
            for name, tensor in self.tensors.items()
            if tensor.spec is not None and tensor.like is None
        }


def align(
    arrays: Mapping[str, NDArray[Any] | None], specs: Mapping[str, TensorSpec]
) -> dict[str, ReplyTensor]:
    """What each array of a record is to those received: the one of its name and shape, or none.

    A record without any of their names, such as an unnamed list, goes by positions.

    Args:
        arrays: by name, in the reply's order; None for what the codec does not know.
        specs: of the arrays received, in their order.
    """
    names = {name: name for name in arrays}
    known = [None if array is None else array.shape for array in arrays.values()]
    if not any(name in specs for name in arrays) and known == [s.shape for s in specs.values()]:
        names = dict(zip(arrays, specs, strict=True))
    tensors: dict[str, ReplyTensor] = {}
    for name, array in arrays.items():
        if array is None:
            tensors[name] = ReplyTensor(None)
            continue
        spec = specs.get(names[name])
        like = names[name] if spec is not None and spec.shape == array.shape else None
        tensors[name] = ReplyTensor(TensorSpec(array.dtype, array.shape), like)
    return tensors


@dataclass(frozen=True)
class _Sizes:
    """Of a tensor that is on the lattice: how large its change is, and how large itself.

    Attributes:
        change: norm of its change where the mask keeps weights.
        pruned: norm of its change elsewhere.
        value: norm of itself.
        kept: number of weights that the mask keeps.
        count: number of weights.
    """

    change: float
    pruned: float
    value: float
    kept: int
    count: int

    @property
    def step(self) -> float:
        """The smaller root mean square of the two, above zero where one is."""
        change = self.change / math.sqrt(max(self.kept, 1))
        value = self.value / math.sqrt(max(self.count, 1))
        return min(change, value) or max(change, value)

    @property
    def whole_change(self) -> float:
        """Norm of all of its change."""
        return math.hypot(self.change, self.pruned)


def compress_reply(
    base: PublishedModel,
    record: Mapping[str, NDArray[Any] | None],
    residual: Arrays,
    rule: UpdateRule,
    *,
    clip: float | None = None,
) -> Coded:
    """Quantise what is of floating point, each tensor as a change or as values of its own.

    A tensor that the version has on its lattice is a change, *reply - published* under the mask,
    or the values themselves, whichever is smaller; its step is ``rule.step`` times the smaller
    root mean square of the two. So weights, gradients, differences and control variates all arrive
    with the same error relative to themselves. What earlier rounds dropped is added to either.

    Without error feedback, and where a clipping norm is in effect, nothing is added, all tensors
    of a record are coded alike (under a clip as changes), and what is sent of a tensor has at most
    the norm that was given: steps shrink for it. Post-processing of what a mechanism of
    differential privacy returned, its noise included, keeps the guarantee (Dwork and Roth 2014,
    "The Algorithmic Foundations of Differential Privacy", proposition 2.1).

    A large tensor that the version does not have goes as values in a fine step; all others, and
    what does not fit integers of 32 bits, exactly. Running statistics of normalisation layers that
    the version has are rounded to the rule's mantissa bits first, but not without error feedback
    or under a clip, since rounding may add to a norm.

    Args:
        base: the version that the record answers.
        record: its arrays, see `align`.
        residual: what earlier rounds dropped, by name; other shapes are passed over.
        rule: step, dead zone, error feedback; see `UpdateRule.in_model`.
        clip: norm that the change of the whole record was clipped to; None for no clipping.

    Raises:
        NonFiniteUpdate: a tensor of the lattice holds NaN or infinity.
        QuantiseError: a tensor has no step, as its values leave float32.
    """
    specs = base.specs
    tensors, weights = align(record, specs), sum(spec.size for spec in specs.values())
    arrays = {name: array for name, array in record.items() if array is not None}
    if clip is not None:
        rule = replace(rule, error_feedback=False)
    rule = rule.in_model(weights)
    sizes = {
        name: _measure(name, base[like], arrays[name])
        for name, tensor in tensors.items()
        if (like := _on_lattice(tensor, base)) is not None
    }
    # what the record is as a whole, for tensors that do not tell clearly (biases near zero)
    whole = math.hypot(*(s.value for s in sizes.values())) < math.hypot(
        *(s.whole_change for s in sizes.values())
    )
    within = 1.0 if clip is None else _within_clip(clip, sizes, arrays, tensors, base)
    changes: dict[str, QuantisedTensor | NDArray[Any]] = {}
    left = dict(residual) if rule.error_feedback else {}
    for name, tensor in tensors.items():
        like = _on_lattice(tensor, base)
        change: QuantisedTensor | NDArray[Any] | None
        if tensor.spec is None:
            continue
        if like is None or rule.step == 0:
            change = _exact_or_fine(name, tensor, arrays[name], base, rule)
        else:
            lattice = base[like]
            assert isinstance(lattice, LatticeTensor)
            size = sizes[name]
            own = whole
            if rule.error_feedback:
                before = [own for own in (True, False) if like + _KEPT[own] in left]
                usual = before[0] if len(before) == 1 else whole  # its residual is of that
                own = is_own(size.whole_change, size.value, whole=usual)
            large = is_large(specs[like].size, weights)
            coder = _Coder(name, like, own and clip is None, lattice, size, rule, within, large)
            change = coder.code(arrays[name], left)
        if change is not None:
            changes[name] = change
    return Coded(tensors, changes, left)


def kept_whole(
    base: PublishedModel, record: Mapping[str, NDArray[Any] | None], residual: Arrays
) -> tuple[dict[str, NDArray[Any]], float] | None:
    """The residual where nothing is sent: of each tensor its change, and what was dropped before.

    Args:
        base: the version that the record answers, name by name.
        record: its arrays.
        residual: by name, as `compress_reply` leaves it.

    Returns:
        The residual, and the norm of what it has of the record; None where a tensor is, or was, no
        change but values of its own, or none is on the lattice.

    Raises:
        NonFiniteUpdate: a tensor of the lattice holds NaN or infinity.
    """
    left, norms = dict(residual), []
    change = value = 0.0
    for name, array in record.items():
        tensor = base.tensors.get(name)
        if array is None or array.dtype.kind != "f" or not isinstance(tensor, LatticeTensor):
            continue
        if name + _KEPT[True] in left:
            return None
        size = _measure(name, tensor, array)
        change, value = math.hypot(change, size.whole_change), math.hypot(value, size.value)
        total = array.astype(_working(array)) - tensor.dense().astype(_working(array))
        for kind in (_KEPT[False], _KEPT[None]):
            kept = left.pop(name + kind, None)
            if kept is not None and kept.shape == array.shape:
                total += kept.astype(total.dtype)
        if (mask := tensor.mask()) is not None:
            total *= mask
        left[name + _KEPT[False if tensor.q.any() else None]] = total
        norms.append(norm_of(total))
    return (left, math.hypot(*norms)) if norms and change <= value else None


def _on_lattice(tensor: ReplyTensor, base: PublishedModel) -> str | None:
    """Name of the lattice tensor that a float tensor belongs to."""
    if tensor.spec is None or tensor.like is None or tensor.spec.dtype.kind != "f":
        return None
    return tensor.like if isinstance(base[tensor.like], LatticeTensor) else None


def _in_few_bits(step: float) -> float:
    """The next float32 above with few bits of mantissa: a layout of many such steps is shorter."""
    if not math.isfinite(step):
        return step
    mantissa, exponent = math.frexp(step)
    rounded = math.ldexp(math.ceil(mantissa * 2 * _MANTISSAS) / (2 * _MANTISSAS), exponent)
    return rounded if rounded <= np.finfo(np.float32).max else step


def _working(array: NDArray[Any]) -> type[np.floating]:
    return np.float64 if array.dtype == np.float64 else np.float32


def norm_of(*arrays: NDArray[Any]) -> float:
    """Euclidean norm of arrays together, in float64."""
    total = 0.0
    for array in arrays:
        flat: NDArray[Any] = array.reshape(-1)
        for begin in range(0, flat.size, _CHUNK):
            with np.errstate(over="ignore"):  # an infinite step is refused later
                squares = np.square(flat[begin : begin + _CHUNK], dtype=np.float64)
                total += float(np.sum(squares))
    return math.sqrt(total)


def is_own(change: float, value: float, *, whole: bool) -> bool:
    """Whether a tensor goes as values of its own, and not as a change.

    Args:
        change: norm of its change.
        value: norm of itself.
        whole: what its record is, which decides where the two are alike.
    """
    return value < change * (_CLEARLY if whole else 1 / _CLEARLY)


def _measure(name: str, tensor: Any, array: NDArray[Any]) -> _Sizes:
    if not np.isfinite(array).all():
        raise NonFiniteUpdate(
            f"tensor {name!r} holds NaN or infinity after local training: the update was not "
            "sent. Lower the learning rate or clip gradients."
        )
    working = _working(array)
    change = array.astype(working) - tensor.dense().astype(working)
    mask = tensor.mask()
    if mask is None:
        return _Sizes(norm_of(change), 0.0, norm_of(array), change.size, change.size)
    whole, kept = norm_of(change), norm_of(np.multiply(change, mask, out=change))
    pruned = math.sqrt(max(whole**2 - kept**2, 0.0)) if math.isfinite(whole) else 0.0
    return _Sizes(kept, pruned, norm_of(array), int(np.count_nonzero(mask)), change.size)


def _within_clip(
    clip: float,
    sizes: Mapping[str, _Sizes],
    arrays: Arrays,
    tensors: Mapping[str, ReplyTensor],
    base: PublishedModel,
) -> float:
    """Part of the changes on the lattice that may be sent, so that all together stay in the clip.

    All of them where the reply is above it by more than rounding: then `clipping_norm` means
    something else to this app, or nobody clipped, and plain Flower would not, either.
    """
    exact = [
        norm_of(arrays[name].astype(np.float64) - base[tensor.like].dense().astype(np.float64))
        for name, tensor in tensors.items()
        if tensor.like is not None and name not in sizes and name in arrays
    ]
    beside = math.hypot(*exact)
    coded = math.hypot(*(size.change for size in sizes.values()))
    given = math.hypot(beside, *(size.whole_change for size in sizes.values()))
    if not 0 < given <= clip * (1 + _AT_THE_CLIP) or coded == 0:
        return 1.0
    left = min(given, clip) ** 2 - beside**2
    return min(1.0, math.sqrt(max(left, 0.0)) / coded)


@dataclass(frozen=True)
class _Coder:
    """Quantises one tensor that the version has on its lattice."""

    name: str
    like: str
    own: bool
    tensor: LatticeTensor
    size: _Sizes
    rule: UpdateRule
    within: float
    large: bool

    def code(
        self, array: NDArray[Any], left: dict[str, NDArray[Any]]
    ) -> QuantisedTensor | NDArray[Any] | None:
        """What is sent; `left`, the residuals, is brought up to date."""
        working = _working(array)
        target = array.astype(working)
        mask = None if self.own else self.tensor.mask()
        if not self.own:
            target -= self.tensor.dense().astype(working)
            if mask is not None:
                target *= mask
        given = self.size.value if self.own else self.size.change
        with np.errstate(over="ignore"):
            step = self.rule.step * self.size.step
            floor = self.rule.floor if self.rule.error_feedback else 0.0  # nothing brings it later
            if floor and not self.own and np.ptp(self.tensor.q):
                # the lattice of what is constant yet says nothing of how large changes are
                step = max(step, self.rule.least_step(self.tensor.step, large=self.large))
            step = float(np.float32(step))
            if self.rule.error_feedback and not self.own:
                step = _in_few_bits(step)
        if given == 0 or step <= np.finfo(np.float32).tiny:
            return QuantisedTensor(np.zeros(array.shape, np.int32), 1.0, True) if self.own else None
        if self.rule.error_feedback:
            target += self._residual(left, step, target, mask)
        try:
            z = quantise(target, step, dead_zone=self.rule.dead_zone, name=self.name)
        except QuantiseError as error:
            if isinstance(error, NonFiniteError) or not math.isfinite(step):
                raise
            return array  # its residual waits
        if self.rule.error_feedback:
            for kind in _KEPT.values():
                left.pop(self.like + kind, None)
            kept = self.own if self.tensor.q.any() else None
            dropped = (target - z * working(np.float32(step))).astype(working)
            left[self.like + _KEPT[kept]] = dropped
        else:
            step = _shrunk(z, step, self._may_have(given, array.dtype))
        return QuantisedTensor(z, step, self.own) if self.own or z.any() else None

    def _residual(
        self,
        left: Mapping[str, NDArray[Any]],
        step: float,
        like: NDArray[Any],
        mask: NDArray[np.bool_] | None,
    ) -> NDArray[Any]:
        """What earlier rounds dropped of the tensor.

        What was dropped while it was coded the other way may be of another thing (weights, then
        gradients), in other proportions. It is brought to where this very quantisation could have
        left it: more would drown what is sent now.
        """
        total = np.zeros_like(like)
        for own, kind in _KEPT.items():
            kept = left.get(self.like + kind)
            if kept is None or kept.shape != like.shape:
                continue
            other = own is (not self.own)
            reach = float(np.abs(kept).max(initial=0.0)) if other else 0.0
            most = self.rule.dead_zone * step
            total += (kept * (most / reach) if reach > most else kept).astype(like.dtype)
        return total if mask is None else total * mask

    def _may_have(self, given: float, dtype: np.dtype[Any]) -> float:
        """The norm that may be sent of a given one, less what rounding may add on the server."""
        most = self.within * given
        if self.own:
            return most
        # the server adds the change to weights that are about the published ones
        precision = max(float(np.finfo(d).eps) for d in (np.float32, dtype, self.tensor.dtype))
        return max(most - precision * norm_of(self.tensor.dense()), 0.0)


def _shrunk(z: NDArray[np.int32], step: float, most: float) -> float:
    """The step, or a smaller one with which all values together have a norm of at most `most`."""
    norm = norm_of(z) * step
    if norm * (1 + _ROUNDING) <= most:
        return step
    smaller = np.float32(step * most / norm * (1 - 2 * _ROUNDING))
    return float(max(smaller, np.finfo(np.float32).tiny))


def _exact_or_fine(
    name: str, tensor: ReplyTensor, array: NDArray[Any], base: PublishedModel, rule: UpdateRule
) -> QuantisedTensor | NDArray[Any] | None:
    is_float = array.dtype.kind == "f"
    if tensor.like is not None:
        rounds = rule.statistics_bits and rule.step > 0 and rule.error_feedback
        if rounds and is_float and array.size > 1 and is_statistic(tensor.like):
            array = rounded_floats(array, rule.statistics_bits)
        return exact_change(array, base[tensor.like])
    worth_it = rule.step > 0 and is_float and array.size >= _LARGE
    if not worth_it or not np.isfinite(array).all():
        return array
    norm = norm_of(array)
    if norm == 0:
        return None
    step = float(np.float32(min(rule.step, _FINE) * norm / array.size**0.5))
    try:
        z = quantise(array, step, name=name)
    except QuantiseError:
        return array
    return QuantisedTensor(z, _shrunk(z, step, norm), True)
