"""A run that is killed and resumed ends in the arrays of one that was not, bit for bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Result
from flwr.supercore import heartbeat
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.retry import retry_invoker

from prunecast.client.training import (
    compression_mod,
    contribute_statistics,
    wanted_statistics,
)
from prunecast.common.files import StorageError
from prunecast.compression.flower.envelope import unpack
from prunecast.compression.pruning.statistics import (
    RECALIBRATE,
    RUNNING_STATISTICS,
    statistic_shape,
)
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.versions import load_model
from prunecast.server.federation import (
    Checkpoint,
    CheckpointError,
    FederationError,
    Ledger,
    Policy,
    Run,
    read_events,
)
from prunecast.server.federation import run as run_module
from prunecast.server.federation.state.checkpoints import save_newest
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import (
    initial_arrays,
    local_step,
    make_app,
    seed_of,
    to_arrays,
    to_record,
)

ROUNDS, NODES = 5, 3


class Killed(BaseException):
    """The process is gone."""


class Job:
    """Runs of Flower one after the other, as a supervisor starts them, in one folder."""

    def __init__(
        self,
        folder: Path,
        policy: Policy | str = "balanced",
        strategy: Callable[[], Any] = FedAvg,
        *,
        rounds: int = ROUNDS,
        app: Callable[[Path], Any] = make_app,
        widths: dict[int, str] | None = None,
        **options: Any,
    ) -> None:
        self.folder, self.store = folder / "run", folder / "store"
        self.policy, self.strategy, self.rounds, self.app = policy, strategy, rounds, app
        self.widths = widths or {}
        self.options = options
        self.numbers = itertools.count(1)
        self.last: Run | None = None

    def run(self, kill: Callable[[str, Any], None] = lambda what, of: None) -> Result:
        """One run of Flower, in a process of its own as it were."""
        inner = InProcessGrid(self.app(self.store), NODES, run_id=next(self.numbers))
        for node, width in self.widths.items():
            inner._contexts[node].node_config["prunecast-width"] = width

        def reply(message: Message) -> Message:
            kill("reply", message)
            return message

        inner.on_reply = reply
        run = Run(
            inner,
            self.strategy(),
            policy=self.policy,
            folder=self.folder,
            evaluate_fn=measure,
            on_event=lambda event: kill(event["event"], event),
            resume="auto",
            seed=3,
            **self.options,
        )
        self.last = run
        return run.start(to_record(initial_arrays()), num_rounds=self.rounds)

    def killed(self, at: Callable[[str, Any], bool]) -> None:
        """A run that is killed at a place."""

        def kill(what: str, of: Any) -> None:
            if at(what, of):
                raise Killed

        with pytest.raises(Killed):
            self.run(kill)

    def keyframes(self) -> int:
        path = self.folder / "ledger.jsonl"
        return sum(e.kind == "keyframe" for e in Ledger.read(path, whole=False))

    @property
    def digest(self) -> bytes:
        return load_model(self.folder / "final.model").digest


def measure(server_round: int, published: ArrayRecord) -> MetricRecord:
    """An accuracy that grows, and a random draw as a careless app makes one."""
    np.random.random()
    size = float(np.abs(to_arrays(published)["fc.weight"]).mean())
    return MetricRecord({"accuracy": 1 - 2.0**-server_round + 1e-3 * size})


def begins(number: int) -> Callable[[str, Any], bool]:
    return lambda what, of: what == "round-begun" and of["round"] == number


def ends(number: int) -> Callable[[str, Any], bool]:
    """After what the round arrived at was told, and before its checkpoint."""
    return lambda what, of: what == "round-finished" and of["round"] == number


def answers(number: int) -> Callable[[str, Any], bool]:
    """When so many replies have come, counted over the whole run of Flower."""
    counter = itertools.count(1)
    return lambda what, of: what == "reply" and next(counter) == number


def same(one: Result, other: Result) -> None:
    """Arrays and metrics of every round."""
    first, second = to_arrays(one.arrays), to_arrays(other.arrays)
    assert list(first) == list(second)
    for name, array in first.items():
        assert array.dtype == second[name].dtype
        assert array.tobytes() == second[name].tobytes(), name
    for kind in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        mine, theirs = getattr(one, kind), getattr(other, kind)
        assert {n: dict(m) for n, m in mine.items()} == {n: dict(m) for n, m in theirs.items()}
    assert one.evaluate_metrics_serverapp == other.evaluate_metrics_serverapp


STRATEGIES = {
    "fedavg": FedAvg,
    "fedavg of some": lambda: FedAvg(fraction_train=0.67, min_train_nodes=2),
    "fedadam": lambda: FedAdam(eta=0.01, beta_1=0.9, beta_2=0.99),
    "fedyogi": lambda: FedYogi(eta=0.01, beta_1=0.9, beta_2=0.99),
    "fedadagrad": lambda: FedAdagrad(eta=0.01),
    "fedavgm": lambda: FedAvgM(server_learning_rate=0.9, server_momentum=0.8),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_killed_three_times_ends_in_the_same_arrays(tmp_path: Path, name: str) -> None:
    whole, parted = (Job(tmp_path / w, strategy=STRATEGIES[name]) for w in ("whole", "parted"))
    expected = whole.run()
    parted.killed(begins(2))
    parted.killed(ends(3))  # between what was reached and its checkpoint
    parted.killed(answers(4))
    same(parted.run(), expected)
    assert parted.digest == whole.digest


def contributing(store: Path) -> ClientApp:
    """Trains, and answers whatever the server asks for beside that, by node and round alone."""
    app = ClientApp(mods=[compression_mod(store)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = to_arrays(message.content["arrays"])
        rng = np.random.default_rng(seed_of(message, context))
        for name in wanted_statistics():
            statistic = name.partition("@")[0]
            found = {n: rng.normal(size=statistic_shape(statistic, a.shape)) ** 3
                     for n, a in arrays.items() if a.ndim > 1}  # fmt: skip
            contribute_statistics(name, found)
        content = RecordDict({"arrays": to_record(local_step(arrays, seed_of(message, context)))})
        content["metrics"] = MetricRecord({"num-examples": context.node_id * 10})
        return Message(content, reply_to=message)

    @app.query(RECALIBRATE)
    def recalibrate(message: Message, context: Context) -> Message:
        arrays = to_arrays(message.content["arrays"])
        found = {n: a + np.float32(0.1) for n, a in arrays.items() if "running" in n}
        content = RecordDict({RUNNING_STATISTICS: to_record(found)})
        content["metrics"] = MetricRecord({"num-examples": context.node_id})
        return Message(content, reply_to=message)

    return app


def some(master: Any, share: float, removed: ChannelPlan | None) -> ChannelPlan:
    """The rows of the linear layer that are largest now."""
    rows = np.abs(master["fc.weight"]).sum(axis=1)
    before = 1.0 if removed is None else removed.share
    kept = np.zeros(len(rows), bool)
    kept[np.argsort(rows)[-max(1, round(len(rows) * share / before)) :]] = True
    return ChannelPlan({"fc.weight": (kept, None), "fc.bias": (kept,)}, share=share / before)


def leading(share: float) -> ChannelPlan:
    kept = np.arange(64) < share * 64
    return ChannelPlan({"fc.weight": (kept, None), "fc.bias": (kept,)}, share=share)


def pruned(**knobs: Any) -> Policy:
    return Policy(**{"sparsity": 0.8, "pruning_min_size": 1000, "pruning_begin": 1,
                     "pruning_end": 4, **knobs})  # fmt: skip


POLICIES: dict[str, tuple[Policy, dict[str, Any]]] = {
    "dpf": (pruned(), {}),
    "rigl": (pruned(pruning_schedule="static", pruning_masks="rigl", pruning_interval=2,
                    pruning_end=10), {}),
    "held, rewound": (pruned(pruning_schedule="iterative", pruning_rewind=1, pruning_steps=2), {}),
    "fisher": (pruned(pruning_criterion="fisher"), {}),
    "movement": (pruned(pruning_criterion="movement"), {}),
    "taylor of blocks": (pruned(pruning_criterion="taylor", pruning_pattern="4x4"), {}),
    "by learning": (pruned(pruning_end=0), {"rounds": 9}),
    "automatic": (pruned(pruning_schedule="automatic", pruning_end=8, pruning_patience=1,
                         pruning_knobs=("sparsity", "lattice")), {"rounds": 9}),
    "automatic channels": (pruned(pruning_schedule="automatic", pruning_end=7, pruning_patience=1,
                                  pruning_knobs=("channels", "sparsity")),
                           {"rounds": 9, "channels": some}),
    "channels": (Policy(channels=0.5, channels_at=(2, 3)),
                 {"channels": some, "strategy": STRATEGIES["fedadam"]}),
    "widths": (Policy(widths={"small": 0.25}), {"slices": leading, "widths": {2: "small"}}),
    "recalibrated": (pruned(pruning_recalibrate="always"), {}),
    "scheme up": (Policy(up="stc"), {"strategy": STRATEGIES["fedavgm"]}),
    "random scheme up": (Policy(up="qsgd"), {}),
    "schemes": (Policy(down="stc", up="stc"), {}),
    "lossless": (Policy.preset("lossless"), {}),
    "dense": (Policy.preset("dense"), {"strategy": STRATEGIES["fedadam"]}),
    "byte budget": (Policy(budget_round=60_000), {}),
    "lazy": (Policy(lazy=0.5), {}),
    "without feedback": (Policy(error_feedback=False), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_whatever_a_policy_keeps_goes_on(tmp_path: Path, name: str) -> None:
    policy, options = POLICIES[name]
    whole, parted = (
        Job(tmp_path / where, policy, app=contributing, **options) for where in ("whole", "parted")
    )
    expected = whole.run()
    parted.killed(ends(3))
    parted.killed(answers(2))
    if parted.rounds > ROUNDS:
        parted.killed(ends(6))
        parted.killed(begins(8))
    same(parted.run(), expected)
    if policy.down != "dense":
        assert parted.digest == whole.digest


def test_wherever_a_run_is_killed(tmp_path: Path) -> None:
    """After every reply and every event of two rounds: each time two runs of Flower in all."""
    whole = Job(tmp_path / "whole", rounds=2)
    expected = whole.run()
    for number in range(1, 13):  # three replies to train and three to evaluate, twice
        parted = Job(tmp_path / f"reply-{number}", rounds=2)
        parted.killed(answers(number))
        same(parted.run(), expected)
        assert parted.digest == whole.digest
    for number in (1, 2):
        for at in (begins, ends):
            parted = Job(tmp_path / f"{at.__name__}-{number}", rounds=2)
            parted.killed(at(number))
            same(parted.run(), expected)


def test_nodes_go_on_with_what_they_hold(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.killed(begins(3))
    job.run()
    assert job.keyframes() == 0
    begin, again, *_ = read_events(job.folder / "events.jsonl", whole=False)
    assert (begin["resumed"], begin["from_round"], begin["rounds"]) == (True, 2, ROUNDS)
    assert (again["event"], again["round"]) == ("round-begun", 3)


def test_events_and_ledger_of_a_resumed_run_are_read_as_those_of_one(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.killed(ends(2))
    job.killed(begins(3))
    job.run()
    events, ledger = job.folder / "events.jsonl", job.folder / "ledger.jsonl"
    found = list(read_events(events))
    assert sum("schema" in event for event in found) == 1
    kinds = [(e["event"], e["round"]) for e in found if "round" in e]
    expected = [("round-finished", 0)]
    for number in range(1, ROUNDS + 1):
        expected += [("round-begun", number), ("round-finished", number)]
    assert kinds == expected  # rounds that were cut off are told once
    spent = [e["bytes_up"] for e in found if e["event"] == "round-finished"]
    assert spent == sorted(spent)
    entries = list(Ledger.read(ledger))
    # what was sent twice was spent twice
    assert sum(e.round == 2 and e.direction == "down" for e in entries) > 4 * NODES
    assert sum(e.payload_bytes for e in entries if e.direction == "up") == spent[-1]
    assert {e.round for e in Ledger.read(ledger, whole=False)} == {3, 4, 5}


def test_how_long_flower_waits_decides_not_who_is_sampled(tmp_path: Path) -> None:
    Job(tmp_path, rounds=1).run()
    state = random.getstate()
    retry_invoker.full_jitter(2.0)
    heartbeat.random.uniform(0.1, 0.2)
    inflatable_utils.random.uniform(0.1, 0.2)
    assert random.getstate() == state


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    job = Job(tmp_path, strategy=STRATEGIES["fedadam"])
    expected = job.run()
    before = job.digest
    files = {path.name for path in job.folder.iterdir()}
    assert files == {"ledger.jsonl", "events.jsonl", "checkpoint.safetensors", "final.model"}
    same(job.run(), expected)
    assert job.digest == before
    assert not list(Ledger.read(job.folder / "ledger.jsonl", whole=False))
    job.rounds += 1  # and one that is to have more rounds goes on
    assert len(job.run().train_metrics_clientapp) == ROUNDS + 1


@pytest.mark.parametrize("damage", ["cut", "one bit", "empty"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, job = Job(tmp_path / "whole"), Job(tmp_path / "job")
    expected = whole.run()
    job.killed(begins(4))
    path = job.folder / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[-100] ^= 1
    path.write_bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(damage, len(data))])
    result = job.run()
    assert "is not a usable checkpoint" in caplog.text
    assert "Resumed after round 2 of 5" in caplog.text
    assert len(result.train_metrics_clientapp) == ROUNDS
    for name, array in to_arrays(result.arrays).items():  # sound, if not exact
        assert np.abs(array - to_arrays(expected.arrays)[name]).max() < 0.1

    for file in job.folder.glob("checkpoint*"):
        file.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="not a usable checkpoint"):
        job.run()


def test_an_earlier_checkpoint_knows_of_the_attempts_since(tmp_path: Path) -> None:
    """Else nodes take the run that goes on from it for one that is over, and answer nothing."""
    job = Job(tmp_path / "job")
    job.killed(ends(3))
    job.killed(begins(3))
    job.killed(answers(2))
    (job.folder / "checkpoint.safetensors").write_bytes(b"damaged")
    assert len(job.run().train_metrics_clientapp) == ROUNDS
    assert not [e for e in Ledger.read(job.folder / "ledger.jsonl", whole=False) if e.reason]


def test_nodes_are_not_told_that_a_checkpoint_has_what_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = Job(tmp_path / "whole"), Job(tmp_path / "parted")
    expected = whole.run()

    def full(checkpoint: Any, path: Path, keep: int, *, instead: bool = False) -> None:
        if checkpoint.state["run"]["round"] > 2:
            raise StorageError("the disk is full")
        save_newest(checkpoint, path, keep, instead=instead)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_newest", full)
        parted.killed(begins(5))
    same(parted.run(), expected)


def test_what_would_not_go_on_as_it_was_is_refused(tmp_path: Path) -> None:
    job = Job(tmp_path, job="digits")
    job.killed(begins(3))
    for change, told in (
        ({"policy": "small"}, r"another policy \(sparsity = 0.0, now 0.8 and others\)"),
        ({"strategy": FedAvgM}, "strategy FedAvg, and FedAvgM does not"),
        ({"options": {"job": "letters"}}, "is of job 'digits'"),
    ):
        other = Job(tmp_path, job="digits")
        vars(other).update(change)
        with pytest.raises(CheckpointError, match=told):
            other.run()
    with pytest.raises(FederationError, match="needs the folder"):
        Run(InProcessGrid(make_app(tmp_path), 2), FedAvg(), resume="auto").start(to_record({}))
    with pytest.raises(FederationError, match="resume = 'always'"):
        Run(InProcessGrid(make_app(tmp_path), 2), FedAvg(), resume="always").start(to_record({}))
    grid = InProcessGrid(make_app(tmp_path / "store"), 2, run_id=9)
    run = Run(grid, FedAvg(), folder=job.folder, resume="auto")
    with pytest.raises(CheckpointError, match="is of another model"):
        run.start(to_record({"w": np.zeros((3, 4), np.float32)}), num_rounds=ROUNDS)
    assert len(job.run().train_metrics_clientapp) == ROUNDS


class Own(FedAvg):
    """Keeps what no checkpoint of ours can know, and what it can."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: dict[int, set[int]] = {}
        self.generator = np.random.default_rng(8)
        self.drawn: list[float] = []
        self.helper = Killed("something of a class of its own")

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        self.seen[server_round] = {reply.metadata.src_node_id for reply in replies}
        self.drawn.append(float(self.generator.random()))
        return super().aggregate_train(server_round, replies)


