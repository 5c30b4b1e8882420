"""What a reply may hold, given what was sent and what the others hold, whatever it travelled as.

A strategy may ask for anything: gradients, control variates, other layouts. So a reply alone is
only held to what no strategy can mean. That replies fit each other is held where it is known that
Flower's own aggregation takes them, which otherwise ends the run because of one of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from prunecast.compression.flower import NUMPY, STYPE, npy_head
from prunecast.compression.flower.internals import Aggregation
from prunecast.server.federation.errors import ReplyRefused
from prunecast.server.federation.exchange.batches import Prepared
from prunecast.server.federation.exchange.replies.lazy import LazyArray, largest_of
from prunecast.server.federation.policy import Policy

__all__ = ["EXAMPLES", "check_reply", "misfits", "readable"]

EXAMPLES = "num-examples"
"""The metric that Flower's strategies weigh replies by."""
_LARGEST = math.sqrt(float(np.finfo(np.float32).max))  # of a weight: its square is a float32
_MOST_EXAMPLES = 1 << 63  # sums of them over replies stay finite
_EMPTY = "_empty"  # name of the array that Flower's legacy API puts where there are none
_NAMED = 80  # characters of a name that came from outside
_Form = TypeVar("_Form", bound=Hashable)


def check_reply(content: RecordDict, sent: Prepared, policy: Policy, *, values: bool) -> None:
    """Hold a reply to what no strategy can mean otherwise.

    Args:
        content: as the strategy would see it.
        sent: the message that it answers.
        policy: of the run; nothing is checked where both directions are dense.
        values: look at the values of arrays, too, which decodes them.

    Raises:
        ReplyRefused: an array cannot be read; a trained tensor became NaN, infinite, or too large
            for any lattice; a number of examples is not one.
    """
    if policy.down == policy.up == "dense":
        return
    for metrics in content.metric_records.values():
        _check_examples(metrics, EXAMPLES)
    for key, record in content.array_records.items():
        if list(record) == [_EMPTY] and not record[_EMPTY].data:
            continue
        for name, array in list(record.items()):
            if not isinstance(array, LazyArray):
                array = record[name] = _readable(_what(key, name), array)
            if values and array.stype == NUMPY:
                _check_values(_what(key, name), key, name, array, sent, policy)


def _check_examples(record: MetricRecord, name: str) -> None:
    stated = record.get(name)
    if isinstance(stated, int | float) and not 0 <= stated <= _MOST_EXAMPLES:
        raise ReplyRefused(f"metric {name!r} is {stated}, which is no number of examples")


def readable(key: str, record: ArrayRecord) -> ArrayRecord:
    """A record that came as it is, whose arrays can be read within the bytes that came.

    Raises:
        ReplyRefused: one of them cannot.
    """
    return ArrayRecord({name: _readable(_what(key, name), a) for name, a in record.items()})


def _what(key: str, name: str) -> str:
    return f"tensor {name[:_NAMED]!r} of record {key[:_NAMED]!r}"


def _readable(what: str, array: Array) -> Array:
    if array.stype == STYPE:
        raise ReplyRefused(f"{what} is a payload where an array belongs")
    if array.stype != NUMPY:
        return array  # somebody's own serialisation is theirs to read
    data = array.data
    try:
        dtype, shape, head = npy_head(data)
    except ValueError as error:
        raise ReplyRefused(f"{what} is not in NumPy's format: {error}") from error
    if dtype.hasobject:
        raise ReplyRefused(f"{what} holds Python objects, which only pickle could read")
    if math.prod(shape) * dtype.itemsize != len(data) - head:
        raise ReplyRefused(f"{what} does not have as many bytes as its shape {shape} needs")
    if not array.dtype:  # as Flower's legacy API has it
        return Array(dtype=str(dtype), shape=shape, stype=NUMPY, data=data)
    if (str(dtype), tuple(shape)) != (array.dtype, tuple(array.shape)):
        stated = f"{array.dtype[:_NAMED]} {tuple(array.shape)}"
        raise ReplyRefused(f"{what} is stated as {stated}, but is {dtype} {shape}")
    return array


