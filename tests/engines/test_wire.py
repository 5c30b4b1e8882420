"""What a message costs between SuperNodes and SuperLink: ledger, Flower's counter, and the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.loopback.engine import Engine, relayed
from benchmarks.loopback.relay import Exchange, Relay
from benchmarks.wire import Quiet, listen, measure
from prunecast.server.federation import Entry, Ledger

pytestmark = pytest.mark.engine

ROUNDS, NODES = 2, 2
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Relay]]:
    """A SuperLink without TLS, and two SuperNodes that reach it by a relay."""
    with relayed(tmp_path_factory.mktemp("wire"), NODES, PYTHONPATH=str(ROOT)) as started:
        yield started


@dataclass(frozen=True)
class Sent:
    """A message as it travelled.

    Attributes:
        direction: "down" or "up".
        type: Flower's message type.
        content: object id of its content.
        payload: bytes of its payloads, or of arrays in the open.
        objects: bytes of every object that it consists of.
    """

    direction: str
    type: str
    content: str
    payload: int
    objects: list[int]

    @property
    def envelope(self) -> int:
        """Bytes around the payload."""
        return sum(self.objects) - self.payload


@dataclass(frozen=True)
class Observed:
    """A run from three sides: its messages, Flower's counter, and the relay."""

    messages: list[Sent]
    entries: list[Entry]
    counted: dict[str, int]
    exchanges: list[Exchange]

    def requests(self, *names: str) -> list[Exchange]:
        """Exchanges of methods of the Fleet API."""
        return [e for e in self.exchanges if e.target.rpartition("/")[2] in names]

    def ledger(self, *directions: str) -> int:
        """Bytes of the ledger."""
        return sum(e.payload_bytes for e in self.entries if e.direction in directions)


def observe(link: tuple[Engine, Relay], app: Path, output: Path, config: str) -> Observed:
    """Run the app."""
    engine, relay = link
    before = len(relay.exchanges)
    run = engine.run(app, "--run-config", f'output="{output}" {config}')
    return Observed(
        [Sent(**m) for m in json.loads((output / "messages.json").read_text())],
        list(Ledger.read(output / "ledger.jsonl")),
        run.details["network-traffic"],
        relay.exchanges[before:],
    )


def test_small_messages_from_ledger_to_wire(
    link: tuple[Engine, Relay], tiny_app: Path, tmp_path: Path
) -> None:
    run = observe(link, tiny_app, tmp_path, f"rows=16 num-server-rounds={ROUNDS}")
    pairs = len(run.messages) // 2
    assert pairs == 2 * ROUNDS * NODES

    # the ledger has exactly the bytes of the messages' objects; Flower counts them, and its lists
    # of messages and of their objects
    assert run.ledger("down", "up") == sum(sum(m.objects) for m in run.messages)
    lists = run.counted["total-bytes"] - run.ledger("down", "up")
    assert 1000 < lists / pairs < 1150
    assert run.counted["outbound-bytes"] > run.ledger("down")
    assert run.counted["inbound-bytes"] > run.ledger("up")

    # three objects, a request each, and little around the payload
    training = [m for m in run.messages if m.type == "train"]
    assert len(training) == 2 * ROUNDS * NODES
    assert {len(m.objects) for m in run.messages} == {3}
    assert max(m.envelope for m in training) <= 420
    assert any(m.payload for m in training if m.direction == "down")
    assert all(m.payload for m in training if m.direction == "up")
    assert len(run.requests("pull-object")) == 3 * pairs
    assert 3 * pairs - NODES <= len(run.requests("push-object")) <= 3 * pairs  # equal ones once

    # what both nodes are told is one content, which the server uploads once
    contents = [m.content for m in run.messages if m.direction == "down"]
    assert contents[::NODES] == contents[1::NODES]

    # on the wire each request has some 1,070 bytes of HTTP; a pair of messages has nine of them
    received = [e for e in run.requests("pull-messages") if e.down > 200]
    others = ("pull-object", "confirm-message-received", "push-messages", "push-object")
    wire = sum(e.up + e.down for e in [*received, *run.requests(*others)])
    assert len(received) == pairs
    assert run.counted["total-bytes"] < wire
    assert 8000 < (wire - run.ledger("down", "up")) / pairs < 12000


def test_large_payloads_apart_and_messages_without_arrays_as_in_plain_flower(
    link: tuple[Engine, Relay], tiny_app: Path, tmp_path: Path
) -> None:
    run = observe(link, tiny_app, tmp_path, "rows=512 num-server-rounds=1 ask=true")
    training = [m for m in run.messages if m.type == "train"]
    assert min(m.payload for m in training) > 1 << 15
    assert {len(m.objects) for m in training} == {7}
    assert max(m.envelope for m in training) < 1150

    for kind in ("train.note", "evaluate.note", "query"):
        for direction in ("down", "up"):
            noted = [m for m in run.messages if (m.type, m.direction) == (kind, direction)]
            plain, ours = noted[:NODES], noted[NODES:]
            assert len(plain) == len(ours) == NODES
            assert {m.content for m in ours} == {m.content for m in plain}
            assert sorted(m.objects for m in ours) == sorted(m.objects for m in plain)
    told = [e for e in run.entries if e.message_type not in ("train", "evaluate")]
    assert len(told) == 6 * NODES
    assert all(e.payload_bytes == e.dense_bytes for e in told)


@pytest.fixture(scope="module", params=["HTTP", "TLS"])
def sized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Relay, Quiet, bool]]:
    """The same without TLS and with it, and what passes the relay when there is nothing to do."""
    if request.param == "HTTP":
        engine, relay = request.getfixturevalue("link")
        yield engine, relay, listen(relay), False
        return
    folder = tmp_path_factory.mktemp("sized")
    with relayed(folder, NODES, tls=True, PYTHONPATH=str(ROOT)) as (engine, relay):
        yield engine, relay, listen(relay), True


@pytest.mark.parametrize("size", [2_000, 6_000_000])
def test_the_ledger_estimates_the_wire_within_five_per_cent(
    sized: tuple[Engine, Relay, Quiet, bool], size: int
) -> None:
    engine, relay, quiet, tls = sized
    row = measure(engine, relay, quiet, size, tls=tls, rounds=2)
    assert row.messages == 2 * 2 * NODES
    assert min(row.ledger) > size * 2 * NODES * 0.9
    # what is equal, such as the metrics of two nodes, is uploaded once; a busy machine's nodes may
    # have to ask again
    assert row.requests - 2 * NODES <= row.relay_requests <= row.requests + NODES
    assert bool(row.handshakes) == tls
    # a sign of life may have opened a connection that an exchange then used, or not
    handshakes = (597, 1216) if tls else (0, 0)
    for found, passed, handshake in zip(row.estimate, row.relay, handshakes, strict=True):
        assert abs(found - passed) <= 0.05 * passed + handshake
