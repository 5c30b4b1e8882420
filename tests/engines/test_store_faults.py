"""Faults of one node's store, and of its package, on the real engine: what each costs, and whom."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.loopback.engine import Engine, relayed
from prunecast.server.federation import Entry, Ledger

pytestmark = pytest.mark.engine

ROUNDS, NODES = 2, 2
SECONDS = 900  # for a run, on a machine that others use
DISK = "8m"


@dataclass(frozen=True)
class Outcome:
    """A run: its ledger, its log, what it ended with."""

    entries: list[Entry]
    log: str
    final: dict[str, NDArray[np.float32]]

    def kinds(self, node: int, direction: str) -> list[str]:
        """What the messages of a node to train were, in their order."""
        return [
            e.kind
            for e in self.entries
            if (e.node, e.direction, e.message_type) == (node, direction, "train")
        ]

    def bytes(self, node: int) -> int:
        """Of all messages of a node, both ways."""
        return sum(e.payload_bytes for e in self.entries if e.node == node)

    @property
    def keyframe(self) -> int:
        """Bytes of the largest message that brings a whole version."""
        return max(e.payload_bytes for e in self.entries if e.kind == "keyframe")


@dataclass
class Link:
    """A SuperLink and its SuperNodes, of which the first keeps its files on a small disk."""

    engine: Engine
    has_disk: bool


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    folder = tmp_path_factory.mktemp("faults")
    store = folder / "s0"
    store.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(store)]
    try:
        mounted = subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        mounted = False
    try:
        with relayed(folder, NODES) as (engine, _):
            yield Link(engine, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(store)], check=True, timeout=30)


@pytest.fixture(scope="module")
def outcome(
    link: Link, tiny_app: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Outcome]:
    """Run the app with faults at the end of round 1, of one node or of each."""

    def run(fault: str, more: str = "", rounds: int = ROUNDS) -> Outcome:
        output = tmp_path_factory.mktemp(fault or "none")
        config = f'output="{output}" num-server-rounds={rounds} fault="{fault}" {more}'
        finished = link.engine.run(tiny_app, "--run-config", config, seconds=SECONDS)
        with np.load(output / "final.npz") as file:
            final = dict(file)
        return Outcome(list(Ledger.read(output / "ledger.jsonl")), finished.log, final)

    return run


def nodes_of(found: Outcome) -> set[int]:
    return {entry.node for entry in found.entries}


def test_a_damaged_file_costs_its_node_one_keyframe(outcome: Callable[..., Outcome]) -> None:
    """One node's is cut, the other's changed in a bit: the same arrays come out, bit for bit."""
    undisturbed, found = outcome(""), outcome("truncated+corrupted")
    assert not [e for e in found.entries if e.kind == "error"]
    asked = [e.payload_bytes for e in found.entries if e.kind == "base-missing"]
    assert len(asked) == NODES
    assert max(asked) < 500
    for node in nodes_of(found):
        assert found.kinds(node, "up") == ["update", "base-missing", "update"]
        assert found.kinds(node, "down") == ["keyframe", "reuse", "keyframe"]
        cost = found.bytes(node) - undisturbed.bytes(node)
        assert 0.8 * found.keyframe < cost < 1.2 * found.keyframe + 1000
    for name, array in found.final.items():
        assert array.tobytes() == undisturbed.final[name].tobytes()


def test_a_lost_store_costs_its_node_one_keyframe_and_the_other_nothing(
    outcome: Callable[..., Outcome],
) -> None:
    found = outcome("lost")
    # the SuperLink answers so for the id of a message whose reply it delivered
    assert "Message Unavailable" not in found.log
    (node,) = {e.node for e in found.entries if e.kind == "base-missing"}
    (other,) = nodes_of(found) - {node}
    assert found.kinds(node, "up") == ["update", "base-missing", "update"]
    assert found.kinds(node, "down") == ["keyframe", "reuse", "keyframe"]
    assert found.kinds(other, "up") == ["update"] * ROUNDS
    assert found.kinds(other, "down") == ["keyframe", "reuse"]
    cost = found.bytes(node) - found.bytes(other)
    assert 0.8 * found.keyframe < cost < 1.2 * found.keyframe + 1000


def test_a_full_disk_costs_a_delta_in_place_of_reuse_and_no_update(
    link: Link, outcome: Callable[..., Outcome]
) -> None:
    if not link.has_disk:
        pytest.skip("no file system can be mounted here: run as root, outside of a container")
    found = outcome("full", rounds=3)
    assert "cannot keep what makes its next messages small" in found.log
    assert "No space left on device" in found.log
    counts = Counter(e.kind for e in found.entries)
    assert not counts["error"] + counts["base-missing"]
    assert counts["update"] == 3 * NODES
    assert counts["keyframe"] == NODES
    # the version that could not be kept is sent once more
    assert counts["delta"] == 3 * NODES + 1
    assert counts["reuse"] == 2 * NODES - 1
    spent = sorted(map(found.bytes, nodes_of(found)))
    assert 0 < spent[1] - spent[0] < found.keyframe


def test_a_node_of_another_version_costs_one_message_and_is_left_out(
    outcome: Callable[..., Outcome],
) -> None:
    found = outcome("foreign", "min-nodes=1")
    (node,) = {e.node for e in found.entries if e.kind == "error"}
    (other,) = nodes_of(found) - {node}
    assert found.kinds(node, "down") == ["keyframe"]
    assert found.kinds(node, "up") == ["error"]
    assert found.kinds(other, "up") == ["update"] * ROUNDS
    assert f"Node {node} is left out from now on" in found.log
    assert found.log.count("is left out from now on") == 1
    assert found.bytes(node) < found.keyframe + 1000