def _check_values(
    what: str, key: str, name: str, array: Array, sent: Prepared, policy: Policy
) -> None:
    """That a trained tensor which was finite stays so, and within what a lattice can hold."""
    before = _sent(key, name, sent)
    # what is no float beside floats is a misfit, if anything
    if not _is_float(array) or before is None:
        return
    if not policy.is_trained(name, _dtype(before), math.prod(before.shape)):
        return
    if isinstance(array, LazyArray):
        if policy.down_step == 0:
            return  # that it is finite was seen when it was decoded, and there is no lattice
        reach = array.reach(sent.batch.largest)
    else:
        reach = largest_of(array.numpy())
    if reach <= _LARGEST:
        return
    if math.isfinite(reach):
        if not reach > 2 * largest_of(before.numpy()):  # large before, or not finite
            return
        raise ReplyRefused(
            f"{what} has weights up to {reach:.3g}: no lattice holds them beside others"
        )
    if np.isfinite(before.numpy()).all():
        raise ReplyRefused(
            f"{what} holds NaN or infinity after local training: lower the learning rate or clip "
            "gradients"
        )


def _sent(key: str, name: str, sent: Prepared) -> Array | None:
    """The array of that name that was sent, under the same key if there is one."""
    records = sent.original.content.array_records
    for candidate in sorted(records, key=lambda k: k != key):
        if name in records[candidate]:
            found: Array = records[candidate][name]
            return found if found.stype == NUMPY else None
    return None


def _is_float(array: Array) -> bool:
    return _dtype(array).kind == "f"


def _dtype(array: Array) -> np.dtype[Any]:
    """As NumPy reads what is stated, if it does."""
    try:
        return np.dtype(array.dtype)
    except TypeError:
        return np.dtype(object)


# -- replies beside each other --------------------------------------------------------------------


def misfits(
    replies: Sequence[tuple[RecordDict, Prepared]], aggregation: Aggregation
) -> dict[int, str]:
    """Which replies Flower's own aggregation could not take together with the others, and why.

    What most of them look like counts, of that which can be aggregated at all; between as many,
    what was sent. Where nothing can be aggregated, none is named: Flower says why.

    Args:
        replies: what came, as the strategy would see it, and the message it answers.
        aggregation: what Flower makes of them.

    Returns:
        Index of a reply to the reason.
    """
    found: dict[int, str] = {}
    contents = [content for content, _ in replies]
    if aggregation.arrays:
        shapes = aggregation.shapes
        forms = [_array_form(content, shapes=shapes) for content in contents]
        as_sent = {_layout_of(r, shapes=shapes) for _, s in replies for r in _records(s)}
        found |= _odd(
            forms,
            lambda form: len(form) == 1 and all(map(_can_be_averaged, form[0][1])),
            lambda form: form[0][1] in as_sent,
            _array_difference,
        )
    weight = aggregation.weight
    metrics = [_metric_form(content, lengths=aggregation.lengths) for content in contents]
    found = {
        **_odd(
            metrics,
            lambda form: len(form) == 1 and (weight, "number") in form[0][1],
            lambda form: False,
            _metric_difference,
        ),
        **found,
    }
    for index, content in enumerate(contents):
        if index not in found:
            try:
                for record in content.metric_records.values():
                    _check_examples(record, weight)
            except ReplyRefused as error:
                found[index] = str(error)
    return found | _weightless(contents, weight, found)


def _records(sent: Prepared) -> list[ArrayRecord]:
    return list(sent.original.content.array_records.values())


def _weightless(
    contents: Sequence[RecordDict], weight: str, found: dict[int, str]
) -> dict[int, str]:
    """All that are left where the weights that Flower divides by sum up to zero."""
    left: list[int] = []
    total = 0.0
    for index, content in enumerate(contents):
        if index in found:
            continue
        stated = next(iter(content.metric_records.values()), MetricRecord()).get(weight)
        if not isinstance(stated, int | float):
            return {}
        left.append(index)
        total += stated
    reason = f"metric {weight!r} is 0 in every reply: there is nothing to weigh them by"
    return dict.fromkeys(left, reason) if left and total == 0 else {}


