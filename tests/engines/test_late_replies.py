"""A node that is two rounds late on the deployment engine: its updates count when they come."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.loopback.engine import relayed, wait_for
from prunecast.server.federation import Ledger, read_events

pytestmark = pytest.mark.engine

APP = Path(__file__).with_name("lasting")
NODES, ROUNDS, SLOW, LATE = 3, 4, 0, (2, 3)
SECONDS = 900  # on a machine that does much else


def test_updates_of_a_slow_node_are_applied_and_cost_no_exchange_about_its_base(
    tmp_path: Path,
) -> None:
    """It trains in round 2 for as long as the others take for two rounds, and then catches up."""
    output = tmp_path / "output"
    output.mkdir()
    config = (
        f'folder="{output}" signs="{output}" nodes={NODES} num-server-rounds={ROUNDS} '
        'round-replies=2 late="apply" timeout=800.0'
    )
    gate = [output / f"stop-{ROUNDS}-{node}" for node in range(NODES)]
    for sign in (output / f"stop-{LATE[0]}-{SLOW}", *gate):
        sign.touch()
    with relayed(tmp_path, NODES) as (engine, _), ThreadPoolExecutor(1) as pool:
        run = pool.submit(engine.run, APP, "--run-config", config, seconds=SECONDS)

        def reached(number: int, node: int) -> bool:
            if run.done():
                run.result()
            return (output / f"reached-{number}-{node}").exists()

        for node in range(NODES):
            if node != SLOW:
                told = f"node {node} to train the last round"
                wait_for(lambda n=node: reached(ROUNDS, n), SECONDS, told)
        assert not reached(ROUNDS, SLOW)
        (output / f"stop-{LATE[0]}-{SLOW}").unlink()
        # a node comes to its messages one after the other: the late ones are answered then
        wait_for(lambda: reached(ROUNDS, SLOW), SECONDS, "the slow node to catch up")
        for sign in gate:
            sign.unlink()
        run.result(SECONDS)

    events = list(read_events(output / "events.jsonl"))
    finished = [e["nodes"] for e in events if e["event"] == "round-finished" and e["round"]]
    assert [nodes["failures"] for nodes in finished] == [0] * ROUNDS
    # other nodes may be late by one round: two replies close each; and of the third round this one
    # may have come too late to be trained on, which the clock decides
    assert finished[-1]["late_applied"] >= 1

    entries = list(Ledger.read(output / "ledger.jsonl"))
    replies = [e for e in entries if (e.direction, e.message_type) == ("up", "train")]
    slow = [e.node for e in replies if e.round == LATE[0]][-1]
    sent = [e.kind for e in entries if (e.node, e.direction) == (slow, "down")]
    # each builds on the one before, whatever the node had said by then that it held
    assert sent[0] == "keyframe"
    assert set(sent[1:]) <= {"delta", "reuse"}
    assert not {e.kind for e in entries} & {"base-missing", "error"}
    answered = [(e.round, e.kind) for e in replies if e.node == slow]
    # which of them is looked at first depends on when a round closes
    assert {(1, "update"), (LATE[0], "update")} <= set(answered)
    assert {kind for number, kind in answered if number == LATE[1]} <= {"update", "stale"}
