"""What must not work, and what it says."""

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from prunecast.client.training import compression_mod
from prunecast.compression.flower import CONTROL_RECORD, payload_of, payload_record
from prunecast.compression.flower.internals import make_message
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.versions import Instruction, NodeReport
from prunecast.server.federation import FederationError, NonFiniteModel, Policy, PolicyError
from support.federation import (
    initial_arrays,
    local_step,
    make_app,
    reason_of,
    to_arrays,
    to_record,
)


def send(grid, node=1, arrays=None, key="arrays", timeout=None):
    content = RecordDict({key: to_record(arrays or initial_arrays())})
    message = Message(content, dst_node_id=node, message_type="train")
    (reply,) = grid.send_and_receive([message], timeout=timeout)
    return reply


def refused(reply, *words):
    reason = reason_of(reply)
    assert reason
    for word in words:
        assert word in reason
    return True


def test_a_client_without_the_mod_that_reads_its_arrays(federation):
    grid, _, _ = federation("small", app=make_app(None))
    assert refused(send(grid), "compression_mod()")


def test_a_client_without_the_mod_that_ignores_its_arrays(federation):
    app = ClientApp()

    @app.train()
    def train(message, context):
        return Message(RecordDict({"arrays": to_record(initial_arrays(1))}), reply_to=message)

    grid, _, _ = federation("small", app=app)
    assert refused(send(grid), "compression_mod()", "node 1")


@pytest.mark.usefixtures("unpacked")
def test_a_payload_of_another_run(federation, tmp_path):
    stolen = []
    other, other_inner, _ = federation("small", run_id=2)
    other_inner.on_reply = lambda reply: stolen.append(reply.content["arrays"]) or reply
    assert not send(other).has_error()
    grid, inner, _ = federation("small", run_id=1)

    def swap(reply):
        reply.content["arrays"] = stolen[0]
        return reply

    inner.on_reply = swap
    assert refused(send(grid), "another run", "node 1")


def test_a_message_of_another_run_is_refused_by_the_node(federation, tmp_path):
    app = make_app(tmp_path / "store")
    grid, inner, _ = federation("small", app=app)
    captured = []
    push = inner.push_messages

    def capture(messages):
        captured.extend(messages)
        return push(captured)

    inner.push_messages = capture
    assert not send(grid).has_error()
    foreign = make_message(captured[0].metadata, captured[0].content)
    foreign.metadata.__dict__["_run_id"] = 99
    _, other, _ = federation("small", app=app, run_id=99)
    (reply,) = other.send_and_receive([foreign])
    assert refused(reply, "another run", "nothing changed")


@pytest.mark.parametrize("cut", [1, 20, 60, 200])
@pytest.mark.usefixtures("unpacked")
def test_a_truncated_update(federation, cut):
    grid, inner, _ = federation("small")

    def truncate(reply):
        payload = payload_of(reply.content["arrays"])
        reply.content["arrays"] = payload_record(payload[:-cut])
        return reply

    inner.on_reply = truncate
    assert refused(send(grid), "refused", "node 1")


@pytest.mark.usefixtures("unpacked")
def test_a_refused_reply_does_not_stop_the_others(federation):
    grid, inner, _ = federation("small")

    def damage(reply):
        if reply.metadata.src_node_id == 2 and "arrays" in reply.content:
            payload = bytearray(payload_of(reply.content["arrays"]))
            payload[len(payload) // 2] ^= 1
            reply.content["arrays"] = payload_record(bytes(payload))
        return reply

    inner.on_reply = damage
    result = FedAvg().start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=2)
    assert result.arrays is not None
    assert [e.node for e in grid.ledger.entries if e.kind == "error"] == [2, 2]


