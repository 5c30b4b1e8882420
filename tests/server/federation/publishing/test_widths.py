"""Width classes: nodes that train a slice of the model, and what is made of their replies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    Strategy,
)
from torch import nn

from prunecast.client.training import compression_mod, current_channels, current_masks
from prunecast.client.training.client_app import LocalTraining, build_client_app
from prunecast.client.training.store import NodeStore
from prunecast.client.training.trainer import TensorBatches
from prunecast.compression.flower import dense_arrays
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.pruning.structure.narrowing import choose_channels, fit_module
from prunecast.compression.versions import NodeReport, PublishedModel
from prunecast.server.federation import (
    Checkpoint,
    CheckpointError,
    CompressedGrid,
    FederationError,
    Ledger,
    NodesFailed,
    Policy,
    PolicyError,
    Run,
    server_app,
)
from prunecast.server.federation.exchange.replies.overlap import Overlap
from prunecast.server.federation.publishing.version import Version
from prunecast.server.federation.publishing.widths import leading_slices
from prunecast.server.federation.reporting.ledger import Entry
from prunecast.server.federation.run import initial_arrays
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTHS = {"small": 0.25, "medium": 0.5}
SHAPES = {  # of three of the tensors, by class
    "": {"0.weight": (8, 1, 3, 3), "4.weight": (16, 8, 3, 3), "9.weight": (3, 16)},
    "medium": {"0.weight": (4, 1, 3, 3), "4.weight": (8, 4, 3, 3), "9.weight": (3, 8)},
    "small": {"0.weight": (2, 1, 3, 3), "4.weight": (4, 2, 3, 3), "9.weight": (3, 4)},
}
TRAINING = LocalTraining(local_epochs=1, learning_rate=0.05, device="cpu")
EXACT = {"preset": "lossless"}


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    )


def example() -> torch.Tensor:
    return torch.ones(2, 1, 8, 8)


def data(context: Context) -> tuple[TensorBatches, None]:
    rng = np.random.default_rng(int(context.node_config["partition-id"]))
    targets = torch.from_numpy(rng.integers(0, 3, 24))
    inputs = torch.from_numpy(rng.normal(size=(24, 1, 8, 8)).astype(np.float32))
    inputs[:, 0, 0] += targets[:, None]
    return TensorBatches((inputs,), targets, batch_size=8, shuffle=True), None


def trained(store: Path) -> ClientApp:
    return build_client_app(
        lambda context: network(), data, TRAINING, mods=[compression_mod(store)]
    )


def added(store: Path, seen: list[Any] | None = None) -> ClientApp:
    """A node adds its number to every float of what it was sent, of ten times as many examples."""
    client = ClientApp(mods=[compression_mod(store)])

    @client.train()
    def _train(message: Message, context: Context) -> Message:
        arrays = dense_arrays(message.content["arrays"])
        if seen is not None:
            seen.append((context.node_id, arrays, current_channels(), dict(current_masks())))
        number = context.node_id
        left = {
            n: a + a.dtype.type(number) if a.dtype.kind == "f" else a for n, a in arrays.items()
        }
        record = ArrayRecord({n: Array(np.asarray(a)) for n, a in left.items()})
        metrics = MetricRecord({"num-examples": 10 * number})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    return client


def fedavg(**options: Any) -> FedAvg:
    return FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1, **options)


class Federation:
    """Nodes of the classes that are given, 1 the first, each with a folder of its own."""

    def __init__(
        self, folder: Path, classes: list[str], app: Callable[..., ClientApp] = trained
    ) -> None:
        self.folder, self.seen = folder, list[Any]()
        numbers = range(1, len(classes) + 1)
        extra = () if app is trained else (self.seen,)
        self.apps = {n: app(self.store(n), *extra) for n in numbers}
        self.inner = InProcessGrid(self.apps, len(classes), run_id=RUN_ID)
        for number, name in zip(numbers, classes, strict=True):
            self.state(number, name)
        self.events: list[dict[str, Any]] = []
        self.before: dict[int, Callable[[], object]] = {}  # what happens before a round
        self.ledger = Ledger(keep=10_000)

    def state(self, node: int, name: str) -> None:
        config = self.inner._contexts[node].node_config
        config.pop("prunecast-width", None)
        if name:
            config["prunecast-width"] = name

    def store(self, node: int) -> Path:
        return self.folder / f"store-{node}"

    def held(self, node: int) -> Any:
        return NodeStore(self.store(node), RUN_ID, node).version("arrays")[0]

    def grid(self, **knobs: Any) -> CompressedGrid:
        chosen = Policy.preset(knobs.pop("preset", "balanced"), **{"widths": WIDTHS, **knobs})
        return CompressedGrid(self.inner, chosen, ledger=self.ledger, poll_interval=0.01)

    def run(
        self,
        rounds: int,
        strategy: Strategy | None = None,
        *,
        initial: ArrayRecord | Checkpoint | None = None,
        knobs: dict[str, Any] | None = None,
        **options: Any,
    ) -> tuple[Run, Any]:
        options.setdefault("slices", leading_slices(network, example))
        grid = self.grid(**(knobs or {}))
        run = Run(grid, strategy or fedavg(), on_event=self.hear, **options)
        return run, run.start(initial or initial_arrays(network, seed=3)[1], rounds)

    def hear(self, event: Any) -> None:
        self.events.append(dict(event))
        if event["event"] == "round-finished":
            self.before.get(event["round"] + 1, lambda: None)()

    def rounds(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "round-finished"]

    def arrived(self, node: int) -> list[Any]:
        """What a node was given to train: arrays, plan, masks."""
        return [given for number, *given in self.seen if number == node]

    def sent(self, node: int, direction: str = "down") -> list[str]:
        entries = self.ledger.entries
        return [e.kind for e in entries if (e.node, e.direction) == (node, direction)]


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def plan_of(name: str) -> ChannelPlan:
    return leading_slices(network, example)(WIDTHS[name])


def test_a_slice_is_bit_for_bit_a_part_of_the_published_model_and_travels_by_itself(tmp_path):
    federation = Federation(tmp_path, ["", "medium", "small"])
    run, result = federation.run(3)
    whole = run.published
    assert whole is not None
    arrays = result.arrays
    for node, name in ((1, ""), (2, "medium"), (3, "small")):
        found = federation.held(node)
        assert {n: found[n].shape for n in SHAPES[name]} == SHAPES[name]
        if name:
            model, plan = run.grid.sliced(arrays, name)
            wanted = plan.narrow(whole)
            for tensor in wanted.tensors:
                if not tensor.startswith("1.running"):
                    np.testing.assert_array_equal(model[tensor].dense(), wanted[tensor].dense())
    # asked for its class, then a keyframe of the slice, then deltas against the slice
    for node in (1, 2, 3):
        assert federation.sent(node) == ["ask", "keyframe", "delta", "delta"]
        assert federation.sent(node, "up") == ["base-missing", "update", "update", "update"]
    small, medium, wide = (
        federation.ledger.totals(width=name).payload_bytes for name in ("small", "medium", "")
    )
    assert small < medium < wide
    assert small + medium + wide == federation.ledger.totals().payload_bytes
    assert {(e.node, e.width) for e in federation.ledger.entries} == {
        *((1, ""), (2, "medium"), (3, "small"))
    }


def test_weights_are_averaged_over_the_nodes_that_have_them(tmp_path):
    federation = Federation(tmp_path, ["", "medium", "small", "small"], added)
    initial = initial_arrays(network, seed=3)[1]
    _, result = federation.run(1, initial=initial, knobs=EXACT)
    before, after = dense_arrays(initial), dense_arrays(result.arrays)
    for name in ("0.weight", "4.weight", "4.bias", "5.weight", "9.weight", "9.bias"):
        # by hand: node n arrived at its weights + n, with 10 n examples
        total, weights = np.zeros(before[name].shape), np.zeros(before[name].shape)
        for node, width in ((1, ""), (2, "medium"), (3, "small"), (4, "small")):
            at = plan_of(width).places(name, before[name].shape) if width else ...
            total[at] += 10 * node * (before[name][at] + node)
            weights[at] += 10 * node
        np.testing.assert_allclose(after[name], total / weights, rtol=1e-6, atol=1e-6)
    assert after["0.weight"][7, 0, 0, 0] == pytest.approx(before["0.weight"][7, 0, 0, 0] + 1)


def test_what_nobody_trains_keeps_its_value(tmp_path):
    federation = Federation(tmp_path, ["small", "small"], added)
    initial = initial_arrays(network, seed=3)[1]
    _, result = federation.run(1, initial=initial, knobs=EXACT)
    before, after = dense_arrays(initial), dense_arrays(result.arrays)
    for name, array in before.items():
        apart = np.ones(array.shape, bool)
        if name in plan_of("small").kept:
            apart[plan_of("small").places(name, array.shape)] = False
        elif not name.startswith("1.running"):
            continue
        np.testing.assert_allclose(after[name][apart], array[apart], rtol=3e-7)  # of an average
    np.testing.assert_allclose(after["9.bias"], before["9.bias"] + (1 * 1 + 2 * 2) / 3, rtol=1e-6)


@pytest.mark.parametrize("strategy", [FedAvgM, FedAdam, FedMedian])
def test_other_strategies_are_given_whole_models(tmp_path, strategy):
    federation = Federation(tmp_path, ["", "small", "medium"], added)
    made = strategy(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    _, result = federation.run(2, made, knobs=EXACT, stop_on_failure=True)
    before, after = dense_arrays(initial_arrays(network, seed=3)[1]), dense_arrays(result.arrays)
    assert {n: a.shape for n, a in after.items()} == {n: a.shape for n, a in before.items()}
    assert (after["0.weight"] > before["0.weight"]).all()


def test_running_statistics_are_those_of_the_class(tmp_path):
    federation = Federation(tmp_path, ["", "small", "small"], added)
    run, result = federation.run(2, knobs=EXACT)
    # two rounds: node 1 alone for the whole, nodes 2 and 3 of 20 and 30 examples for the class
    mean = dense_arrays(result.arrays)["1.running_mean"]
    np.testing.assert_allclose(mean, np.full(8, 2.0), rtol=1e-6)
    model, _ = run.grid.sliced(result.arrays, "small")
    np.testing.assert_allclose(model["1.running_mean"].dense(), np.full(2, 2 * 2.6), rtol=1e-6)
    np.testing.assert_allclose(
        federation.arrived(3)[-1][0]["1.running_mean"], np.full(2, 2.6), rtol=1e-6
    )  # the second round began with those of the first


def test_the_mask_of_a_slice_is_a_part_of_the_whole_one(tmp_path):
    federation = Federation(tmp_path, ["", "small"], added)
    knobs = {"sparsity": 0.6, "pruning_schedule": "static", "pruning_min_size": 16}
    federation.run(2, knobs=knobs)
    (_, none, whole), (_, plan, part) = (federation.arrived(node)[0] for node in (1, 2))
    assert none is None
    assert whole.keys() == part.keys()
    for name, mask in whole.items():
        np.testing.assert_array_equal(part[name], plan.array(name, mask))
    assert np.mean(~whole["4.weight"]) == pytest.approx(0.6, abs=0.01)


def test_what_quantisation_drops_of_a_slice_goes_into_its_next_update(tmp_path):
    federation = Federation(tmp_path, ["", "small"])
    federation.run(3)
    (pending,) = federation.store(2).rglob("*.pending-*")
    tag = pending.name.rpartition("-")[2]
    residual = NodeStore(federation.store(2), RUN_ID, 2).residual("arrays", accepted=tag)
    shapes = {name.partition("\0")[0]: array.shape for name, array in residual.items()}
    assert shapes.items() <= plan_of("small").shapes(shapes_of(network())).items()
    assert any(len(shape) > 1 for shape in shapes.values())


@pytest.mark.parametrize("name", ["", "small", "medium"])
def test_a_node_that_lost_its_disk_gets_its_slice_again(tmp_path, name):
    import shutil

    federation = Federation(tmp_path, ["", name])
    federation.before[2] = lambda: shutil.rmtree(federation.store(2))
    federation.run(3, stop_on_failure=True)
    kinds = ["ask", "keyframe", "delta", "keyframe", "delta"]
    assert federation.sent(2) == kinds
    assert federation.held(2)["0.weight"].shape == SHAPES[name]["0.weight"]


@pytest.mark.parametrize(
    ("before", "after"),
    [("", "small"), ("small", ""), ("small", "medium"), ("medium", "small"), ("medium", "")],
)
def test_a_node_may_change_its_class(tmp_path, before, after):
    federation = Federation(tmp_path, ["", before])
    federation.before[2] = lambda: federation.state(2, after)
    federation.run(4, stop_on_failure=True)
    # the message after the one in which it says so is of its new class
    assert federation.sent(2) == ["ask", "keyframe", "delta", "keyframe", "delta"]
    assert federation.held(2)["0.weight"].shape == SHAPES[after]["0.weight"]


def test_a_class_that_the_policy_lacks_is_refused_by_name(tmp_path):
    federation = Federation(tmp_path, ["", "tiny"])
    federation.run(2)
    assert [event["nodes"]["trained"] for event in federation.rounds()] == [0, 1, 1]
    reason = federation.rounds()[1]["nodes"]["failed"][0]["reason"]
    assert "'tiny'" in reason
    assert "'small', 'medium'" in reason
    with pytest.raises(NodesFailed, match="prunecast-width"):
        Federation(tmp_path / "all", ["tiny"]).run(1)


def test_without_classes_in_the_policy_every_node_trains_the_whole_model(tmp_path):
    federation = Federation(tmp_path, ["", "small"])
    federation.run(1, knobs={"widths": {}}, stop_on_failure=True)
    assert federation.sent(2) == ["keyframe"]
    assert federation.held(2)["0.weight"].shape == (8, 1, 3, 3)
    assert all(not entry.width for entry in federation.ledger.entries)
    assert "widths" not in federation.rounds()[-1]


def evaluated(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    module, plan = network(), current_channels()
    if plan is not None:
        fit_module(module, plan)
    module.load_state_dict(arrays.to_torch_state_dict())
    weights = sum(tensor.numel() for tensor in module.state_dict().values())
    return MetricRecord({"weights": weights, "first": float(module[0].weight.detach()[0].sum())})


def test_every_class_is_measured_and_its_bytes_are_counted(tmp_path):
    federation = Federation(tmp_path, ["", "small", "small"])
    federation.run(2, evaluate_fn=evaluated)
    for event in federation.rounds():
        found = event["widths"]
        assert list(found) == ["whole", "small", "medium"]
        assert [found[name]["share"] for name in found] == [1.0, 0.25, 0.5]
        assert found["whole"]["metrics"] == event["metrics"]
        for part in found.values():
            assert part["metrics"]["weights"] == part["weights"]
        for name in ("bytes_down", "bytes_up"):
            assert sum(part[name] for part in found.values()) == event[name]
    last = federation.rounds()[-1]["widths"]
    assert [part["nodes"] for part in last.values()] == [1, 2, 0]
    assert last["small"]["weights"] < last["medium"]["weights"] < last["whole"]["weights"]
    # the same channels lead in all of them
    assert len({round(part["metrics"]["first"], 6) for part in last.values()}) == 1


def test_a_resumed_run_goes_on_with_the_statistics_of_each_class(tmp_path):
    federation = Federation(tmp_path, ["", "small", "small"], added)
    federation.run(2, knobs=EXACT, folder=tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.safetensors"
    checkpoint = Checkpoint.load(path)
    np.testing.assert_allclose(checkpoint.widths["small"]["1.running_mean"], np.full(2, 5.2))
    again = Federation(tmp_path / "again", ["", "small", "small"], added)
    again.run(1, initial=checkpoint, knobs=EXACT)
    begun = {node: arrays for node, arrays, _, _ in again.seen}
    np.testing.assert_allclose(begun[2]["1.running_mean"], np.full(2, 5.2), rtol=1e-6)
    np.testing.assert_allclose(begun[1]["1.running_mean"], np.full(8, 2.0), rtol=1e-6)
    other = {"widths": {"small": 0.5}, **EXACT}
    with pytest.raises(CheckpointError, match="'small' had another width"):
        again.run(1, initial=checkpoint, knobs=other)


def test_a_loop_that_pulls_replies_together_gets_whole_ones(tmp_path):
    federation = Federation(tmp_path, ["", "small"], added)
    grid = federation.grid(**EXACT)
    grid.use_widths({name: plan_of(name) for name in WIDTHS})
    initial = initial_arrays(network, seed=3)[1]
    content = RecordDict({"arrays": initial, "config": ConfigRecord({"server-round": 1})})
    messages = [grid.create_message(content, MessageType.TRAIN, node, "1") for node in (1, 2)]
    waiting, replies = set(grid.push_messages(messages)), {}
    for _ in range(5):  # the first replies say which class the node is of
        for reply in grid.pull_messages(list(waiting)):
            replies[reply.metadata.src_node_id] = reply
            waiting.discard(reply.metadata.reply_to_message_id)
    before = dense_arrays(initial)["0.weight"]
    part = dense_arrays(replies[2].content["arrays"])["0.weight"]
    np.testing.assert_allclose(part[:2], before[:2] + 2, rtol=1e-6)
    np.testing.assert_allclose(part[2:], before[2:] + 1, rtol=1e-6)


def test_dense_replies_are_aggregated_by_overlap_too(tmp_path):
    federation = Federation(tmp_path, ["", "small"], added)
    initial = initial_arrays(network, seed=3)[1]
    _, result = federation.run(1, initial=initial, knobs={**EXACT, "up": "dense"})
    before, after = dense_arrays(initial)["0.weight"], dense_arrays(result.arrays)["0.weight"]
    np.testing.assert_allclose(after[:2], before[:2] + 5 / 3, rtol=1e-5)
    np.testing.assert_allclose(after[2:], before[2:] + 1, rtol=1e-5)


def test_statistics_for_pruning_come_from_nodes_that_train_all_of_the_model(tmp_path):
    federation = Federation(tmp_path, ["", "small"])
    knobs = {"sparsity": 0.5, "pruning_criterion": "fisher", "pruning_end": 3, "pruning_begin": 1}
    run, _ = federation.run(4, knobs={**knobs, "pruning_min_size": 16}, stop_on_failure=True)
    assert run.published is not None
    assert run.published.sparsity() > 0.4


def test_what_cannot_be_averaged_fills_nothing_in():
    half = ChannelPlan({"w": (np.array([True, False]),)})
    master = {"w": np.array([1.0, 2.0], np.float32)}
    whole = Version(PublishedModel({}), master, whole=master)
    part = Version(PublishedModel({}), half.arrays(master), width="a", plan=half, whole=master)
    content = {
        "strings": (np.array(["x", "y"]), whole),
        "shape": (np.zeros(3, np.float32), whole),
        "whole": (np.array([3.0, 5.0], np.float32), whole),
        "part": (np.array([7.0], np.float32), part),
    }
    overlap = Overlap()
    records = {
        n: RecordDict({"arrays": ArrayRecord({"w": Array(a)})}) for n, (a, _) in content.items()
    }
    for name, (_, version) in content.items():
        overlap.join(name, records[name], version, 10.0)
    entry = Entry(1, 1, "up", "update", "train", 0, 0)
    filled = overlap.whole(records["part"], part, entry)
    assert filled["arrays"]["w"].numpy().tolist() == [7.0, 5.0]
    assert overlap.whole(records["strings"], part, entry)["arrays"]["w"].numpy().tolist() == [
        "x",
        "y",
    ]


@pytest.mark.parametrize("weight", [float("inf"), float("nan"), 0.0, -3.0])
def test_replies_of_no_number_of_examples_or_not_finite_fill_nothing_in(weight):
    half = ChannelPlan({"w": (np.array([True, False]),)})
    master = {"w": np.array([1.0, 2.0], np.float32), "running_mean": np.zeros(2, np.float32)}
    whole = Version(PublishedModel({}), master, whole=master)
    part = Version(PublishedModel({}), half.arrays(master), width="a", plan=half, whole=master)

    def reply(*values: float) -> RecordDict:
        w = np.array(values, np.float32)
        record = ArrayRecord({"w": Array(w), "running_mean": Array(np.repeat(w[-1:], 2))})
        return RecordDict({"arrays": record})

    overlap = Overlap()
    overlap.join("whole", reply(3, 5), whole, 10.0)
    overlap.join("unweighted", reply(7, 9), whole, weight)
    overlap.join("damaged", reply(7, np.inf), whole, 10.0)
    overlap.join("part", reply(4), part, 10.0)
    overlap.join("part, damaged", reply(np.nan), part, 10.0)
    overlap.join("part, unweighted", reply(8), part, weight)
    filled = overlap.whole(reply(4), part, Entry(1, 1, "up", "update", "train", 0, 0))
    assert filled["arrays"]["w"].numpy().tolist() == [4.0, 5.0]
    assert overlap.statistics(part)["running_mean"].tolist() == [4.0, 4.0]


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"down": "dense", "up": "dense"}, "prunecast.down = 'lattice'"),
        ({"up": "stc"}, "prunecast.up = 'lattice'"),
        ({"channels": 0.5, "channels_at": (2,)}, "prunecast.channels = 1"),
        ({"widths": {"small": 1.0}}, "below 1"),
        ({"widths": {"small": 0}}, "above 0"),
        ({"widths": {"small": "half"}}, "small=0.25"),
        ({"widths": {"whole": 0.5}}, "'whole'"),
        ({"widths": {"a/b": 0.5}}, "a-z"),
    ],
)
def test_a_policy_that_does_not_go_with_classes_is_refused(knobs, words):
    with pytest.raises(PolicyError, match=words):
        Policy(**{"widths": WIDTHS, **knobs})


def test_classes_are_read_from_the_run_config():
    found = Policy.from_run_config({"prunecast.widths": "small=0.25, medium=0.5"})
    assert found.widths == WIDTHS


def test_a_run_in_which_nobody_says_what_classes_train_is_refused(tmp_path):
    federation = Federation(tmp_path, [""])
    with pytest.raises(FederationError, match="leading_slices"):
        federation.run(1, slices=None)
    grid = federation.grid()
    content = RecordDict({"arrays": initial_arrays(network, seed=3)[1]})
    with pytest.raises(FederationError, match="use_widths"):
        grid.push_messages([grid.create_message(content, MessageType.TRAIN, 1, "1")])
    with pytest.raises(FederationError, match="'small'"):
        grid.use_widths({"small": plan_of("small")})


def test_noise_for_averages_over_all_nodes_is_refused(tmp_path):
    strategy = DifferentialPrivacyServerSideFixedClipping(fedavg(), 1.0, 1.0, 2)
    with pytest.raises(FederationError, match="DifferentialPrivacyServerSideFixedClipping"):
        Federation(tmp_path, [""]).run(1, strategy)


def test_models_of_single_nodes_and_other_records_are_refused(tmp_path):
    federation = Federation(tmp_path, ["", "small"])
    grid = federation.grid()
    grid.use_widths({name: plan_of(name) for name in WIDTHS})
    own = [RecordDict({"arrays": initial_arrays(network, seed=n)[1]}) for n in (1, 2)]
    with pytest.raises(FederationError, match="another one on every node"):
        grid.push_messages(
            [grid.create_message(c, MessageType.TRAIN, n, "1") for n, c in enumerate(own, 1)]
        )
    more = RecordDict({**own[0], "control": initial_arrays(network, seed=5)[1]})
    with pytest.raises(FederationError, match="'control' has none"):
        grid.push_messages([grid.create_message(more, MessageType.TRAIN, 1, "1")])


def test_channels_cannot_be_removed_from_a_model_that_is_sliced(tmp_path):
    grid = Federation(tmp_path, [""]).grid()
    with pytest.raises(FederationError, match="all of its channels"):
        grid.remove_channels(initial_arrays(network, seed=3)[1], plan_of("small"))


def test_a_slice_that_is_not_contained_in_the_wider_one_is_refused(tmp_path):
    module = initial_arrays(network, seed=9)[0]
    nn.init.zeros_(module[0].weight[:2])  # by size, these go first
    other = choose_channels(module, (example(),), 0.25)
    grid = Federation(tmp_path, [""]).grid()
    with pytest.raises(PlanError, match="'small' is not contained in that of 'medium'"):
        grid.use_widths({"small": other, "medium": plan_of("medium")})


def test_a_report_with_a_class_is_read_as_it_was_written():
    report = NodeReport({"arrays": bytes(16)}, ("control",), 1.25, "trouble", False, "small")
    assert NodeReport.from_bytes(report.to_bytes()) == report
    assert len(NodeReport(width="small").to_bytes()) == len(NodeReport().to_bytes()) + 6


# -- the ready apps --------------------------------------------------------------------------------


def test_the_ready_serverapp_measures_every_class(tmp_path, monkeypatch):
    federation = Federation(tmp_path, ["", "small"])
    config = {
        "model": f"{__name__}:network",
        "example": f"{__name__}:example",
        "evaluate": f"{__name__}:measure",
        "folder": str(tmp_path / "run"),
        "num-server-rounds": 1,
        "strategy.fraction-evaluate": 0.0,
        "prunecast.widths": "small=0.25, medium=0.5",
    }
    context = Context(RUN_ID, 0, {}, RecordDict(), config)
    server_app.main(federation.inner, context)
    from prunecast.server.federation import read_events

    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    last = [event for event in events if event["event"] == "round-finished"][-1]["widths"]
    assert {name: part["metrics"]["wide"] for name, part in last.items()} == {
        "whole": 8,
        "small": 2,
        "medium": 4,
    }


def measure(module: nn.Module, context: Context) -> dict[str, float]:
    return {"wide": module[0].out_channels}
