"""Personalised layers, control variates and proximal terms over a grid that compresses."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedProx

from prunecast.client.training import compression_mod
from prunecast.server.federation import Policy
from support.federation import to_arrays, to_record

NODES, FEATURES, HIDDEN, CLASSES = 3, 20, 64, 4
RNG = np.random.default_rng(1)
TRUE = RNG.normal(size=(FEATURES, CLASSES)).astype(np.float32)
SHIFTS = [np.roll(np.arange(CLASSES), n) for n in range(NODES)]  # what nodes call the classes


def data(node, *, own=False):
    """Of one task; `own`: with names of the classes that are the node's."""
    rng = np.random.default_rng(node)
    inputs = rng.normal(size=(300, FEATURES)).astype(np.float32)
    inputs[:, node] += 1.5  # no two nodes have the same
    labels = (inputs @ TRUE).argmax(1)
    return inputs, SHIFTS[node - 1][labels] if own else labels


def start():
    return {
        "body.weight": RNG.normal(size=(FEATURES, HIDDEN)).astype(np.float32) * np.float32(0.3),
        "body.bias": np.zeros(HIDDEN, np.float32),
        "head.weight": np.zeros((HIDDEN, CLASSES), np.float32),
    }


BEGIN = start()


def gradient(arrays, inputs, labels):
    """Of cross entropy, for a layer of ReLU and one on top."""
    hidden = np.maximum(inputs @ arrays["body.weight"] + arrays["body.bias"], 0)
    logits = hidden @ arrays["head.weight"]
    wrong = np.exp(logits - logits.max(1, keepdims=True))
    wrong /= wrong.sum(1, keepdims=True)
    wrong[np.arange(len(labels)), labels] -= 1
    wrong /= len(labels)
    back = (wrong @ arrays["head.weight"].T) * (hidden > 0)
    return {
        "body.weight": inputs.T @ back,
        "body.bias": back.sum(0),
        "head.weight": hidden.T @ wrong,
    }


def accuracy(arrays, inputs, labels):
    hidden = np.maximum(inputs @ arrays["body.weight"] + arrays["body.bias"], 0)
    return float(((hidden @ arrays["head.weight"]).argmax(1) == labels).mean())


def trained(arrays, inputs, labels, *, steps=10, rate=0.5, correction=None, near=0.0):
    first = {name: array.copy() for name, array in arrays.items()}
    arrays = dict(arrays)
    for _ in range(steps):
        slope = gradient(arrays, inputs, labels)
        for name, array in arrays.items():
            step = slope[name] + near * (array - first[name])
            step = step + (0 if correction is None else correction[name])
            arrays[name] = (array - rate * step).astype(np.float32)
    return arrays


def mods(tmp_path, policy):
    return [] if policy == "dense" else [compression_mod(tmp_path / "store")]


# -- personalised layers --------------------------------------------------------------------------


def personal(tmp_path, policy):
    """The body is everybody's, the head stays in the node's state (Arivazhagan et al. 2019)."""
    app = ClientApp(mods=mods(tmp_path, policy))

    def whole(message, context):
        body = to_arrays(message.content["arrays"])
        head = context.state.get("head") or to_record({"head.weight": BEGIN["head.weight"]})
        return {**body, **to_arrays(head)}

    @app.train()
    def train(message, context):
        arrays = trained(whole(message, context), *data(context.node_id, own=True))
        context.state["head"] = to_record({"head.weight": arrays.pop("head.weight")})
        content = {"arrays": to_record(arrays), "m": MetricRecord({"num-examples": 300})}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        right = accuracy(whole(message, context), *data(context.node_id, own=True))
        metrics = MetricRecord({"num-examples": 300, "accuracy": right})
        return Message(RecordDict({"m": metrics}), reply_to=message)

    return app


@pytest.mark.parametrize("policy", ["dense", "balanced", "small"])
def test_of_personalised_layers_the_body_alone_travels(federation, tmp_path, policy):
    name = policy
    if policy == "small":
        policy = Policy.preset("small", pruning_begin=2, pruning_end=5, pruning_min_size=256)
    grid, inner, _ = federation(policy, nodes=NODES, app=personal(tmp_path, name))
    body = {n: a for n, a in BEGIN.items() if n.startswith("body")}
    result = FedAvg(min_available_nodes=NODES).start(
        grid=grid, initial_arrays=to_record(body), num_rounds=10
    )
    assert list(result.arrays) == list(body)
    assert result.evaluate_metrics_clientapp[10]["accuracy"] > 0.85
    heads = [to_arrays(c.state["head"])["head.weight"] for c in inner._contexts.values()]
    assert not np.allclose(heads[0], heads[1], atol=0.1)
    if name != "dense":
        kinds = {e.kind for e in grid.ledger.entries if e.direction == "down"}
        assert kinds <= {"keyframe", "delta", "reuse"}  # one model for all, so versions of it