@pytest.mark.usefixtures("unpacked")
def test_a_truncated_message_to_the_node(federation):
    grid, inner, _ = federation("small")
    push = inner.push_messages

    def truncate(messages):
        messages = list(messages)
        for message in messages:
            payload = payload_of(message.content["arrays"])
            message.content["arrays"] = payload_record(payload[: len(payload) // 2])
        return push(messages)

    inner.push_messages = truncate
    assert refused(send(grid), "message from the server was refused")


@pytest.mark.usefixtures("unpacked")
def test_a_node_says_what_it_holds_beside_a_refusal(federation):
    """The server knew nothing of it, and builds on it from then on."""
    grid, inner, _ = federation("balanced", nodes=1)
    assert not send(grid).has_error()
    node, push = grid._streams.node(1), inner.push_messages
    held = dict(node.held)
    node.held.clear()

    def damage(messages):
        (message,) = messages
        payload = payload_of(message.content["arrays"])
        message.content["arrays"] = payload_record(payload[: len(payload) // 2])
        return push([message])

    inner.push_messages = damage
    assert refused(send(grid, arrays=initial_arrays(1)), "was refused")
    assert node.held == held
    inner.push_messages = push
    assert not send(grid, arrays=initial_arrays(1)).has_error()
    down = [e.kind for e in grid.ledger.entries if e.direction == "down"]
    assert down == ["keyframe", "keyframe", "delta"]


BOMB = ChannelPlan({"w": (np.arange(30_000) < 7,)}, share=0.5).coded


@pytest.mark.parametrize(
    ("plans", "said"),
    [
        ({"arrays": b"damaged"}, "the plan of channels is damaged: what was deflated is damaged"),
        ({"arrays": BOMB}, "masks of 30000 places are of no model of at most 20000 bytes"),
        ({"elsewhere": BOMB, "control": b"", "z": b"damaged"}, None),  # records that did not come
    ],
)
@pytest.mark.usefixtures("unpacked")
def test_plans_of_channels_that_a_message_brings(federation, tmp_path, plans, said):
    grid, inner, _ = federation("small", app=make_app(tmp_path / "store", most=20_000))
    push = inner.push_messages

    def bring(messages):
        messages = list(messages)
        for message in messages:
            control = message.content[CONTROL_RECORD]
            told = replace(Instruction.from_bytes(control["instruction"]), channels=plans)
            control["instruction"] = told.to_bytes()
        return push(messages)

    inner.push_messages = bring
    reply = send(grid)
    assert refused(reply, "from the server was refused", said) if said else not reply.has_error()


@pytest.mark.usefixtures("unpacked")
def test_plans_of_channels_of_too_many_records(federation):
    grid, inner, _ = federation("small")
    push, names = inner.push_messages, [f"more-{n}" for n in range(65)]

    def bring(messages):
        messages = list(messages)
        for message in messages:
            control = message.content[CONTROL_RECORD]
            plans = dict.fromkeys(names, BOMB)
            told = replace(Instruction.from_bytes(control["instruction"]), channels=plans)
            control["instruction"] = told.to_bytes()
            for name in names:
                message.content[name] = ConfigRecord()
        return push(messages)

    inner.push_messages = bring
    assert refused(send(grid), "plans of channels for 65 records, above 64")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("policy", ["balanced", "small"])
def test_nan_or_infinity_in_an_update(federation, tmp_path, policy, value):
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def train(message, context):
        arrays = to_arrays(message.content["arrays"])
        arrays["fc.weight"][3, 3] = value
        return Message(RecordDict({"arrays": to_record(arrays)}), reply_to=message)

    grid, _, _ = federation(policy, app=app)
    assert refused(send(grid), "'fc.weight'", "NaN or infinity", "learning rate")


def test_nan_in_the_global_model(federation):
    grid, _, _ = federation("small")
    arrays = initial_arrays()
    arrays["fc.bias"][0] = np.nan
    with pytest.raises(NonFiniteModel, match=r"fc\.bias"):
        send(grid, arrays=arrays)
    assert grid.ledger.entries == []
    # what was refused is no version: numbering and pruning schedule stand where they stood
    assert grid.published(to_record(initial_arrays())).counter == 1


def test_a_node_whose_store_cannot_be_written_costs_bytes_alone(federation, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    grid, _, _ = federation("small", app=make_app(blocked))
    for seed in (0, 1):
        assert not send(grid, arrays=initial_arrays(seed)).has_error()
    assert [e.kind for e in grid.ledger.entries] == ["keyframe", "update", "keyframe", "update"]
    said = [r.getMessage() for r in caplog.records if "Node 1 cannot keep" in r.getMessage()]
    assert len(said) == 1
    assert "PRUNECAST_STORE" in said[0]


def test_a_node_that_never_keeps_what_it_gets_is_refused_after_one_keyframe(federation, tmp_path):
    grid, inner, _ = federation("balanced")
    assert not send(grid).has_error()

    def always_missing(reply):
        report = NodeReport({}, ("arrays",)).to_bytes()
        return make_message(
            reply.metadata, RecordDict({"prunecast": ConfigRecord({"report": report})})
        )

    inner.on_reply = always_missing
    assert refused(send(grid, arrays=initial_arrays(4)), "store directory", "'arrays'")
    assert [e.kind for e in grid.ledger.entries][-4:] == [
        "delta", "base-missing", "keyframe", "error",
    ]  # fmt: skip


def test_a_node_that_misses_every_keyframe_is_refused_where_ids_are_of_the_content(federation):
    grid, inner, _ = federation("balanced")
    inner._numbers = itertools.repeat(1)  # as of messages that are equal

    def always_missing(reply):
        report = NodeReport({}, ("arrays",)).to_bytes()
        return make_message(
            reply.metadata, RecordDict({"prunecast": ConfigRecord({"report": report})})
        )

    inner.on_reply = always_missing
    assert refused(send(grid, timeout=5), "store directory", "'arrays'")


def test_a_node_cannot_name_versions_that_it_was_not_sent(federation):
    grid, inner, _ = federation("balanced")

    def boast(reply):
        held = {f"record {number}": bytes(16) for number in range(100)}
        reply.content["prunecast"] = ConfigRecord({"report": NodeReport(held).to_bytes()})
        return reply

    inner.on_reply = boast
    assert not send(grid).has_error()
    assert grid._streams.node(1).held == {}


@pytest.mark.parametrize(
    "report",
    [b"", b"{}", b"\x01", b"\x02" + bytes(7), b"\x01" + bytes(4) + b"\xff" * 9, b"\x01" * 5000],
)
def test_a_control_record_that_is_nonsense(federation, report):
    grid, inner, _ = federation("small")

    def forge(reply):
        reply.content["prunecast"] = ConfigRecord({"report": report})
        return reply

    inner.on_reply = forge
    assert refused(send(grid), "control record")


def test_an_update_that_makes_infinity_is_refused(federation, tmp_path):
    from prunecast.client.training.store import NodeStore
    from prunecast.compression.versions import QuantisedTensor, encode_update

    grid, inner, _ = federation("balanced")

    def explode(reply):
        base = NodeStore(tmp_path / "store", 11, 1).held("arrays")
        change = QuantisedTensor(np.full(base["fc.bias"].shape, 2**30, np.int32), 3e38)
        payload = encode_update(base, {"fc.bias": change}, stream=b"11/arrays")
        reply.content["arrays"] = payload_record(payload)
        return reply

    inner.on_reply = explode
    with np.errstate(over="ignore"):
        assert refused(send(grid), "NaN or infinity")


def test_an_error_reply_for_a_dead_node_passes_and_is_in_the_ledger(federation):
    grid, inner, _ = federation("small")
    assert not send(grid, node=2).has_error()
    inner.online.discard(2)
    reply = send(grid, node=2)
    assert refused(reply, "not online")
    assert grid.ledger.entries[-1].kind == "error"
    assert grid.ledger.entries[-1].node == 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"prunecast.preset": "huge"}, "prunecast.preset = .huge. .*lossless, fine, balanced, sm"),
        ({"prunecast.sparsty": 0.5}, "'prunecast.sparsty': .*prunecast.sparsity"),
        ({"prunecast.sparsity": "much"}, "prunecast.sparsity .*= 'much': give a number"),
        ({"prunecast.sparsity": 1.5}, "prunecast.sparsity .*= 1.5: .*below 1"),
        ({"prunecast.up-step": -1.0}, "prunecast.up-step .*= -1.0: .*0 or above"),
        ({"prunecast.down-step": True}, "prunecast.down-step .*= True: give a number"),
        ({"prunecast.dead-zone": 0.2}, "prunecast.dead-zone .*= 0.2: .*0.5 to 1"),
        ({"prunecast.error-feedback": 1}, "prunecast.error-feedback .*= 1: give true or false"),
        ({"prunecast.lossless": 3}, "prunecast.lossless = 3: .*comma-separated"),
        (
            {"prunecast.preset": "lossless", "prunecast.sparsity": 0.5},
            "prunecast.sparsity .*lattice: set prunecast.down-step above 0",
        ),
        ({"prunecast.pruning-scope": "universe"}, "prunecast.pruning-scope .*'layer' or 'global'"),
        ({"prunecast.pruning-criterion": "luck"}, "-criterion .*'magnitude' or .* or 'fisher'"),
        ({"prunecast.pruning-schedule": 3}, "prunecast.pruning-schedule .*= 3: give a string"),
        ({"prunecast.pruning-end": 2}, "prunecast.pruning-end .*after prunecast.pruning-begin = 2"),
        ({"prunecast.pruning-begin": -1}, "prunecast.pruning-begin .*= -1: give 0 or more"),
        ({"prunecast.statistics-bits": 24}, "-bits .*= 24: give 0 to 23 bits of mantissa"),
        ({"prunecast.statistics-bits": -1}, "-bits .*= -1: give 0 to 23"),
        ({"prunecast.statistics-bits": 6.5}, "-bits .*= 6.5: give a whole number"),
        ({"prunecast.history": 0}, "prunecast.history .*= 0: give 1 or more"),
        ({"prunecast.history": 1.5}, "prunecast.history .*= 1.5: give a whole number"),
        (
            {"prunecast.down": "sparse"},
            "prunecast.down .*= 'sparse': choose one of 'lattice', 'dense', 'topk'",
        ),
        (
            {"prunecast.up": "zip"},
            "prunecast.up .*= 'zip': choose one of 'lattice', 'dense', 'topk'",
        ),
        ({"prunecast.down": "dense"}, "prunecast.up .*= 'lattice': it needs prunecast.down"),
        (
            {"prunecast.preset": "dense", "prunecast.sparsity": 0.5},
            "prunecast.sparsity .*= 0.5: pruning needs prunecast.down = 'lattice'",
        ),
        ({"prunecast.up-options": "density=1"}, "prunecast.up-options .*belong to a scheme"),
        (
            {"prunecast.up": "stc", "prunecast.up-options": "density=9"},
            "prunecast.up-options: option 'density' of scheme 'stc' is 9.0",
        ),
        ({"prunecast.up": "stc", "prunecast.up-options": "dense"}, "not of the form name=value"),
        ({"prunecast.pruning-pattern": "4:2"}, "prunecast.pruning-pattern .*= '4:2': .*N < M"),
        (
            {"prunecast.pruning-pattern": "2:4", "prunecast.sparsity": 0.9},
            "prunecast.sparsity .*= 0.9: prunecast.pruning-pattern = '2:4' comes to 0.5",
        ),
        (
            {"prunecast.pruning-pattern": "2:4", "prunecast.pruning-scope": "global"},
            "prunecast.pruning-pattern .*set prunecast.pruning-scope = 'layer'",
        ),
        (
            {"prunecast.preset": "dense", "prunecast.pruning-pattern": "2:4"},
            "prunecast.pruning-pattern .*: pruning needs prunecast.down = 'lattice'",
        ),
        (
            {"prunecast.preset": "lossless", "prunecast.pruning-pattern": "2:4"},
            "prunecast.sparsity = 0 and prunecast.pruning-pattern = ''",
        ),
        ({"prunecast.sparsity": 1.0}, "prunecast.sparsity .*0 or above and below 1"),
        ({"prunecast.pruning-seed": -1}, "prunecast.pruning-seed .*give 0 or more"),
    ],
)
def test_policies_that_cannot_be_name_their_key_and_the_remedy(config, words):
    with pytest.raises(PolicyError, match=words):
        Policy.from_run_config(config)


def test_knobs_of_a_scenario_are_checked_too():
    with pytest.raises(PolicyError, match=r"\(policy down_step\) = '0.1': give a number"):
        Policy.preset("small", down_step="0.1")
    with pytest.raises(PolicyError, match=r"\(policy lossless\) = '\*bias': give a list"):
        Policy.preset("small", lossless="*bias")


def test_every_knob_can_be_set_from_the_run_config():
    policy = Policy.from_run_config(
        {
            "prunecast.preset": "small",
            "prunecast.sparsity": 0.5,
            "prunecast.pruning-end": 40,
            "prunecast.lossless": "*bias, head.*",
            "prunecast.error-feedback": False,
            "prunecast.statistics-bits": 8,
            "prunecast.up-step": 2,
            "learning-rate": 0.1,
        }
    )
    assert policy == Policy.preset(
        "small",
        sparsity=0.5,
        pruning_end=40,
        lossless=("*bias", "head.*"),
        error_feedback=False,
        statistics_bits=8,
        up_step=2.0,
    )


def test_a_scheme_and_its_options_can_be_set_from_the_run_config():
    config = {
        "prunecast.up": "topk",
        "prunecast.up-options": "density=0.1, momentum=0,scope=payload",
    }
    assert Policy.from_run_config(config) == Policy.preset(
        "balanced", up="topk", up_options={"density": 0.1, "momentum": 0, "scope": "payload"}
    )
    config = {"prunecast.preset": "dense", "prunecast.up": "stc"}
    config["prunecast.up-options"] = "error_feedback=false"
    scheme = Policy.from_run_config(config).scheme
    assert scheme is not None
    assert scheme.config()["error_feedback"] is False


def test_nothing_is_published_where_models_travel_densely(federation):
    grid, _, _ = federation("dense", app=make_app(None))
    with pytest.raises(FederationError, match="travel densely"):
        grid.published(to_record(initial_arrays()))
    arrays = to_record(initial_arrays())
    assert grid.evaluate_published(lambda _, received: received)(1, arrays) is arrays


def test_quantisation_error_is_fed_back(federation, tmp_path):
    """A small constant push below the step arrives in the end, and only with feedback."""

    def final(error_feedback):
        store = tmp_path / str(error_feedback)
        app = ClientApp(mods=[compression_mod(store)])

        @app.train()
        def train(message, context):
            arrays = to_arrays(message.content["arrays"])
            weight = arrays["w"].copy()
            weight[0] += 1.0
            weight[1:] += 0.05
            return Message(
                RecordDict(
                    {
                        "arrays": to_record({"w": weight}),
                        "metrics": MetricRecord({"num-examples": 1}),
                    }
                ),
                reply_to=message,
            )

        policy = Policy.preset("small", sparsity=0.0, error_feedback=error_feedback)
        grid, _, _ = federation(policy, nodes=2, app=app)
        start = to_record({"w": np.linspace(-1, 1, 400, dtype=np.float32)})
        result = FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=start, num_rounds=30)
        return float(np.mean(to_arrays(result.arrays)["w"][1:] - to_arrays(start)["w"][1:]))

    assert final(True) == pytest.approx(30 * 0.05, rel=0.25)
    assert abs(final(False)) < 0.1


