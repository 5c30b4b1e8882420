"""Who comes seldom, and how its updates are quantised then."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from prunecast.compression.flower.envelope import unpack
from prunecast.compression.versions import Instruction, UpdateRule
from prunecast.server.federation import Policy
from prunecast.server.federation.publishing.participation import Changes, Participation, rule_for
from support.federation import initial_arrays, to_record

RULE = Policy().update_rule


def test_all_nodes_in_every_round():
    known = Participation()
    assert known.rate == 1
    for number in range(1, 4):
        known.begin({1, 2, 3}, 3, number)
        assert [known.gap(node) for node in (1, 2, 3)] == [1, 1, 1]


def test_a_sample_of_many():
    known = Participation()
    known.begin({1, 2}, 200, 1)
    assert known.gap(1) == 100
    for number in range(2, 101):
        known.begin({2 * number - 1, 2 * number}, 0, number)
    known.begin({1, 3}, 200, 101)
    assert known.gap(1) == (100 + 100) / 2
    assert known.gap(7) == 100  # nothing is known of it but that


def test_a_few_of_many_that_come_always():
    known = Participation()
    for number in range(1, 21):
        known.begin({1, 2}, 40, number)
    assert known.gap(1) == pytest.approx((20 + 19) / 20)
    assert rule_for(RULE, known.gap(1)) == RULE


def test_rounds_that_nobody_states_end_when_a_node_is_asked_again():
    known = Participation()
    for _ in range(5):
        for node in (1, 2, 3, 4):  # an asynchronous loop, one message at a time
            known.begin({node}, 4)
    assert known.rounds == 5
    assert known.gap(2) == 1


def test_more_is_sent_at_once_the_more_seldom_a_node_comes():
    often, seldom, rarely = (rule_for(RULE, gap) for gap in (2, 6, 100))
    assert often == RULE
    assert often.step > seldom.step > rarely.step
    assert often.floor > seldom.floor > rarely.floor == 0
    assert often.dead_zone > seldom.dead_zone > rarely.dead_zone == 0.5
    fine = UpdateRule(0.8, 0.5, floor=0.0)
    assert rule_for(fine, 100) == fine  # never coarser
    for left in (UpdateRule(0.0), UpdateRule(3.2, 0.7, error_feedback=False)):
        assert rule_for(left, 100) == left


def rules_of(policy, federation, nodes, asked):
    grid, inner, _ = federation(policy, nodes=nodes)
    found = {}
    push = inner.push_messages

    def watched(messages):
        for message in messages:
            data = unpack(message.content)["prunecast"]["instruction"]
            found[message.metadata.dst_node_id] = Instruction.from_bytes(data).rule
        return push(messages)

    inner.push_messages = watched
    content = RecordDict(
        {"arrays": to_record(initial_arrays()), "config": ConfigRecord({"server-round": 1})}
    )
    list(grid.send_and_receive([Message(content, node, "train") for node in asked]))
    return [found[node] for node in asked]


def test_messages_say_so(federation):
    assert rules_of(Policy(), federation, 40, [1, 2]) == [rule_for(RULE, 20)] * 2
    assert rules_of(Policy(), federation, 3, [1, 2, 3]) == [RULE] * 3
    kept = Policy(finer_when_rare=False)
    assert rules_of(kept, federation, 40, [1, 2]) == [RULE] * 2


def test_the_norm_of_the_models_change():
    changes = Changes()
    assert changes.norm == 0
    for value in (0.0, 1.0, 1.0, 3.0):
        changes.observe({"w": np.full(16, value, np.float32)})
    assert changes.norm == pytest.approx((4 + 0 + 8) / 3)
    changes.observe({"w": np.zeros(9, np.float32)})  # channels have gone
    assert changes.norm == pytest.approx(4)
    for _ in range(4):
        changes.observe({"w": np.zeros(9, np.float32)})
    assert changes.norm == 0