class Giving(Own):
    """Says itself what its state is."""

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "generator": self.generator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn, self.generator = state["drawn"], state["generator"]


def test_a_strategy_of_ones_own_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jobs = {kind: (Job(tmp_path / f"{kind.__name__}-whole", strategy=kind),
                   Job(tmp_path / f"{kind.__name__}-parted", strategy=kind))
            for kind in (Own, Giving)}  # fmt: skip
    for kind, (whole, parted) in jobs.items():
        caplog.clear()
        expected = whole.run()
        parted.killed(begins(3))
        same(parted.run(), expected)
        assert whole.last is not None
        assert parted.last is not None
        one, other = whole.last.strategy, parted.last.strategy
        assert other.drawn == one.drawn
        if kind is Own:
            assert other.seen == one.seen
            said = [r.message for r in caplog.records if "cannot hold" in r.message]
            assert len(said) == 3  # once in each run of Flower
            assert "'helper' of Own (" in said[0]
            assert "test_resuming.Killed)" in said[0]
        else:
            assert "cannot hold" not in caplog.text


class Decaying(FedAvg):
    """Changes the config that it is given, as Flower's documentation does."""

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        config["lr"] = float(config.get("lr", 1.0)) * 0.5
        return super().configure_train(server_round, arrays, config, grid)


def test_a_strategy_that_changes_what_it_sends_goes_on(tmp_path: Path) -> None:
    rates: list[float] = []

    def app(store: Path) -> Any:
        client = make_app(store)

        def watched(message: Message, context: Context) -> Message:
            if message.metadata.message_type == "train":
                rates.append(unpack(message.content)["config"]["lr"])
            return client(message, context)

        return watched

    job = Job(tmp_path, strategy=Decaying, app=app)
    job.killed(begins(3))
    job.run()
    assert rates == [0.5**number for number in range(1, ROUNDS + 1) for _ in range(NODES)]


def test_explicit_weights_begin_a_run_of_their_own_and_nodes_go_on(tmp_path: Path) -> None:
    job = Job(tmp_path, job="digits")
    job.run()
    inner = InProcessGrid(make_app(job.store), NODES, run_id=77)
    run = Run(inner, FedAvg(), folder=tmp_path / "later", job="digits")
    result = run.start(Checkpoint.load(job.folder / "checkpoint.safetensors"), num_rounds=2)
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    kinds = [e.kind for e in Ledger.read(tmp_path / "later" / "ledger.jsonl")]
    assert "keyframe" not in kinds
    assert "base-missing" not in kinds