def test_ledger_file_has_a_line_per_message(federation, tmp_path):
    import json

    grid, _, _ = federation("small", ledger=tmp_path / "ledger.jsonl")
    FedAvg().start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=2)
    grid.ledger.close()
    written = (tmp_path / "ledger.jsonl").read_text().splitlines()
    header, *lines = [json.loads(line) for line in written]
    assert {"schema", "run", "name", "seed", "started"} == set(header)
    assert len(lines) == 2 * 2 * 2 * 3
    assert {line["direction"] for line in lines} == {"up", "down"}
    required = {
        "round", "node", "direction", "kind", "message_type",
        "payload_bytes", "dense_bytes", "objects", "encode_ms", "decode_ms",
    }  # fmt: skip
    assert all(required == set(line) for line in lines)
    updates = [line for line in lines if line["kind"] == "update"]
    assert all(line["decode_ms"] > 0 and line["encode_ms"] > 0 for line in updates)
    # plain Flower's bytes for the same messages, to within a few bytes of envelope
    dense = [line["dense_bytes"] for line in lines if line["message_type"] == "train"]
    assert max(dense) - min(dense) < 400
    assert os.stat(tmp_path / "ledger.jsonl").st_size > 0


def test_local_step_is_a_function_of_its_seed():
    first, second = (local_step(initial_arrays(), 3) for _ in range(2))
    assert all(np.array_equal(first[k], second[k]) for k in first)