def test_a_head_that_is_sent_to_one_node_alone_goes_exactly_and_is_said(federation, tmp_path):
    """Another record on every node: no version can be shared, and it need not be kept by hand."""
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def train(message, context):
        content = {key: message.content[key] for key in ("arrays", "head")}
        return Message(RecordDict(content), reply_to=message)

    grid, _, _ = federation("balanced", nodes=NODES, app=app)
    heads = {n: RNG.normal(size=(HIDDEN, CLASSES)).astype(np.float32) for n in range(1, NODES + 1)}
    messages = [
        Message(
            RecordDict({"arrays": to_record(BEGIN), "head": to_record({"w": heads[n]})}), n, "train"
        )
        for n in heads
    ]
    for reply in grid.send_and_receive(messages):
        node = reply.metadata.src_node_id
        assert reply.content["head"]["w"].numpy().tobytes() == heads[node].tobytes()
    kinds = {e.kind for e in grid.ledger.entries if e.direction == "down"}
    assert kinds == {"keyframe+plain"}


# -- control variates -----------------------------------------------------------------------------


def scaffold(tmp_path, policy, *, rate=0.3, steps=10):
    """Karimireddy et al. 2020, option II; the reply has the change of the variate."""
    app = ClientApp(mods=mods(tmp_path, policy))

    @app.train()
    def train(message, context):
        received = to_arrays(message.content["arrays"])
        server = to_arrays(message.content["control"])
        kept = context.state.get("control")
        own = to_arrays(kept) if kept else {n: np.zeros_like(a) for n, a in server.items()}
        arrays = trained(
            *(received, *data(context.node_id)),
            steps=steps,
            rate=rate,
            correction={name: server[name] - own[name] for name in server},
        )
        new = {
            name: own[name] - server[name] + (received[name] - arrays[name]) / (steps * rate)
            for name in server
        }
        context.state["control"] = to_record(new)
        change = {name: new[name] - own[name] for name in new}
        content = {"arrays": to_record(arrays), "control": to_record(change)}
        return Message(RecordDict(content), reply_to=message)

    return app


def rounds_of_scaffold(grid, rounds):
    arrays, control = dict(BEGIN), {n: np.zeros_like(a) for n, a in BEGIN.items()}
    largest = 0.0
    for number in range(1, rounds + 1):
        records = {
            "arrays": to_record(arrays),
            "control": to_record(control),
            "config": ConfigRecord({"server-round": number}),
        }
        messages = [Message(RecordDict(records), node, "train") for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages))
        assert not any(reply.has_error() for reply in replies)
        models, changes = (
            [to_arrays(reply.content[key]) for reply in replies] for key in ("arrays", "control")
        )
        arrays = {n: np.mean([m[n] for m in models], axis=0) for n in arrays}
        control = {n: c + np.mean([d[n] for d in changes], axis=0) for n, c in control.items()}
        largest = max(largest, norm(control))
    return arrays, control, largest


def norm(arrays):
    return float(np.sqrt(sum(float(np.sum(np.square(a, dtype="f8"))) for a in arrays.values())))


def apart(found, exact):
    return norm({name: found[name] - array for name, array in exact.items()})


def test_control_variates_of_scaffold(federation, tmp_path):
    """A second record: each is coded in proportion to itself, and the variates add up."""
    plain, _, _ = federation("dense", nodes=NODES, app=scaffold(tmp_path, "dense"))
    exact, variate, largest = rounds_of_scaffold(plain, 8)
    grid, _, _ = federation("balanced", nodes=NODES, app=scaffold(tmp_path, "balanced"))
    arrays, control, _ = rounds_of_scaffold(grid, 8)
    assert apart(arrays, exact) < 0.1 * norm(exact)
    # it has become small, and what the largest changes were rounded by remains for the next ones
    assert norm(variate) < 0.3 * largest
    assert apart(control, variate) < 0.1 * largest
    for node in range(1, NODES + 1):
        assert accuracy(arrays, *data(node)) > accuracy(exact, *data(node)) - 0.03
    up = [e for e in grid.ledger.entries if e.direction == "up"]
    assert all(e.kind.startswith("update+") for e in up)
    assert grid.ledger.totals().payload_bytes * 3 < grid.ledger.totals().dense_bytes


# -- a proximal term ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["dense", "balanced"])
def test_the_proximal_term_is_around_what_was_published(federation, tmp_path, policy):
    """FedProx (Li et al. 2020) states its weight in the message; the node has the rest."""
    app, stated = ClientApp(mods=mods(tmp_path, policy)), set()

    @app.train()
    def train(message, context):
        near = float(message.content["config"]["proximal-mu"])
        stated.add(near)
        received = to_arrays(message.content["arrays"])
        arrays = trained(received, *data(context.node_id), near=near)
        record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        content = {"arrays": record, "m": MetricRecord({"num-examples": 300})}
        return Message(RecordDict(content), reply_to=message)

    grid, _, _ = federation(policy, nodes=NODES, app=app)
    strategy = FedProx(proximal_mu=0.1, fraction_evaluate=0.0, min_available_nodes=NODES)
    result = strategy.start(grid=grid, initial_arrays=to_record(BEGIN), num_rounds=8)
    assert stated == {0.1}
    assert min(accuracy(to_arrays(result.arrays), *data(n)) for n in (1, 2, 3)) > 0.85
