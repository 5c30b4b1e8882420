"""Channels that go while a federation trains: over absences, restarts and other architectures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
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
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.training import compression_mod, current_channels
from prunecast.client.training.client_app import LocalTraining, build_client_app
from prunecast.client.training.store import NodeStore
from prunecast.client.training.trainer import TensorBatches
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.channels import ChannelPlan, channels_beside
from prunecast.compression.pruning.structure.narrowing import fit_module
from prunecast.compression.versions import load_model
from prunecast.server.federation import (
    AutomaticReleases,
    Checkpoint,
    CompressedGrid,
    FederationError,
    Ledger,
    Policy,
    PolicyError,
    ReleaseRule,
    ReleaseRuleError,
    Run,
    server_app,
)
from prunecast.server.federation.releasing import RecipeReleaser
from prunecast.server.federation.run import initial_arrays
from prunecast.server.federation.shrinking.choosing import module_chooser
from prunecast.server.federation.shrinking.strategies import narrow_strategy
from prunecast.server.repository import KeyRing, Repository
from prunecast.server.repository.authoring import ReleaseRecipe
from prunecast.server.repository.serving import ReleaseServer
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = {"0.weight": (8, 1, 3, 3), "4.weight": (16, 8, 3, 3), "9.weight": (3, 16)}
NARROW = {"0.weight": (4, 1, 3, 3), "4.weight": (8, 4, 3, 3), "9.weight": (3, 8)}
TRAINING = LocalTraining(local_epochs=1, learning_rate=0.05, device="cpu")


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    )


def example() -> torch.Tensor:
    return torch.ones(2, 1, 8, 8)


class Reader(nn.Module):
    """Reads an image row by row."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, heads, 32, dropout=0.0, batch_first=True)
        self.enter, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.head(self.encoder(self.enter(x[:, 0])).mean(1)))


def in_layer(number: int, inner: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "self_attn.in_proj_weight": (3 * inner, 16),
        "self_attn.in_proj_bias": (3 * inner,),
        "self_attn.out_proj.weight": (16, inner),
        "linear1.weight": (32, 16),
    }
    return {f"encoder.layers.{number}.{name}": shape for name, shape in shapes.items()}


class Family(NamedTuple):
    """A network, the knobs of what goes, what half of it leaves, and another architecture."""

    network: Callable[[], nn.Module]
    wide: dict[str, tuple[int, ...]]
    narrow: dict[str, tuple[int, ...]]
    knobs: dict[str, float]
    other: Callable[[], nn.Module]
    refused: str


def wider() -> nn.Module:
    made = network()
    made[0], made[1], made[4] = nn.Conv2d(1, 9, 3), nn.BatchNorm2d(9), nn.Conv2d(9, 16, 3)
    return made


FAMILIES = {
    "channels": Family(
        *(network, WIDE, NARROW, {"channels": 0.5}, wider),
        "tensor '0.weight' is [9, 1, 3, 3], the plan was made for another shape",
    ),
    "heads": Family(
        *(Reader, in_layer(0, 16) | in_layer(1, 16), in_layer(0, 8) | in_layer(1, 8)),
        *({"heads": 0.5}, lambda: Reader(heads=2)),
        "layer 'encoder.layers.0.self_attn' has 2 heads, the plan was made for 4",
    ),
}
FAMILIES["layers"] = Family(
    *(Reader, in_layer(0, 16) | in_layer(1, 16), in_layer(0, 16), {"layers": 0.5}),
    lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3)),
    "Sequential lacks tensor 'encoder.layers.1.*': the plan is of another module",
)
EVERY = pytest.mark.parametrize("federation", FAMILIES, indirect=True)


def data(context: Context) -> tuple[TensorBatches, None]:
    rng = np.random.default_rng(int(context.node_config["partition-id"]))
    targets = torch.from_numpy(rng.integers(0, 3, 24))
    inputs = torch.from_numpy(rng.normal(size=(24, 1, 8, 8)).astype(np.float32))
    inputs[:, 0, 0] += targets[:, None]
    return TensorBatches((inputs,), targets, batch_size=8, shuffle=True), None


def client(store: Path, factory: Callable[[], nn.Module] = network) -> ClientApp:
    return build_client_app(
        lambda context: factory(), data, TRAINING, mods=[compression_mod(store)]
    )


