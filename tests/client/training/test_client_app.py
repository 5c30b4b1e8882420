"""The ready ClientApp reads Flower's run config."""

from __future__ import annotations

import shutil

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import nn

from prunecast.client.training import client_app
from prunecast.client.training.client_app import LocalTraining, app, training_seed
from prunecast.client.training.trainer import TensorBatches, TrainerError
from prunecast.server.federation import CompressedGrid, Policy, Run
from prunecast.server.federation.shrinking.choosing import module_chooser
from prunecast.simulations.runner.inprocess import InProcessGrid


def tiny_model() -> nn.Module:
    return nn.Linear(4, 2)


def tiny_data(context: Context) -> tuple[TensorBatches, None]:
    generator = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    inputs = torch.randn(12, 4, generator=generator)
    return TensorBatches(inputs, (inputs[:, 0] > 0).long(), batch_size=4, shuffle=True), None


def ask(message_type: str, run_config: dict[str, object]) -> Message:
    grid = InProcessGrid(app, 1)
    for context in grid._contexts.values():
        context.run_config.update(run_config)
    content = RecordDict(
        {
            "arrays": ArrayRecord(tiny_model().state_dict()),
            "config": ConfigRecord({"server-round": 2}),
        }
    )
    [node] = grid.get_node_ids()
    [reply] = grid.send_and_receive([Message(content, node, message_type)])
    return reply


CONFIG = {
    "model": f"{__name__}:tiny_model",
    "data": f"{__name__}:tiny_data",
    "local-epochs": 2,
    "learning-rate": 1,
}


def test_it_trains_and_evaluates_what_the_run_config_names():
    trained = ask("train", CONFIG)
    assert not trained.has_error(), trained.error.reason
    assert trained.content["metrics"]["num-examples"] == 12
    assert list(trained.content["arrays"]) == ["weight", "bias"]
    evaluated = ask("evaluate", CONFIG)
    assert set(evaluated.content["metrics"]) == {"num-examples", "eval-loss", "eval-accuracy"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "the run config lacks 'model'"),
        ({"model": "nope:net"}, "there is no module 'nope'"),
        ({"data": "torch:nope"}, "has no 'nope'"),
        ({"local-epochs": "two"}, "local-epochs = 'two' in the run config is no int"),
        ({"mixed-precision": "maybe"}, "'auto', 'on' or 'off'"),
    ],
)
def test_what_the_run_config_gets_wrong_is_named(change, message):
    reply = ask("train", {**CONFIG, **change})
    assert reply.has_error()
    assert message in reply.error.reason


def test_the_seed_depends_on_seed_round_and_partition():
    def context(partition: int, node: int) -> Context:
        return Context(
            run_id=1,
            node_id=node,
            node_config={"partition-id": partition},
            state=RecordDict(),
            run_config={},
        )

    base = training_seed(1, 2, context(3, 99))
    assert base == training_seed(1, 2, context(3, 12345))
    assert len({base, *(training_seed(*c) for c in _others(context))}) == 4


def _others(context):
    return [(2, 2, context(3, 9)), (1, 3, context(3, 9)), (1, 2, context(4, 9))]


def test_settings_read_the_run_config():
    read = LocalTraining.from_run_config({"learning-rate": 1, "momentum": 0.5, "other": "x"})
    assert read == LocalTraining(learning_rate=1.0, momentum=0.5)
    with pytest.raises(TrainerError, match="seed"):
        LocalTraining.from_run_config({"seed": True})


def test_it_contributes_gradients_where_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNECAST_STORE", str(tmp_path))
    inner = InProcessGrid(app, 2)
    for context in inner._contexts.values():
        context.run_config.update(CONFIG)
    knobs = {"sparsity": 0.5, "pruning_begin": 0, "pruning_end": 2, "pruning_min_size": 1}
    grid = CompressedGrid(inner, Policy(pruning_criterion="fisher", **knobs), poll_interval=0.01)
    content = RecordDict({"arrays": ArrayRecord(tiny_model().state_dict())})
    messages = [Message(content, node, "train") for node in inner.get_node_ids()]
    assert not any(reply.has_error() for reply in grid.send_and_receive(messages))
    found = grid._streams.stream(grid.run.run_id, "arrays").pruner.statistics.take()
    assert found["gradient"]["weight"].shape == (2, 4)
    assert (found["gradient"]["weight"] > 0).all()


