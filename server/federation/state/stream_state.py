"""All that a grid has to know to go on where another was: its streams, its nodes, its counters.

What a stream publishes next follows from the master alone only in part: integers stay for the sake
of those before (hysteresis), pruning follows sums over versions, nodes get differences to what they
hold. So every field of the objects that decide it is taken, but for those that are named here and
follow from the policy or live no longer than one version.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.statistics import StatisticsMean
from prunecast.compression.schemes.layout import layout_of, state_arrays, state_from
from prunecast.compression.versions import (
    Capabilities,
    InvalidModel,
    LatticeTensor,
    PublishedModel,
    Tensor,
    short,
)
from prunecast.compression.versions.model import narrowest
from prunecast.server.federation.errors import CheckpointError
from prunecast.server.federation.exchange.outbound import Outbound
from prunecast.server.federation.publishing.budgets import Budget
from prunecast.server.federation.publishing.classes import Treatment
from prunecast.server.federation.publishing.history import Coded, History
from prunecast.server.federation.publishing.masks.mask_state import MaskState
from prunecast.server.federation.publishing.masks.pruner import Pruner
from prunecast.server.federation.publishing.publisher import Publisher
from prunecast.server.federation.publishing.scheme_publisher import Link, SchemePublisher
from prunecast.server.federation.publishing.streams import NodeState, Streams
from prunecast.server.federation.publishing.version import Version
from prunecast.server.federation.publishing.widths import Slices

__all__ = ["grid_state", "know_nodes", "put_grid"]

# what follows from the policy and its rounds, or from the caller; what is taken apart below; and
# what does not outlive the making of one version
_PUBLISHER = {
    *("policy", "stream", "mask_cost", "choose"),
    *("pruner", "_lattices", "_latest", "history", "slices", "_recent", "_state", "_links"),
    *("changes", "holders", "_occasion", "_seeded"),
}
_LATTICES = {"policy", "weights", "lengths"}
_PRUNER = {
    *("policy", "plan", "holds", "_votes_by", "_until"),
    *("statistics", "measured", "progress", "search", "_state"),
    *("_votes", "_rewound", "_grown", "_is_known"),
}
_PROGRESS = {"begin", "end"}
_BUDGET = {"limits", "turned", "most_halvings", "rounds"}
_PARTS: dict[str, type] = {"able": Capabilities, "treatment": Treatment}  # of what nodes said


def grid_state(
    streams: Streams, outbound: Outbound, run_id: int, contents: Mapping[str, str]
) -> dict[str, Any]:
    """What `put_grid` takes.

    Args:
        streams: of the grid.
        outbound: of the grid.
        run_id: Flower's.
        contents: record key to digest of what the strategy sends under it next.
    """
    found = {key: stream for (run, key), stream in streams._streams.items() if run == run_id}
    return {
        "job": streams.job or str(run_id),
        "attempt": streams.attempt,
        "round": streams.round,
        "nodes": nodes_state(streams._nodes),
        "budget": None if streams.budget is None else _budget_state(streams.budget),
        "participation": _taken(streams.participation, ()),
        "answered": set(outbound.answered),
        "count": outbound._count,
        "streams": {
            key: stream_state(stream, held_by(streams._nodes, key), contents.get(key, ""))
            for key, stream in found.items()
        },
    }


def put_grid(
    streams: Streams,
    outbound: Outbound,
    run_id: int,
    state: Mapping[str, Any],
    contents: Mapping[str, str],
) -> None:
    """Go on where another grid of the same policy was, in a new attempt of its job.

    Raises:
        CheckpointError: the state is of another version of Prunecast.
        KeyError, TypeError, ValueError: it is no such state.
    """
    know_nodes(streams, run_id, state, versions=False)
    streams.round = state["round"]
    _put(streams.participation, state["participation"], ())
    if streams.budget is not None:
        _put_budget(streams.budget, state["budget"])
    outbound.answered |= state["answered"]
    outbound._count = state["count"]
    for key, found in state["streams"].items():
        put_stream(streams.stream(run_id, key), found, contents.get(key, ""))


def know_nodes(
    streams: Streams, run_id: int, state: Mapping[str, Any], *, versions: bool = True
) -> None:
    """Be a new attempt of the job of another grid, and know its nodes and what they hold.

    Raises:
        KeyError, TypeError, ValueError: the state is none of `grid_state`.
    """
    streams.use_job(state["job"], state["attempt"] + 1)
    streams._nodes.update(nodes_from(state["nodes"]))
    for key, found in state["streams"].items() if versions else ():
        hold(streams.stream(run_id, key), found)


def _budget_state(budget: Budget) -> dict[str, Any]:
    return {
        name: _by_name(value) if is_dataclass(value) else value
        for name, value in _taken(budget, _BUDGET).items()
    }


def _put_budget(budget: Budget, state: Mapping[str, Any]) -> None:
    """Parts, such as means, are of the classes that they have in a budget that begins."""
    begins = vars(budget).items()
    parts: dict[str, Any] = {
        name: type(part) for name, part in begins if name not in _BUDGET and is_dataclass(part)
    }
    whole = {n: parts[n](**value) if n in parts else value for n, value in state.items()}
    _put(budget, whole, _BUDGET)


def held_by(nodes: Mapping[int, NodeState], key: str) -> set[bytes]:
    """Short digests of the versions that nodes hold of a record."""
    return {node.held[key] for node in nodes.values() if key in node.held}


def nodes_state(nodes: Mapping[int, NodeState]) -> dict[int, dict[str, Any]]:
    """What nodes said of themselves, and are to be told."""
    return {
        number: {name: _plain(value) for name, value in _by_name(node).items()}
        for number, node in nodes.items()
    }


def nodes_from(state: Mapping[int, Mapping[str, Any]]) -> dict[int, NodeState]:
    """Inverse of `nodes_state`; but nodes that were left out are asked anew.

    They, or this server, may have been updated since, as they were told.
    """
    nodes = {
        number: NodeState(
            **{
                name: _PARTS[name](**value) if name in _PARTS and value is not None else value
                for name, value in found.items()
            }
        )
        for number, found in state.items()
    }
    for node in nodes.values():
        if node.foreign and not node.treatment.dense:
            node.foreign, node.able = "", None
    return nodes


def _by_name(owner: Any) -> dict[str, Any]:
    return {field.name: getattr(owner, field.name) for field in fields(owner)}


def _plain(value: Any) -> Any:
    return _by_name(value) if type(value) in _PARTS.values() else value


def stream_state(stream: Publisher, held: Collection[bytes], content: str = "") -> dict[str, Any]:
    """What `put_stream` takes.

    Args:
        stream: of one record.
        held: short digests of the versions that nodes hold; others are left out.
        content: digest of the content that its latest version was published from; "" where nobody
            will send it again.
    """
    latest = stream._latest
    version = stream._recent.get(content)
    state: dict[str, Any] = {
        "fields": _taken(stream, _PUBLISHER),
        "lattices": _taken(stream._lattices, _LATTICES),
        "pruner": _pruner_state(stream.pruner),
        "latest": latest,
        "history": _older(stream.history, latest, held),
        "changes": _taken(stream.changes, ()),
        "master": None if version is None else dict(version.master),
        "slices": None if stream.slices is None else _slices_state(stream.slices, held),
    }
    if isinstance(stream, SchemePublisher):
        links = [(link.base, link.made, link.payload) for link in stream._links]
        coded = None if stream._state is None else state_arrays(stream._state)
        shapes = None if stream._state is None else dict(stream._state.layout)
        state["scheme"] = {"links": links, "state": coded, "layout": shapes}
    return state


def put_stream(stream: Publisher, state: Mapping[str, Any], content: str = "") -> None:
    """Go on where another stream of the same policy was.

    Args:
        stream: that has published nothing.
        state: of `stream_state`.
        content: digest of the content that is sent next.

    Raises:
        KeyError, TypeError, ValueError: it is no such state.
    """
    _put(stream, state["fields"], _PUBLISHER)
    _put(stream._lattices, state["lattices"], _LATTICES)
    _put_pruner(stream.pruner, state["pruner"])
    _put(stream.changes, state["changes"], ())
    hold(stream, state)
    if content and state["master"] is not None and stream._latest is not None:
        version = Version(stream._latest, state["master"])
        version.whole = version.master
        stream._recent[content] = version
        if stream._trial is not None:  # the zeros are of the version's own master
            stream._trial = stream._trial[0], version.master
    if isinstance(stream, SchemePublisher):
        scheme, chosen = state["scheme"], stream.policy.down_scheme
        stream._links = deque(Link(*link) for link in scheme["links"])
        if scheme["state"] is not None and chosen is not None:
            zeros = {n: np.zeros(shape, np.float32) for n, shape in scheme["layout"].items()}
            stream._state = state_from(scheme["state"], chosen.init(layout_of(zeros)))


def hold(stream: Publisher, state: Mapping[str, Any]) -> None:
    """Know the versions that nodes hold, so that payloads build on them, and the latest one."""
    stream._latest = state["latest"]
    _newer(stream.history, state["history"], stream._latest, stream.stream)
    if stream.slices is not None and state["slices"] is not None:
        _put_slices(stream.slices, state["slices"], stream.stream)


# -- by field -------------------------------------------------------------------------------------


def _taken(owner: Any, but: Collection[str]) -> dict[str, Any]:
    """The fields of an object, without what it was told to call."""
    fields_ = vars(owner).items()
    return {name: value for name, value in fields_ if name not in but and not callable(value)}


def _put(owner: Any, state: Mapping[str, Any], but: Collection[str]) -> None:
    if state.keys() != _taken(owner, but).keys():
        raise CheckpointError("the checkpoint is of another version of Prunecast: go on with that")
    vars(owner).update(state)


def _pruner_state(pruner: Pruner) -> dict[str, Any]:
    return {
        "fields": _taken(pruner, _PRUNER),
        "progress": _taken(pruner.progress, _PROGRESS),
        "masks": _by_name(pruner._state),
        "statistics": dict(pruner.statistics._means),
        "measured": pruner.measured.position,
        "search": None if pruner.search is None else pruner.search.position,
    }


def _put_pruner(pruner: Pruner, state: Mapping[str, Any]) -> None:
    _put(pruner, state["fields"], _PRUNER)
    _put(pruner.progress, state["progress"], _PROGRESS)
    pruner._thinned()
    pruner._state = MaskState(**state["masks"])
    pruner.statistics = StatisticsMean()
    pruner.statistics._means = state["statistics"]
    pruner.measured.resume(state["measured"])
    if pruner.search is not None:
        pruner.search.resume(state["search"])
        pruner._search_says()


# -- versions -------------------------------------------------------------------------------------


def _slices_state(slices: Slices, held: Collection[bytes]) -> dict[str, Any]:
    found = {}
    for width, history in slices._history.items():
        latest = slices.latest(width)
        kept = _older(history, latest, held)
        found[width] = latest, kept, dict(slices.statistics.get(width, {}))
    return found


def _put_slices(slices: Slices, state: Mapping[str, Any], stream: bytes) -> None:
    for width, (latest, history, statistics) in state.items():
        if width in slices.plans:
            _newer(slices._history[width], history, latest, stream)
            if statistics:
                slices.statistics[width] = statistics


def _older(
    history: History, latest: PublishedModel | None, held: Collection[bytes]
) -> dict[str, list[Any]]:
    """Versions that nodes hold, oldest first: keyframes, and what differs from the latest one.

    A digest is that of what a node holds, which may have more channels.
    """
    now = b"" if latest is None else short(latest.digest)
    found = []
    for digest, model in history._whole.items():
        if digest != now and digest not in held:
            continue
        tensors: list[Any] = []
        for name, tensor in model.tensors.items():
            last = None if latest is None else latest.tensors.get(name)
            tensors.append((name, _difference(tensor, last)))
        found.append((digest, model.counter, tensors))
    coded = [(d, c.data, c.nbytes) for d, c in history._coded.items() if d in held]
    return {"coded": coded, "whole": found}


def _difference(tensor: Tensor, last: Tensor | None) -> Any:
    """None for no difference; deflated integers where both are on a lattice; else the tensor."""
    if tensor is last:
        return None
    if not (isinstance(tensor, LatticeTensor) and isinstance(last, LatticeTensor)):
        return PublishedModel({"": tensor}, 0)
    if last.shape != tensor.shape:
        return PublishedModel({"": tensor}, 0)
    try:
        apart = narrowest(tensor.q.astype(np.int64) - last.q)
    except InvalidModel:  # further apart than 32 bits
        return PublishedModel({"": tensor}, 0)
    data = zlib.compress(np.asarray(apart, order="C").data, 1)
    return (data, apart.dtype.str, tensor.step, tensor.pruned, np.dtype(tensor.dtype))


def _newer(
    history: History,
    older: Mapping[str, list[Any]],
    latest: PublishedModel | None,
    stream: bytes,
) -> None:
    """Inverse of `_older`: makes a history that of another, of a stream that is named so now."""
    found: OrderedDict[bytes, PublishedModel] = OrderedDict()
    for digest, counter, differences in older["whole"]:
        tensors: dict[str, Tensor] = {}
        for name, apart in differences:
            last = None if latest is None else latest.tensors.get(name)
            tensors[name] = _applied(apart, last)
        model = PublishedModel(tensors, counter)
        same = latest is not None and counter == latest.counter and model.digest == latest.digest
        found[digest] = latest if same and latest is not None else model
    history._whole, history._stream = found, stream
    history._coded = OrderedDict(
        (digest, Coded(data, nbytes)) for digest, data, nbytes in older["coded"]
    )


def _applied(apart: Any, last: Tensor | None) -> Tensor:
    if apart is None:
        if last is None:
            raise ValueError("a version differs in nothing from one that has no such tensor")
        return last
    if isinstance(apart, PublishedModel):
        return apart.tensors[""]
    data, dtype, step, pruned, of = apart
    if not isinstance(last, LatticeTensor):
        raise ValueError("a version differs from one that is not on a lattice")
    q: NDArray[Any] = np.frombuffer(zlib.decompress(data), np.dtype(dtype)).reshape(last.shape)
    return LatticeTensor(last.q.astype(np.int64) + q, step, pruned, of)