def policy(*at: int, **knobs: Any) -> Policy:
    if not knobs.keys() & {"channels", "heads", "layers"}:
        knobs["channels"] = 0.5
    return Policy.preset(knobs.pop("preset", "balanced"), channels_at=at, **knobs)


class Federation:
    """Three nodes, each with a folder of its own, and runs one after the other."""

    def __init__(
        self, folder: Path, apps: dict[int, ClientApp] | None = None, family: str = "channels"
    ) -> None:
        self.folder, self.family = folder, FAMILIES[family]
        self.network = self.family.network
        self.apps = apps or {n: client(self.store(n), self.network) for n in (1, 2, 3)}
        self.inner = InProcessGrid(self.apps, len(self.apps), run_id=RUN_ID)
        self.events: list[dict[str, Any]] = []
        self.before: dict[int, Callable[[], object]] = {}  # what happens before a round
        self.ledger = Ledger(keep=10_000)

    def store(self, node: int) -> Path:
        return self.folder / f"store-{node}"

    def held(self, node: int) -> NodeStore:
        return NodeStore(self.store(node), self.inner.run.run_id, node)

    def run(
        self,
        chosen: Policy,
        rounds: int,
        strategy: Strategy | None = None,
        *,
        initial: Checkpoint | None = None,
        **options: Any,
    ) -> tuple[Run, Any]:
        grid = CompressedGrid(self.inner, chosen, ledger=self.ledger, poll_interval=0.01)
        options.setdefault("channels", module_chooser(self.network, example))
        run = Run(
            grid,
            strategy or FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1),
            on_event=self.hear,
            **options,
        )
        return run, run.start(initial or initial_arrays(self.network, seed=3)[1], rounds)

    def policy(self, *at: int, **knobs: Any) -> Policy:
        return policy(*at, **self.family.knobs, **knobs)

    def shapes(self, arrays: Any) -> dict[str, tuple[int, ...]]:
        """Of those tensors that the family tells of."""
        found = {name: tuple(array.shape) for name, array in arrays.items()}
        return {name: found[name] for name in self.family.wide if name in found}

    def hear(self, event: Any) -> None:
        self.events.append(dict(event))
        if event["event"] == "round-finished":
            self.before.get(event["round"] + 1, lambda: None)()

    def sent(self, node: int, number: int) -> Any:
        return [
            entry
            for entry in self.ledger.entries
            if (entry.node, entry.round, entry.direction) == (node, number, "down")
        ]


@pytest.fixture
def federation(tmp_path: Path, request: pytest.FixtureRequest) -> Federation:
    return Federation(tmp_path, family=getattr(request, "param", "channels"))


def shapes(arrays: Any) -> dict[str, tuple[int, ...]]:
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    return {name: found[name] for name in WIDE}


@EVERY
def test_half_of_the_channels_go_while_everybody_goes_on(federation: Federation) -> None:
    run, result = federation.run(federation.policy(2), 4, output=federation.folder / "final.model")
    assert federation.shapes(result.arrays) == federation.family.narrow
    published = load_model(federation.folder / "final.model")
    assert federation.shapes(published.tensors) == federation.family.narrow
    beside = ChannelPlan.load(channels_beside(federation.folder / "final.model"))
    assert beside.coded == run.grid.channels().coded  # type: ignore[union-attr]
    for node in (1, 2, 3):
        held, plan = federation.held(node).held("arrays"), federation.held(node).channels("arrays")
        assert held is not None
        assert federation.shapes(held.tensors) == federation.family.narrow
        assert plan is not None
        assert plan.coded == run.grid.channels().coded  # type: ignore[union-attr]
        # no keyframe: what a node held is narrowed on both sides, and the delta builds on that
        kinds = [federation.sent(node, number)[0].kind for number in (1, 2, 3, 4)]
        assert kinds == ["keyframe", "delta", "delta", "delta"]
    (event,) = [e for e in federation.events if e["event"] == "channels-removed"]
    shares = dict.fromkeys(("channels", "heads", "layers"), 1.0) | federation.family.knobs
    assert (event["round"], event["share"]) == (2, shares["channels"])
    assert (event["heads"], event["layers"]) == (shares["heads"], shares["layers"])
    assert event["weights"] == [
        sum(t.numel() for t in module.state_dict().values())
        for module in (federation.network(), fit_module(federation.network(), run.grid.channels()))  # type: ignore[arg-type]
    ]
    # the plan travels once, beside the version, and the ledger has its bytes
    with_plan, without = (federation.sent(1, n)[0].payload_bytes for n in (3, 4))
    assert with_plan - without > event["plan_bytes"] - 100
    errors = [e for e in federation.ledger.entries if e.kind == "error"]
    assert not errors


