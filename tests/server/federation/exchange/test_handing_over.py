"""Once a message is pushed it belongs to the engine: nothing may change in it any more."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from prunecast.compression.flower.internals import set_message_id
from prunecast.server.federation import CompressedGrid
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import initial_arrays, make_app, to_record


class Keeping(InProcessGrid):
    """Keeps messages in memory, as Flower's simulation does, and notes their attributes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.handed = []

    def push_messages(self, messages):
        ids = []
        for message in messages:
            ids.append(f"message-{len(self.handed)}")
            set_message_id(message, ids[-1])
            parts = [message, message.content, *message.content.values()]
            parts += [a for r in message.content.array_records.values() for a in r.values()]
            self.handed.append((parts, [sorted(vars(part)) for part in parts]))
        return ids


@pytest.mark.parametrize("policy", ["dense", "small"])
def test_nothing_is_added_to_a_message_after_it_was_pushed(tmp_path, policy):
    inner = Keeping(make_app(tmp_path / "store"), 3)
    grid = CompressedGrid(inner, policy)
    content = RecordDict({"arrays": to_record(initial_arrays()), "config": ConfigRecord({"a": 1})})
    messages = [Message(content, node, "train") for node in (1, 2, 3)]
    list(grid.push_messages(messages))
    assert len(inner.handed) == 3
    for parts, before in inner.handed:
        assert [sorted(vars(part)) for part in parts] == before