def test_once_the_model_is_pruned_the_last_dense_version_is_its_teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNECAST_STORE", str(tmp_path))
    taught = []
    learn = client_app.train

    def noting(module, loader, **options):
        teacher = options["teacher"]
        taught.append(None if teacher is None else teacher.weight.detach().clone())
        return learn(module, loader, **options)

    monkeypatch.setattr(client_app, "train", noting)
    inner = InProcessGrid(app, 1)
    for context in inner._contexts.values():
        context.run_config.update({**CONFIG, "distillation": 0.5})
    knobs = {"sparsity": 0.5, "pruning_begin": 2, "pruning_end": 4, "pruning_min_size": 1}
    grid = CompressedGrid(inner, Policy(**knobs), poll_interval=0.01)
    FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1).start(
        grid=grid, initial_arrays=ArrayRecord(tiny_model().state_dict()), num_rounds=5
    )
    dense = grid._streams.stream(grid.run.run_id, "arrays").history
    versions = {model.counter: model for model in filter(None, map(dense.get, dense))}
    assert [teacher is not None for teacher in taught] == [False, False, True, True, True]
    assert not versions[2].masks()
    for teacher in taught[2:]:
        assert teacher.numpy() == pytest.approx(versions[2].arrays()["weight"])
    down = [entry.payload_bytes for entry in grid.ledger.entries if entry.direction == "down"]
    assert max(down[1:]) < down[0]  # the node had it: nothing was sent


@pytest.mark.parametrize("loses", [False, True])
def test_replies_say_who_had_a_teacher(tmp_path, monkeypatch, caplog, loses):
    monkeypatch.setenv("PRUNECAST_STORE", str(tmp_path))
    inner = InProcessGrid(app, 2, run_id=71 + loses)
    for context in inner._contexts.values():
        context.run_config.update({**CONFIG, "distillation": 0.5})

    class Losing(FedAvg):
        def configure_train(self, server_round, *args):
            if loses and server_round == 3:
                shutil.rmtree(tmp_path)
            return super().configure_train(server_round, *args)

    policy = Policy(sparsity=0.5, pruning_begin=1, pruning_end=2, pruning_min_size=1)
    result = Losing(fraction_evaluate=0.0).start(
        grid=CompressedGrid(inner, policy, poll_interval=0.01),
        initial_arrays=ArrayRecord(tiny_model().state_dict()),
        num_rounds=4,
    )
    shares = [metrics["distilled"] for metrics in result.train_metrics_clientapp.values()]
    said = [r.getMessage() for r in caplog.records if "trains without distillation" in r.message]
    assert shares == ([0.0, 1.0, 0.0, 0.0] if loses else [0.0, 1.0, 1.0, 1.0])
    assert len(said) == (2 if loses else 0)  # of each node, once
    assert all("came when that was pruned already, or lost its store" in line for line in said)


def wide_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_the_whole_model_teaches_what_has_fewer_channels(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNECAST_STORE", str(tmp_path))
    widths = []

    def noting(module, loader, teacher=None, **options):
        widths.append((module[0].out_features, teacher and teacher[0].out_features))
        return train(module, loader, teacher=teacher, **options)

    train = client_app.train
    monkeypatch.setattr(client_app, "train", noting)
    inner = InProcessGrid(app, 1, run_id=73)
    for context in inner._contexts.values():
        given = {**CONFIG, "model": f"{__name__}:wide_model", "distillation": 0.5}
        context.run_config.update({**given, "learning-rate": 0.1})
    run = Run(
        inner,
        FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1),
        policy=Policy(channels=0.5, channels_at=(2,)),
        channels=module_chooser(wide_model, lambda: torch.ones(2, 4)),
    )
    run.start(ArrayRecord(wide_model().state_dict()), num_rounds=4)
    assert widths == [(8, None), (8, None), (4, 8), (4, 8)]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("distillation", 1.5, "distillation must be from 0 to 1"),
        ("distillation-temperature", 0.0, "distillation-temperature must be above 0"),
    ],
)
def test_impossible_distillation_is_refused(key, value, message):
    with pytest.raises(TrainerError, match=message):
        LocalTraining.from_run_config({key: value})
