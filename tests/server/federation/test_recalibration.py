"""Running statistics of BatchNorm, estimated anew on what nodes were sent pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from torch import nn

from prunecast.client import recalibrate
from prunecast.client.training import compression_mod
from prunecast.client.training.client_app import (
    LocalTraining,
    build_client_app,
    running_statistics_reply,
)
from prunecast.client.training.trainer import TensorBatches
from prunecast.compression.pruning.statistics import RUNNING_STATISTICS
from prunecast.compression.versions import is_statistic
from prunecast.server.federation import (
    Checkpoint,
    FederationError,
    Ledger,
    Policy,
    PolicyError,
    Run,
    read_events,
)
from prunecast.server.federation.shrinking.choosing import module_chooser
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID, local_step, make_app, seed_of, to_arrays, to_record

NODES, ROUNDS, EVENT = 3, 4, 2
ONE_SHOT = {"sparsity": 0.9, "pruning_schedule": "one-shot", "pruning_begin": EVENT,
            "pruning_end": EVENT + 1, "pruning_min_size": 1}  # fmt: skip


def network(norm: bool = True) -> nn.Module:
    torch.manual_seed(3)
    middle = nn.BatchNorm1d(24) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(16, 24), middle, nn.ReLU(), nn.Linear(24, 2))


def examples_of(node: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(node)
    inputs = torch.randn(40, 16, generator=generator) * 2 + 1
    return inputs, (inputs[:, 0] > 1).long()


def data(context: Context) -> tuple[TensorBatches, None]:
    inputs, targets = examples_of(int(context.node_config["partition-id"]))
    return TensorBatches(inputs, targets, batch_size=20, shuffle=True), None


class Federation:
    """A run of the ready ClientApp, with what it published after every round."""

    def __init__(self, tmp_path: Path, app: ClientApp | None = None, **knobs: Any) -> None:
        if app is None:
            app = build_client_app(
                lambda context: network(), data, LocalTraining(learning_rate=0.02, device="cpu"),
                mods=[compression_mod(tmp_path / "store")],
            )  # fmt: skip
        self.folder, self.published = tmp_path / "run", []
        inner = InProcessGrid(app, NODES, run_id=RUN_ID)
        self.run = Run(
            inner, FedAvg(fraction_evaluate=0.0, min_train_nodes=NODES), policy=Policy(**knobs),
            folder=self.folder, evaluate_fn=self._measure,
            channels=module_chooser(network, lambda: torch.ones(2, 16)),
        )  # fmt: skip

    def _measure(self, server_round: int, received: ArrayRecord) -> None:
        self.published.append(to_arrays(received))

    def start(self, rounds: int = ROUNDS) -> Any:
        self.result = self.run.start(ArrayRecord(network().state_dict()), num_rounds=rounds)
        return self.result

    @property
    def events(self) -> list[dict[str, Any]]:
        return [
            e for e in read_events(self.folder / "events.jsonl") if e["event"] == "recalibrated"
        ]


def expected(published: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The mean over nodes of the statistics that the published weights have on their data."""
    found = []
    for node in range(NODES):
        module = network()
        if (width := len(published["0.bias"])) != 24:
            module[0], module[1] = nn.Linear(16, width), nn.BatchNorm1d(width)
            module[3] = nn.Linear(width, 2)
        module.load_state_dict({n: torch.from_numpy(np.array(a)) for n, a in published.items()})
        recalibrate(module, TensorBatches(*examples_of(node), batch_size=20))
        found.append({n: t.numpy() for n, t in module.state_dict().items() if is_statistic(n)})
    return {name: np.mean([f[name] for f in found], axis=0) for name in found[0]}


@pytest.mark.parametrize("when", ["never", "events", "always"])
def test_the_version_of_a_pruning_event_has_statistics_of_its_own(tmp_path: Path, when: str):
    federation = Federation(tmp_path, pruning_recalibrate=when, **ONE_SHOT)
    federation.start()
    rounds = {"never": [], "events": [EVENT], "always": [1, 2, 3, 4]}[when]
    assert [e["round"] for e in federation.events] == rounds
    assert all((e["nodes"], e["failures"], e["examples"]) == (NODES, 0, 120.0)
               for e in federation.events)  # fmt: skip
    pruned = federation.published[EVENT]
    assert (pruned["0.weight"] == 0).mean() > 0.8
    for name, array in expected(pruned).items():
        near = np.allclose(pruned[name], array, rtol=0.03, atol=0.05)
        assert near == (when != "never"), name
    types = {e.message_type for e in Ledger.read(federation.folder / "ledger.jsonl")}
    assert ("query.recalibrate" in types) == (when != "never")


def test_only_statistics_differ_and_the_next_round_trains_them(tmp_path: Path) -> None:
    found = {}
    for when in ("never", "events"):
        federation = Federation(tmp_path / when, pruning_recalibrate=when, **ONE_SHOT)
        result = federation.start(EVENT)
        found[when] = federation.published[EVENT]
        saved = Checkpoint.load(federation.folder / "checkpoint.safetensors").arrays
        for name, array in to_arrays(result.arrays).items():
            assert saved[name].tobytes() == array.tobytes(), name
    for name, array in found["never"].items():
        assert (array.tobytes() == found["events"][name].tobytes()) != is_statistic(name), name


