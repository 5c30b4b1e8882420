"""The policy "dense": plain Flower, counted as everything else is."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from prunecast.compression.flower.internals import object_bytes
from prunecast.server.federation import CompressedGrid, Ledger
from prunecast.simulations.runner.inprocess import InProcessGrid

app = ClientApp()


@app.train()
def _train(message, context):
    if context.node_config["partition-id"] == 2:
        raise ValueError("no data")
    arrays = ArrayRecord({"w": Array(message.content["arrays"]["w"].numpy() + 1)})
    return Message(
        RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}),
        reply_to=message,
    )


def messages(grid, server_round):
    arrays = ArrayRecord({"w": Array(np.zeros(500, np.float32))})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": server_round})})
    return [Message(content, node, "train") for node in grid.get_node_ids()]


def test_every_message_is_counted_both_ways(tmp_path):
    path = tmp_path / "ledger.jsonl"
    grid = CompressedGrid(
        InProcessGrid(app, 3),
        "dense",
        ledger=Ledger(path, keep=100),
        alternatives={"half": lambda data: len(data) // 2},
    )
    sent = messages(grid, 4)
    replies = list(grid.send_and_receive(sent))
    assert len(replies) == 3
    entries = grid.ledger.entries
    assert [e.direction for e in entries] == ["down"] * 3 + ["up"] * 3
    assert [e.payload_bytes for e in entries[:3]] == [object_bytes(m) for m in sent]
    assert [e.payload_bytes for e in entries[3:]] == [object_bytes(m) for m in replies]
    assert {e.round for e in entries} == {4}
    assert [e.kind for e in entries] == ["dense"] * 5 + ["error"]
    for entry in entries:
        assert entry.alternatives == {"half": entry.payload_bytes // 2}
        assert entry.dense_bytes == entry.payload_bytes
    grid.ledger.close()
    assert list(Ledger.read(path)) == entries


def test_a_wrapped_grid_answers_as_before():
    inner = InProcessGrid(app, 2, run_id=9)
    grid = CompressedGrid(inner, "dense", ledger=Ledger())
    assert list(grid.get_node_ids()) == list(inner.get_node_ids())
    assert [n.node_id for n in grid.get_nodes()] == list(inner.get_node_ids())
    assert grid.run.run_id == 9
    ids = list(grid.push_messages(messages(grid, 1)))
    assert len(list(grid.pull_messages(ids[:1]))) == 1
    known, answered = sorted(grid.pull_messages(ids), key=lambda reply: reply.has_error())
    assert known.metadata.reply_to_message_id == ids[1]
    assert answered.metadata.reply_to_message_id == ids[0]
    assert "Message Unavailable" in answered.error.reason
    assert grid.ledger.totals().messages == 4