@EVERY
def test_a_node_that_was_away_gets_the_plan_and_a_delta(federation: Federation) -> None:
    federation.before = {
        2: lambda: federation.inner.online.discard(3),
        4: lambda: federation.inner.online.add(3),
    }
    _, result = federation.run(federation.policy(2), 5)
    assert not federation.sent(3, 3)
    assert [e.kind for e in federation.sent(3, 4)] == ["delta"]
    assert federation.shapes(federation.held(3).held("arrays").tensors) == federation.family.narrow  # type: ignore[union-attr]
    assert federation.held(3).held("arrays").digest == (  # type: ignore[union-attr]
        federation.held(1).held("arrays").digest  # type: ignore[union-attr]
    )
    assert federation.shapes(result.arrays) == federation.family.narrow


@EVERY
def test_one_plan_says_what_two_removals_left_to_a_node_that_missed_both(
    federation: Federation,
) -> None:
    federation.before = {
        2: lambda: federation.inner.online.discard(3),
        5: lambda: federation.inner.online.add(3),
    }
    run, result = federation.run(federation.policy(2, 3), 6)
    (what,) = federation.family.knobs
    what = "share" if what == "channels" else what
    shares = [e[what] for e in federation.events if e["event"] == "channels-removed"]
    assert shares == [0.5**0.5, 0.5]
    assert [e.kind for e in federation.sent(3, 5)] == ["delta"]
    assert federation.shapes(result.arrays) == federation.family.narrow
    assert federation.shapes(federation.held(3).held("arrays").tensors) == federation.family.narrow  # type: ignore[union-attr]
    assert federation.held(3).channels("arrays").coded == run.grid.channels().coded  # type: ignore[union-attr]
    assert len({federation.held(n).held("arrays").digest for n in (1, 2, 3)}) == 1  # type: ignore[union-attr]


@EVERY
@pytest.mark.parametrize("lost", ["memory", "versions", "everything"])
def test_a_node_restarts_over_a_removal(federation: Federation, lost: str) -> None:
    def restart() -> None:
        if lost == "everything":
            shutil.rmtree(federation.store(2))
        elif lost == "versions":
            for path in federation.store(2).rglob("*.model"):
                path.unlink()
        federation.apps[2] = client(federation.store(2), federation.network)

    federation.before = {3: restart}
    federation.run(federation.policy(2), 4)
    kinds = [e.kind for e in federation.sent(2, 3)]
    assert kinds == (["delta"] if lost == "memory" else ["delta", "keyframe"])
    assert federation.shapes(federation.held(2).held("arrays").tensors) == federation.family.narrow  # type: ignore[union-attr]
    assert len({federation.held(n).held("arrays").digest for n in (1, 2, 3)}) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_restarts_from_a_checkpoint_between_two_removals(
    tmp_path: Path, family: str
) -> None:
    half = Federation(tmp_path / "half", family=family)
    two, (what,) = half.policy(2, 4), half.family.knobs
    with pytest.raises(KeyboardInterrupt):
        half.run(two, 6, Interrupt(), folder=tmp_path / "run")
    checkpoint = Checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
    assert checkpoint.channels is not None
    assert getattr(checkpoint.channels.shares, what) == pytest.approx(0.5**0.5)
    if family == "channels":
        assert checkpoint.arrays["0.weight"].shape == (5, 1, 3, 3)
    if family == "heads":  # three of four
        assert checkpoint.arrays["encoder.layers.0.self_attn.in_proj_bias"].shape == (36,)

    again = Federation(tmp_path / "again", family=family)
    again.inner = InProcessGrid(again.apps, 3, run_id=RUN_ID + 1)
    run, result = again.run(two, 3, initial=checkpoint)
    assert again.shapes(result.arrays) == again.family.narrow
    (event,) = [e for e in again.events if e["event"] == "channels-removed"]
    # the fourth of all
    assert (event["round"], event["share" if what == "channels" else what]) == (1, 0.5)
    assert [e.kind for e in again.sent(1, 1)] == ["keyframe"]
    assert again.shapes(again.held(1).held("arrays").tensors) == again.family.narrow  # type: ignore[union-attr]
    assert getattr(run.grid.channels().shares, what) == pytest.approx(0.5)  # type: ignore[union-attr]