def test_fewer_channels_are_an_event_too(tmp_path: Path) -> None:
    federation = Federation(
        tmp_path, pruning_recalibrate="events", channels=0.5, channels_at=(EVENT,)
    )
    federation.start()
    assert [e["round"] for e in federation.events] == [EVENT]
    narrow = federation.published[EVENT]
    assert narrow["1.running_mean"].shape == (12,)
    for name, array in expected(narrow).items():
        assert np.allclose(narrow[name], array, rtol=0.03, atol=0.05), name


def test_without_batch_norm_nothing_is_asked(tmp_path: Path) -> None:
    app = build_client_app(
        lambda context: network(norm=False), data, LocalTraining(device="cpu"),
        mods=[compression_mod(tmp_path / "store")],
    )  # fmt: skip
    run = Run(
        InProcessGrid(app, NODES, run_id=RUN_ID), FedAvg(fraction_evaluate=0.0),
        policy=Policy(pruning_recalibrate="always", **ONE_SHOT),
    )  # fmt: skip
    run.start(ArrayRecord(network(norm=False).state_dict()), num_rounds=EVENT)
    assert {e.message_type for e in run.grid.ledger.entries} == {"train"}


def own_app(tmp_path: Path, answer: Any = None) -> ClientApp:
    """Moves weights somewhere, and answers the query as it is told, or has no function for it."""
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def _(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 40})
        moved = local_step(to_arrays(message.content["arrays"]), seed_of(message, context))
        content = RecordDict({"arrays": to_record(moved), "metrics": metrics})
        return Message(content, reply_to=message)

    if answer is not None:
        app.query("recalibrate")(answer)
    return app


HOSTILE = {
    "not finite": lambda state: state["1.running_mean"].fill_(float("nan")),
    "too large": lambda state: state.update(
        {"1.running_mean": torch.full_like(state["1.running_mean"], 1e300, dtype=torch.float64)}
    ),
    "below zero": lambda state: state["1.running_var"].fill_(-1.0),
    "another shape": lambda state: state.update({"1.running_mean": torch.zeros(3)}),
    "missing": lambda state: state.pop("1.running_var"),
}


@pytest.mark.parametrize("what", [*HOSTILE, "no weight"])
def test_answers_that_cannot_be_meant_count_for_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    def answer(message: Message, context: Context) -> Message:
        state = message.content["arrays"].to_torch_state_dict()
        state["1.running_mean"].fill_(2.0)
        odd = context.node_id == 2
        if odd and what in HOSTILE:
            HOSTILE[what](state)
        examples = 0 if odd and what == "no weight" else 40
        reply = running_statistics_reply(message, state, examples)
        assert all(map(is_statistic, reply.content[RUNNING_STATISTICS]))
        return reply

    app = own_app(tmp_path, answer)
    federation = Federation(tmp_path, app, pruning_recalibrate="events", **ONE_SHOT)
    federation.start(EVENT)
    [event] = federation.events
    assert (event["nodes"], event["failures"], event["examples"]) == (2, 1, 80.0)
    assert np.allclose(federation.published[EVENT]["1.running_mean"], 2.0, rtol=0.02)
    assert caplog.text.count("Not every node estimates running statistics anew") == 1


def test_apps_that_know_no_such_query_are_left_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(
        InProcessGrid(own_app(tmp_path), NODES, run_id=RUN_ID), FedAvg(fraction_evaluate=0.0),
        policy=Policy(pruning_recalibrate="always"), stop_on_failure=True,
    )  # fmt: skip
    run.start(ArrayRecord(network().state_dict()), num_rounds=2)
    assert caplog.text.count("Not every node estimates running statistics anew") == 1
    assert "an app of your own answers query 'recalibrate'" in caplog.text


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"pruning-recalibrate.*'never' or 'events' or 'always'"):
        Policy(pruning_recalibrate="sometimes")
    with pytest.raises(PolicyError, match=r"pruning-recalibrate.*it needs prunecast.down ="):
        Policy.preset("dense", pruning_recalibrate="events")
    with pytest.raises(PolicyError, match=r"pruning-recalibrate.*leave out prunecast.widths"):
        Policy(pruning_recalibrate="events", widths={"phone": 0.5})
    private = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, NODES)
    wrapping = FedAvg()
    wrapping.inner = private  # type: ignore[attr-defined]
    inner = InProcessGrid(make_app(tmp_path / "store"), NODES, run_id=RUN_ID)
    for strategy in (private, wrapping):
        policy = Policy(pruning_recalibrate="events")
        run = Run(inner, strategy, policy=policy, folder=tmp_path / "run")
        with pytest.raises(FederationError, match=r"set prunecast.pruning-recalibrate = 'never'"):
            run.start(ArrayRecord(network().state_dict()), num_rounds=1)
        assert not (tmp_path / "run").exists()
