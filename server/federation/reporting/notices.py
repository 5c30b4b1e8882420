"""What a run's people must be told: each thing once when it happens, all of it in one line."""

from __future__ import annotations

import threading
from collections import Counter
from logging import WARNING

from flwr.app import ArrayRecord

from prunecast.compression.flower import NUMPY, is_codable
from prunecast.compression.flower.internals import log

__all__ = ["Notices", "uncodable"]

_KEPT = 10_000  # different things that are said; more are only counted
_NAMED = 80  # characters of a name that came from outside
_LISTED = 5  # nodes and kinds that the summary names


def uncodable(record: ArrayRecord) -> str:
    """The first array that the codec does not take, and why; "" where there is none."""
    for name, array in record.items():
        if is_codable(ArrayRecord({name: array})):
            continue
        what = f"tensor {name[:_NAMED]!r}"
        if array.stype != NUMPY:
            return f"{what} is in a serialisation of its own, {array.stype[:_NAMED]!r}: use NumPy's"
        return (
            f"{what} has dtype {array.dtype[:_NAMED] or '(none stated)'}, which the codec does not "
            "take: make numbers of it, or put it in a record of its own"
        )
    return ""


class Notices:
    """Says what did not travel as the policy has it, and what failed: once each, and summed up."""

    def __init__(self) -> None:
        self._said: set[tuple[object, ...]] = set()
        self._kinds: Counter[str] = Counter()
        self._failures: Counter[int] = Counter()
        self._records, self._replies = 0, 0
        self._late, self._applied = 0, 0
        self._lock = threading.Lock()

    def counted(self, *, records: int = 0, replies: int = 0) -> None:
        """So many array records went, or replies came, for whatever else is said of them."""
        with self._lock:
            self._records += records
            self._replies += replies

    def apart(self, node: int, direction: str, kind: str, key: str, cause: str) -> None:
        """An array record that did not travel as the policy has it.

        Args:
            node: from or to which it went.
            direction: "down" or "up".
            kind: what became of it, as the ledger calls it.
            key: of the record.
            cause: the tensor, what is the matter with it, and the remedy.
        """
        with self._lock:
            self._kinds[f"{kind} {direction}"] += 1
        text = f"Node {node}: array record {key[:_NAMED]!r} went {direction} {kind}: {cause}"
        self._say((direction, kind, key, cause), text)

    def failed(self, node: int, reason: str, remedy: str = "") -> None:
        """A reply that was an error or was refused."""
        with self._lock:
            self._failures[node] += 1
        told = f"Node {node}: {reason}" + (f" ({remedy})" if remedy else "")
        self._say(("failed", node, reason), told)

    def unkept(self, node: int, trouble: str) -> None:
        """A node that could not keep what it should, and could before."""
        text = "Node %s cannot keep what makes its next messages small, until that is mended: %s"
        log(WARNING, text, node, trouble)

    def left_out(self, node: int, why: str) -> None:
        """A node that is asked no more."""
        self._say(("left out", node), f"Node {node} is left out from now on: {why}")

    def unsaved(self, key: str, cause: str) -> None:
        """A record that a checkpoint holds without the arrays that it cannot."""
        self._say(("unsaved", key), f"Checkpoints of array record {key!r} are incomplete: {cause}")

    def unasked(self, node: int) -> None:
        """A reply that was delivered before, or to a message that was given up."""
        text = f"Node {node}: a reply that nobody waits for was dropped; it came twice or too late"
        self._say(("unasked", node), text)

    def late(self, node: int, weight: float) -> None:
        """A reply that came when its round had ended, and what its update counts; 0 for nothing."""
        with self._lock:
            self._late += 1
            self._applied += bool(weight)
        text = f"Node {node}: a reply came after its round had ended, and "
        text += f"counts {weight:.2g} as much" if weight else "was discarded"
        self._say(("late", node, bool(weight)), text)

    def sum_up(self) -> None:
        """One line for the end of a run, if there is anything to say; begins anew."""
        with self._lock:
            kinds, failures = self._kinds, self._failures
            records, replies = self._records, self._replies
            late, applied, self._late, self._applied = self._late, self._applied, 0, 0
            self._kinds, self._failures = Counter(), Counter()
            self._records = self._replies = 0
        parts = []
        if kinds:
            named = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(_LISTED))
            apart = kinds.total()
            parts.append(f"{apart} of {records} array records did not travel as updates ({named})")
        if failures:
            nodes = ", ".join(str(node) for node, _ in failures.most_common(_LISTED))
            more = ", ..." if len(failures) > _LISTED else ""
            of = "node" if len(failures) == 1 else "nodes"
            parts.append(f"{failures.total()} of {replies} replies failed, of {of} {nodes}{more}")
        if late:
            parts.append(f"{late} replies came late, and {applied} of them were applied")
        if parts:
            log(WARNING, "Prunecast: %s; the reasons are above", "; ".join(parts))

    def _say(self, key: tuple[object, ...], text: str) -> None:
        with self._lock:
            if key in self._said or len(self._said) >= _KEPT:
                return
            self._said.add(key)
        log(WARNING, "%s", text)