def broken() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise RuntimeError("out of memory")

    return app


def breaking(federation: Federation, *rounds: int) -> None:
    """Let no node train in these rounds."""
    whole = dict(federation.apps)
    for number in rounds:
        federation.before[number] = lambda: federation.apps.update(dict.fromkeys(whole, broken()))
        if number + 1 not in rounds:
            federation.before[number + 1] = lambda: federation.apps.update(whole)


def removals(federation: Federation) -> list[tuple[int, float]]:
    found = [e for e in federation.events if e["event"] == "channels-removed"]
    return [(event["round"], event["share"]) for event in found]


@pytest.mark.parametrize(
    ("at", "lost", "removed"),
    [
        ((2,), (2,), [(3, 0.5)]),
        ((2, 3), (2,), [(3, 0.5)]),  # both at once
        ((2, 3), (2, 3), [(4, 0.5)]),
        ((2, 4), (3,), [(2, 0.5**0.5), (4, 0.5)]),
    ],
)
def test_a_removal_due_in_a_round_that_failed_is_made_up_for(
    federation: Federation,
    at: tuple[int, ...],
    lost: tuple[int, ...],
    removed: list[tuple[int, float]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    breaking(federation, *lost)

    def unsaid(*given: Any) -> ChannelPlan:  # a chooser of one's own may say no share
        return replace(module_chooser(network, example)(*given), share=1.0)

    run, result = federation.run(policy(*at), 5, channels=unsaid)
    assert removals(federation) == removed
    assert shapes(result.arrays) == NARROW
    assert run.grid.channels().share == pytest.approx(0.5)  # type: ignore[union-attr]
    assert "of the channels remain, not" not in caplog.text


def test_a_removal_that_is_still_owed_is_told_and_made_after_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    federation = Federation(tmp_path / "one")
    breaking(federation, 2)
    _, result = federation.run(policy(2), 3, folder=tmp_path / "run")
    assert removals(federation) == []  # nothing would have trained what is left
    assert shapes(result.arrays) == WIDE
    assert "100% of the channels remain, not 50%" in caplog.text
    caplog.clear()
    checkpoint = Checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
    again = Federation(tmp_path / "again")
    again.inner = InProcessGrid(again.apps, 3, run_id=RUN_ID + 1)
    _, result = again.run(policy(2), 2, initial=checkpoint)
    assert removals(again) == [(1, 0.5)]
    assert shapes(result.arrays) == NARROW
    assert "of the channels remain, not" not in caplog.text


class Interrupt(FedAvg):
    """Ends the run after its third round, as a crash does."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0)

    def configure_train(self, server_round: int, *rest: Any) -> Any:
        if server_round == 4:
            raise KeyboardInterrupt
        return super().configure_train(server_round, *rest)


def test_what_a_node_dropped_is_narrowed_once_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master = {name: np.array(a) for name, a in network().state_dict().items()}
    first = module_chooser(network, example)(master, 0.5, None)
    second = first.then(module_chooser(network, example)(first.arrays(master), 0.25, first))
    rng = np.random.default_rng(0)
    wide = {n: rng.normal(size=master[n].shape).astype(np.float32) for n in WIDE}
    wide["4.weight\0values"] = wide["4.weight"] + 1
    wide["residual/9.weight"] = wide["9.weight"] + 2  # as a scheme calls its state
    store = NodeStore(tmp_path, 1, 2)

    store.stage("arrays", "aa", wide)
    store.settle(["aa"])  # the residual
    store.stage("arrays", "bb", wide)  # takes it along, and drops as much again

    def name_of(name: str) -> str:
        return name.partition("\0")[0].partition("/")[2] or name.partition("\0")[0]

    def narrowed(plan: Any) -> dict[str, Any]:
        return {n: plan.array(name_of(n), a) for n, a in wide.items()}

    def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
        return found.keys() == wanted.keys() and all(
            np.array_equal(found[n], wanted[n]) for n in wanted
        )

    # killed after the first of two files was narrowed, then told to go on
    write, written = NodeStore._write, []

    def killed(self: Any, path: Path, *rest: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(self, path, *rest)

    monkeypatch.setattr(NodeStore, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        store.remove("arrays", first)
    monkeypatch.undo()
    store.settle((), ["bb"])  # given up, in between: what it took along comes back
    assert same(store.residual("arrays"), wide) or same(store.residual("arrays"), narrowed(first))
    store.remove("arrays", first)
    assert same(store.residual("arrays"), narrowed(first))
    store.remove("arrays", first)  # twice is once
    assert same(store.residual("arrays"), narrowed(first))

    # replies of both times add up to the fewer channels
    store.stage("arrays", "cc", narrowed(first), first)
    store.settle(["cc"])
    store.stage("arrays", "dd", wide)
    (tmp_path / "copy").mkdir()
    store.stage("arrays", "ee", narrowed(first), first)
    store.settle(["dd"])
    store.settle(["ee"])
    doubled = {n: 2 * a for n, a in narrowed(first).items()}
    assert same(store.residual("arrays"), doubled)
    store.remove("arrays", second)
    for name, array in store.residual("arrays").items():
        assert np.array_equal(array, 2 * second.array(name_of(name), wide[name]))


class Remembering(FedAvg):
    """Keeps what nobody finds: a nested list of arrays."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.history: list[list[Any]] = []


OPTIONS: dict[str, Any] = {"fraction_evaluate": 0.0}


@pytest.mark.parametrize(
    "strategy",
    [
        FedAdam(**OPTIONS, eta=0.01),
        FedAvgM(**OPTIONS, server_momentum=0.5),
        FedMedian(**OPTIONS),
        DifferentialPrivacyServerSideFixedClipping(FedAdam(**OPTIONS, eta=0.01), 0.1, 50.0, 3),
        Remembering(),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_a_strategy_goes_on_with_what_remains_of_its_state(
    federation: Federation, strategy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, result = federation.run(policy(1), 3, strategy)
    assert shapes(result.arrays) == NARROW
    inner = getattr(strategy, "strategy", strategy)
    if isinstance(inner, FedAdam):
        assert inner.m_t is not None
        assert shapes(inner.m_t) == NARROW
    said = "arrays of the model by name or in its order are narrowed" in caplog.text
    assert said == isinstance(strategy, Remembering)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_architecture_refuses_the_plan_by_name(tmp_path: Path, family: str) -> None:
    stores, of = {n: tmp_path / f"store-{n}" for n in (1, 2, 3)}, FAMILIES[family]
    apps = {n: client(store, of.network) for n, store in stores.items()}
    federation = Federation(tmp_path, apps, family)
    federation.before = {3: lambda: apps.update({3: client(stores[3], of.other)})}
    federation.run(federation.policy(2), 3)
    (failed,) = federation.events[-2]["nodes"]["failed"]
    assert failed["node"] == "3"
    assert of.refused in failed["reason"]


def test_an_app_of_ones_own_is_told_and_a_loop_of_ones_own_tells(tmp_path: Path) -> None:
    told: list[Any] = []
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        module, plan = network(), current_channels()
        told.append(plan)
        if plan is not None:
            fit_module(module, plan)
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        for parameter in module.parameters():
            parameter.data += 0.01
        content = RecordDict(
            {
                "arrays": ArrayRecord(module.state_dict()),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        return Message(content, reply_to=message)

    grid = CompressedGrid(InProcessGrid(app, 1, run_id=RUN_ID), "balanced", poll_interval=0.01)

    def ask(arrays: ArrayRecord) -> ArrayRecord:
        content = RecordDict({"arrays": arrays})
        (reply,) = grid.send_and_receive([grid.create_message(content, "train", 1, "0")])
        assert not reply.has_error(), reply.error
        found = reply.content["arrays"]
        return ArrayRecord({name: Array(a.numpy()) for name, a in found.items()})

    wide = ask(initial_arrays(network, seed=3)[1])
    master = {name: array.numpy() for name, array in wide.items()}
    plan = module_chooser(network, example)(master, 0.5, None)
    with pytest.raises(PlanError, match="another"):
        grid.remove_channels(initial_arrays(wider, seed=3)[1], plan)
    assert grid.channels() is None
    narrow = grid.remove_channels(wide, plan)
    with pytest.raises(FederationError, match=r"of record 'arrays' have gone.*those of 'other'"):
        grid.remove_channels(wide, plan, key="other")
    assert grid.channels(key="other") is None
    assert shapes(ask(narrow)) == NARROW
    assert shapes(ask(wide)) == NARROW  # handed over whole, it goes as what remains of it
    assert told[0] is None
    assert [found.coded for found in told[1:]] == [plan.coded] * 2
    with pytest.raises(FederationError, match="travel as versions"):
        CompressedGrid(InProcessGrid(app, 1), "dense").remove_channels(wide, plan)


def test_what_cannot_be_is_said_before_anything_is_trained(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FederationError, match=r"nobody says which.*module_chooser"):
        federation.run(policy(2), 4, channels=None)
    with pytest.raises(FederationError, match="after round 4 of 4"):
        federation.run(policy(4), 4)
    with pytest.raises(PlanError, match="does not fit Sequential"):
        federation.run(policy(2), 4, channels=module_chooser(wider, example))
    assert not federation.ledger.entries
    arrays = initial_arrays(network, seed=3)[1]
    grid = CompressedGrid(federation.inner, policy(1), poll_interval=0.01)
    FedAvg(fraction_evaluate=0.0).start(grid, arrays, num_rounds=1)
    assert "No channels will be removed: prunecast.server.Run does that" in caplog.text


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"channels": 0.0, "channels_at": (1,)}, r"channels\) = 0.0: give the share that remains"),
        ({"channels": 0.5}, "say after which rounds"),
        ({"heads": 0.0, "channels_at": (1,)}, r"heads\) = 0.0: give the share that remains"),
        ({"heads": 0.5}, "say after which rounds heads go"),
        ({"heads": 0.5, "channels_at": (3,), "widths": {"a": 0.5}}, r"set .*heads.* = 1, or no wi"),
        ({"heads": 0.5, "channels_at": (3,), "down": "dense", "up": "dense"}, "'lattice'"),
        ({"channels_at": (3,)}, "say which share"),
        ({"channels": 0.5, "channels_at": (3, 2)}, "ascending"),
        ({"channels": 0.5, "channels_at": (0,)}, "rounds of 1 or more"),
        ({"channels": 0.5, "channels_at": ("3",)}, "give a list of rounds"),
        ({"channels": 0.5, "channels_at": (3,), "down": "dense", "up": "dense"}, "'lattice'"),
    ],
)
def test_knobs_that_cannot_be_are_named(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        Policy(**knobs)


def test_heads_are_told_to_those_alone_who_choose_them(federation: Federation) -> None:
    def channels_alone(master: Any, share: float, removed: Any) -> ChannelPlan:
        return module_chooser(Reader, example)(master, share, removed)

    knobs = {"heads": 0.5, "channels": 0.5}
    with pytest.raises(PlanError, match="who chooses knows of channels alone: take module_chooser"):
        federation.run(policy(2, **knobs), 4, channels=channels_alone)
    with pytest.raises(PlanError, match="Sequential has no attention whose heads go"):
        federation.run(policy(2, heads=0.5), 4)
    few = {"heads": 0.1, "channels_at": (1, 2)}  # one of four after the first of these, then none
    federation.network = Reader
    with pytest.raises(PlanError, match=r"leaves none of the 4 heads of 'encoder.layers.0.self_a"):
        federation.run(Policy(**few), 4)
    assert not federation.ledger.entries


@pytest.mark.parametrize("value", [2, "2", "2, 3"])
def test_rounds_come_from_the_run_config(value: int | str) -> None:
    config = {"prunecast.channels": 0.5, "prunecast.channels-at": value}
    expected = (2, 3) if value == "2, 3" else (2,)
    assert Policy.from_run_config(config).channels_at == expected
    with pytest.raises(PolicyError, match="give rounds, such as"):
        Policy.from_run_config({**config, "prunecast.channels-at": "soon"})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_released_of_fewer_channels_is_a_narrow_graph(tmp_path: Path, family: str) -> None:
    federation = Federation(tmp_path, family=family)
    network = federation.network
    repository = Repository.create(tmp_path / "repository", KeyRing.create(tmp_path / "keys"))
    recipe = ReleaseRecipe(module=network, selftest=example().numpy(), cache=tmp_path / "graphs")
    releases = AutomaticReleases(ReleaseRule(every=1), RecipeReleaser(recipe, repository, "narrow"))
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    federation.run(federation.policy(2), 3, releases=releases, folder=tmp_path / "run")
    again = Federation(tmp_path / "again", family=family)
    again.inner = InProcessGrid(again.apps, 3, run_id=RUN_ID + 1)
    releases = AutomaticReleases(ReleaseRule(every=1), RecipeReleaser(recipe, repository, "narrow"))
    again.run(federation.policy(2), 1, releases=releases, initial=Checkpoint.load(checkpoint))
    with ReleaseServer(repository.path) as server:
        config = AgentConfig(tmp_path / "device", server.url, "narrow", repository.trusted_root())
        with Agent(config) as agent:
            assert agent.update_once().outcome == "updated"
            model = repository.model(agent.model.manifest)
            assert federation.shapes(model.tensors) == federation.family.narrow
            module = fit_module(network(), Checkpoint.load(checkpoint).channels).eval()  # type: ignore[arg-type]
            module.load_state_dict({n: torch.tensor(a) for n, a in model.arrays().items()})
            images = np.random.default_rng(1).normal(size=(5, 1, 8, 8)).astype(np.float32)
            (signature,) = agent.model.manifest.inputs
            (found,) = agent.model.run({signature.name: images}).values()
            with torch.inference_mode():
                assert np.abs(found - module(torch.from_numpy(images)).numpy()).max() < 1e-4
    manifests = [repository.show("narrow", number) for number in (1, 2, 3, 4)]
    # from the whole model to a part of it a patch holds the tensors that changed their shape
    bases = [[], [1], [1, 2], [1, 2, 3]]
    if family == "layers":  # and none where names are missing: a device takes that release whole
        bases = [[], [], [2], [2, 3]]
    assert [[p.base_version for p in m.patches] for m in manifests] == bases
    graphs = [manifest.files["model.onnx"] for manifest in manifests]
    assert graphs[0] != graphs[1] == graphs[2] == graphs[3]

    graph = replace(recipe, module=None, graph=recipe.prepared().graph)
    releases = AutomaticReleases(ReleaseRule(every=1), RecipeReleaser(graph, repository, "narrow"))
    with pytest.raises(ReleaseRuleError, match=r"leave out release\.graph"):
        federation.run(federation.policy(1), 3, releases=releases)


def test_the_final_model_is_released_with_the_plan_beside_it(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    federation.run(policy(1), 2, output=tmp_path / "final.model")
    np.savez(tmp_path / "selftest.npz", input=example().numpy())
    Repository.create(tmp_path / "repository", KeyRing.create(tmp_path / "keys"))
    create = [
        *("release", "create", str(tmp_path / "repository"), "narrow"),
        *("--keys", str(tmp_path / "keys"), "--model", str(tmp_path / "final.model")),
        *("--module", f"{__name__}:network", "--selftest", str(tmp_path / "selftest.npz")),
        *("--graph-cache", str(tmp_path / "graphs")),
    ]
    result = CliRunner().invoke(app, create)
    assert result.exit_code == 0, result.output
    (tmp_path / "final.channels").unlink()
    result = CliRunner().invoke(app, create)
    assert result.exit_code != 0
    (tmp_path / "final.channels").write_text("no plan")
    result = CliRunner().invoke(app, create)
    assert result.exit_code == 2
    assert "the plan of channels is damaged" in " ".join(result.output.split())


def spread(module: nn.Module, context: Context) -> dict[str, float]:
    return {"first": float(module[0].weight.shape[0])}  # type: ignore[index, union-attr]


def test_the_ready_server_app_goes_on_from_fewer_channels(federation: Federation) -> None:
    here = __name__
    folder = federation.folder / "run"
    config: dict[str, Any] = {
        "model": f"{here}:network",
        "example": f"{here}:example",
        "evaluate": f"{here}:spread",
        "num-server-rounds": 3,
        "folder": str(folder),
        "prunecast.channels": 0.5,
        "prunecast.channels-at": 1,
    }
    server_app.app(federation.inner, Context(RUN_ID, 0, {}, RecordDict(), config))
    checkpoint = Checkpoint.load(folder / "checkpoint.safetensors")
    assert shapes(checkpoint.arrays) == NARROW
    again = {**config, "resume": str(folder / "checkpoint.safetensors"), "num-server-rounds": 1}
    apps = {n: client(federation.folder / f"again-{n}") for n in (1, 2)}
    other = InProcessGrid(apps, 2, run_id=RUN_ID + 1)
    server_app.app(other, Context(RUN_ID + 1, 0, {}, RecordDict(), again))
    assert shapes(load_model(folder / "final.model").tensors) == NARROW


def test_a_resumed_server_app_exports_no_module_with_all_channels(federation: Federation) -> None:
    folder = federation.folder
    repository = Repository.create(folder / "repository", KeyRing.create(folder / "keys"))
    np.savez(folder / "selftest.npz", input=example().numpy())
    config: dict[str, Any] = {
        "model": f"{__name__}:network",
        "example": f"{__name__}:example",
        "num-server-rounds": 2,
        "folder": str(folder / "run"),
        "prunecast.channels": 0.5,
        "prunecast.channels-at": 1,
        "release.repository": str(folder / "repository"),
        "release.keys": str(folder / "keys"),
        "release.name": "narrow",
        "release.selftest": str(folder / "selftest.npz"),
        "release.graph-cache": str(folder / "graphs"),
        "release.every": 1,
    }
    server_app.app(federation.inner, Context(RUN_ID, 0, {}, RecordDict(), config))
    again = {
        **config,
        "resume": str(folder / "run" / "checkpoint.safetensors"),
        "num-server-rounds": 1,
        "release.graph-cache": str(folder / "again"),
    }
    apps = {n: client(folder / f"again-{n}") for n in (1, 2)}
    other = InProcessGrid(apps, 2, run_id=RUN_ID + 1)
    server_app.app(other, Context(RUN_ID + 1, 0, {}, RecordDict(), again))
    both, one = (list((folder / name).iterdir()) for name in ("graphs", "again"))
    assert len(both) == 2 * len(one) > 0
    manifests = [repository.show("narrow", n) for n in (1, 2, 3)]
    graphs = [manifest.files["model.onnx"] for manifest in manifests]
    assert graphs[0] == graphs[1] == graphs[2]


@pytest.mark.parametrize(
    ("criterion", "masks"),
    [("taylor", "dpf"), ("fisher", "held"), ("movement", "rigl"), ("activation", "dpf")],
)
def test_channels_go_amid_the_pruning_of_weights(
    federation: Federation, criterion: str, masks: str
) -> None:
    hybrid = policy(
        3,
        sparsity=0.5,
        pruning_begin=1,
        pruning_end=5,
        pruning_min_size=32,
        pruning_criterion=criterion,
        pruning_masks=masks,
    )
    federation.run(hybrid, 6, output=federation.folder / "final.model")
    published = load_model(federation.folder / "final.model")
    assert shapes(published.tensors) == NARROW
    assert published.sparsity() >= 0.5 - 0.02
    assert len({federation.held(n).held("arrays").digest for n in (1, 2, 3)}) == 1  # type: ignore[union-attr]
    assert not [e for e in federation.ledger.entries if e.kind in ("error", "base-missing")]


@pytest.mark.parametrize("federation", ["heads", "layers"], indirect=True)
@pytest.mark.parametrize(
    ("criterion", "masks"), [("taylor", "held"), ("movement", "rigl"), ("activation", "dpf")]
)
def test_heads_and_layers_go_amid_the_pruning_of_weights(
    federation: Federation, criterion: str, masks: str
) -> None:
    knobs = {"sparsity": 0.5, "pruning_begin": 1, "pruning_end": 5, "pruning_min_size": 32}
    hybrid = federation.policy(3, pruning_criterion=criterion, pruning_masks=masks, **knobs)
    federation.run(hybrid, 6, output=federation.folder / "final.model")
    published = load_model(federation.folder / "final.model")
    assert federation.shapes(published.tensors) == federation.family.narrow
    assert published.sparsity() >= 0.5 - 0.02
    assert len({federation.held(n).held("arrays").digest for n in (1, 2, 3)}) == 1  # type: ignore[union-attr]
    assert not [e for e in federation.ledger.entries if e.kind in ("error", "base-missing")]


def test_what_a_strategy_keeps_of_a_layer_that_went_is_dropped() -> None:
    arrays = {name: tensor.numpy() for name, tensor in Reader().state_dict().items()}
    shapes_before = {name: array.shape for name, array in arrays.items()}
    plan = ChannelPlan({}, gone=("encoder.layers.1",), layers_share=0.5)
    left = [name for name in arrays if not name.startswith("encoder.layers.1.")]
    assert 0 < len(left) < len(arrays)
    strategy = SimpleNamespace(
        moments={**arrays, "unit": "m"},
        momentum=list(arrays.values()),
        record=ArrayRecord({name: Array(array) for name, array in arrays.items()}),
        rates={"head.weight": 0.1},
    )
    narrow_strategy(strategy, plan, shapes_before)
    assert list(strategy.moments) == [*left, "unit"]
    assert [m.shape for m in strategy.momentum] == [shapes_before[name] for name in left]
    assert list(strategy.record) == left
    assert strategy.rates == {"head.weight": 0.1}