def _odd(
    forms: Sequence[_Form],
    fits: Callable[[_Form], bool],
    is_preferred: Callable[[_Form], bool],
    difference: Callable[[_Form, _Form], str],
) -> dict[int, str]:
    counts = Counter(form for form in forms if fits(form))
    if not counts:
        return {}
    usual = max(counts, key=lambda form: (counts[form], is_preferred(form)))
    return {i: difference(form, usual) for i, form in enumerate(forms) if form != usual}


_Layout = frozenset[tuple[str, str, tuple[int, ...]]]
_Arrays = tuple[tuple[str, _Layout], ...]
_Metrics = tuple[tuple[str, frozenset[tuple[str, str]]], ...]


def _can_be_averaged(tensor: tuple[str, str, tuple[int, ...]]) -> bool:
    return tensor[1] == "number" or tensor[1].startswith("complex")


def _array_form(content: RecordDict, *, shapes: bool) -> _Arrays:
    records = content.array_records.items()
    return tuple((key, _layout_of(record, shapes=shapes)) for key, record in records)


def _layout_of(record: ArrayRecord, *, shapes: bool) -> _Layout:
    return frozenset(
        (name, _kind(array), tuple(array.shape) if shapes else ()) for name, array in record.items()
    )


def _kind(array: Array) -> str:
    """What an array can be averaged with: numbers with numbers, whatever their width."""
    if array.stype != NUMPY:
        return array.stype
    return "number" if _dtype(array).kind in "biuf" else array.dtype


def _record_difference(kind: str, form: _Arrays | _Metrics, usual: _Arrays | _Metrics) -> str:
    if len(form) != 1:
        return f"it has {len(form)} {kind} records, and the others have one"
    if (key := form[0][0]) != (usual_key := usual[0][0]):
        return f"its {kind} record is {key[:_NAMED]!r}, and that of the others is {usual_key!r}"
    return ""


def _array_difference(form: _Arrays, usual: _Arrays) -> str:
    if apart := _record_difference("array", form, usual):
        return apart
    mine, theirs = ({e[0]: e[1:] for e in layout} for ((_, layout),) in (form, usual))
    for name in sorted(theirs):
        if name not in mine:
            return f"tensor {name!r} is missing, which the other replies have"
        if mine[name] != theirs[name]:
            return (
                f"tensor {name!r} is {_told(*mine[name])}, and that of the other replies is "
                f"{_told(*theirs[name])}"
            )
    more = min(set(mine) - set(theirs))
    return f"tensor {more[:_NAMED]!r} is one that no other reply has"


def _told(kind: str, shape: tuple[int, ...]) -> str:
    return f"of shape {shape}" + (f" and kind {kind[:_NAMED]!r}" if kind != "number" else "")


def _metric_form(content: RecordDict, *, lengths: bool) -> _Metrics:
    return tuple(
        (key, frozenset((name, _metric_kind(value, lengths=lengths)) for name, value in r.items()))
        for key, r in content.metric_records.items()
    )


def _metric_kind(value: object, *, lengths: bool) -> str:
    if not isinstance(value, list):
        return "number"
    return f"list of {len(value)}" if lengths else "list"


def _metric_difference(form: _Metrics, usual: _Metrics) -> str:
    if apart := _record_difference("metric", form, usual):
        return apart
    mine, theirs = (dict(metrics) for ((_, metrics),) in (form, usual))
    for name in sorted(theirs):
        if mine.get(name) != theirs[name]:
            return f"metric {name!r} is {mine.get(name, 'missing')}, not {theirs[name]}"
    return f"metric {min(set(mine) - set(theirs))[:_NAMED]!r} is one that no other reply has"
