"""What is known of each node while a run goes on, and what `prunecast federation status` shows.

Of every round the run's event ``round-finished`` has, as ``status``, how many nodes are in which
state, and the nodes of this round one by one, a bounded number of them; whoever reads all events
of a run knows the last of every node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flwr.app import Message

from prunecast.common.files import StorageError
from prunecast.compression.flower import node_reason

__all__ = ["STATES", "NodeStates", "status_of"]

STATES = ("answered", "failed", "silent", "late", "new", "gone")
"""Of a node: its last message was answered; with an error; not in time; or not waited for. It is
connected and was never asked; it was asked once and is not connected any more."""

_SHOWN = ("state", "seen", "version", "errors")  # of a node, in every event
_NAMED, _LONGEST = 100, 300  # nodes in an event, and characters of a reason
_MOST = 100_000  # nodes that are remembered; a node without a key has a new id after each start


@dataclass
class _Node:
    state: str
    seen: str | None = None
    errors: int = 0
    reason: str = ""


class NodeStates:
    """Follows the messages of a run, and says of every round what became of its nodes.

    Args:
        held: from a node's id to the version that it last said it holds: its number (None where
            that is not known any more) and its digest, "" for none.
    """

    def __init__(self, held: Callable[[int], tuple[int | None, str]]) -> None:
        self._held = held
        self._nodes: dict[int, _Node] = {}
        self._connected: frozenset[int] | None = None
        self._touched: dict[int, None] = {}
        self._failed: dict[int, str] = {}  # in this round, whatever the node answered after that

    def connected(self, ids: Iterable[int]) -> list[int]:
        """Note which nodes the SuperLink lists; returns them."""
        listed = list(ids)
        self._connected = frozenset(listed)
        return listed

    def note(
        self, messages: Iterable[Message], replies: Mapping[str, Message], *, early: bool = False
    ) -> None:
        """Note what came back.

        Args:
            messages: that were sent.
            replies: those that came, by the id of the message that they answer, which may be one
                of a round before.
            early: a round does not wait for all nodes; without a reply, one is late and no more.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for came in replies.values():
            if (late := self._nodes.get(came.metadata.src_node_id)) and not came.has_error():
                late.state, late.seen = "answered", now
                self._touched[came.metadata.src_node_id] = None
        for message in messages:
            node = message.metadata.dst_node_id
            known = self._nodes.pop(node, None) or _Node("new")
            self._nodes[node] = known  # last in order: the first ones are forgotten first
            self._touched[node] = None
            reply = replies.get(message.metadata.message_id)
            if reply is None and early:
                known.state = "late"
            elif reply is None:
                known.state, known.reason = "silent", "no reply in time"
            elif reply.has_error():
                known.state, known.seen = "failed", now
                known.reason = node_reason(str(reply.error.reason))[:_LONGEST]
            else:
                known.state, known.seen = "answered", now
            if known.state in ("failed", "silent"):
                known.errors += 1
                self._failed.setdefault(node, known.state)
        while len(self._nodes) > _MOST:
            self._nodes.pop(next(iter(self._nodes)))

    def of_round(self, version: int | None) -> dict[str, Any]:
        """The field ``status`` of the event ``round-finished``; the next round begins.

        Args:
            version: number of the version that the round arrived at; None for none.
        """
        states = Counter(
            "gone" if self._connected is not None and number not in self._connected else node.state
            for number, node in self._nodes.items()
        )
        if self._connected is not None:
            states["new"] += len(self._connected - self._nodes.keys())
        touched = [number for number in self._touched if number in self._nodes]
        # the others first, and of these the failed ones
        touched.sort(key=lambda n: (n not in self._failed, self._nodes[n].state == "answered"))
        failures = Counter(self._failed.values())
        self._touched, self._failed = {}, {}
        return {
            "version": version,
            "connected": None if self._connected is None else len(self._connected),
            "states": {name: states[name] for name in STATES if states[name]},
            "failures": dict(failures),
            "nodes": [self._told(number) for number in touched[:_NAMED]],
            "others": len(touched[_NAMED:]),
        }

    def _told(self, number: int) -> dict[str, Any]:
        node = self._nodes[number]
        counter, digest = self._held(number)
        # as text: JavaScript rounds integers of 64 bits
        told: dict[str, Any] = {"node": str(number), "state": node.state, "seen": node.seen}
        told |= {"version": counter, "digest": digest, "errors": node.errors}
        return {**told, "reason": node.reason} if node.errors else told


def status_of(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Where a run is and what is known of its nodes, by its events so far.

    Args:
        events: of one run, from the first on, see `prunecast.server.federation.read_events`.

    Returns:
        ``run``, ``name``, ``state`` ("running", "finished" or "failed"), ``round`` (the last that
        is over), ``rounds``, ``metrics`` of it, ``last_event`` (when), ``version`` and
        ``connected`` as of the last round, ``states`` (nodes by state), ``reason`` of a failure,
        and ``nodes``: the last of each node that was named, with ``behind``: how many versions
        there have been since the one that it holds.

    Raises:
        StorageError: an event is not as it is written here.
    """
    try:
        return _status_of(events)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"an event of the run is damaged, or of another version of Prunecast "
            f"({type(error).__name__}: {error}): ask that version, or name another --run"
        ) from error


def _status_of(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    status: dict[str, Any] = {
        "run": "", "name": "", "state": "running", "round": None, "rounds": None, "metrics": {},
        "last_event": None, "version": None, "connected": None, "states": {}, "reason": "",
    }  # fmt: skip
    nodes: dict[str, dict[str, Any]] = {}
    for event in events:
        status["last_event"] = event.get("time")
        kind = event.get("event")
        if kind == "run-started":
            status |= {name: event.get(name) for name in ("run", "name", "rounds")}
        elif kind == "run-failed":
            status |= {"state": "failed", "reason": event.get("reason", "")}
        elif kind == "run-finished":
            status["state"] = "finished"
        elif kind == "round-finished":
            status |= {"round": event.get("round"), "metrics": dict(event.get("metrics") or {})}
            told = event.get("status") or {}  # runs of before have none
            status |= {name: told[name] for name in ("version", "connected", "states") if told}
            status["states"] = dict(status["states"])
            for node in told.get("nodes", ()):
                nodes[node["node"]] = {name: node[name] for name in _SHOWN} | dict(node)
    for node in nodes.values():
        known = node["version"] is not None and status["version"] is not None
        node["behind"] = status["version"] - node["version"] if known else None
    return {**status, "nodes": list(nodes.values())}
