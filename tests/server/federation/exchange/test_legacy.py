"""Flower's legacy API: parameters without names and dtypes, one message at a time from threads."""

import re
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext, ServerConfig
from flwr.server.compat import start_grid
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow

from prunecast.client.training import compression_mod
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID

START = [
    np.random.default_rng(0).normal(size=(64, 40)).astype(np.float32),
    np.zeros(64, np.float32),
]


class Client(NumPyClient):
    def get_parameters(self, config):
        return START

    def fit(self, parameters, config):
        return [p + np.float32(0.25) * (1 - p) for p in parameters], 10, {}

    def evaluate(self, parameters, config):
        return float(np.mean([np.abs(1 - p).mean() for p in parameters])), 10, {}


class Keeping(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        assert not failures
        made = super().aggregate_fit(server_round, results, failures)
        self.made = parameters_to_ndarrays(made[0])
        return made


def workflow(grid, strategy, rounds):
    context = LegacyContext(
        context=Context(RUN_ID, 0, {}, RecordDict(), {}),
        config=ServerConfig(num_rounds=rounds),
        strategy=strategy,
    )
    DefaultWorkflow()(grid, context)
    return context.history


def threads(grid, strategy, rounds):
    return start_grid(grid=grid, config=ServerConfig(num_rounds=rounds), strategy=strategy)


@pytest.mark.parametrize("start", [workflow, threads])
@pytest.mark.parametrize(("policy", "given"), [("lossless", True), ("balanced", False)])
def test_legacy_servers_and_clients_are_compressed(federation, tmp_path, start, policy, given):
    app = ClientApp(
        client_fn=lambda context: Client().to_client(), mods=[compression_mod(tmp_path / "store")]
    )
    grid, _, _ = federation(policy, app=app)
    parameters = ndarrays_to_parameters(START) if given else None
    strategy = Keeping(initial_parameters=parameters, min_available_clients=3)
    history = start(grid, strategy, 3)

    assert [array.shape for array in strategy.made] == [array.shape for array in START]
    assert [array.dtype for array in strategy.made] == [np.float32, np.float32]
    expected = [1 - (1 - array) * 0.75**3 for array in START]
    for made, exact in zip(strategy.made, expected, strict=True):
        assert np.sqrt(np.mean((made - exact) ** 2)) < (0.25 if policy == "balanced" else 1e-6)
    losses = [loss for _, loss in history.losses_distributed]
    assert losses == sorted(losses, reverse=True)

    entries = [e for e in grid.ledger.entries if e.message_type in ("train", "evaluate")]
    assert {e.kind for e in entries} == {"keyframe", "delta", "update", "none"}
    assert len(entries) == 2 * 2 * 3 * 3
    updates = grid.ledger.totals(kind="update")
    assert updates.dense_bytes > (6 if policy == "balanced" else 1) * updates.bytes_up
    assert not grid._sent


def test_the_documented_wrapper(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNECAST_STORE", str(tmp_path / "store"))
    page = (Path(__file__).parents[4] / "docs" / "flower.md").read_text()
    strategy = Keeping(initial_parameters=ndarrays_to_parameters(START), min_available_clients=3)
    scope = {"strategy": strategy, "client_fn": lambda context: Client().to_client()}
    for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL):
        exec(block, scope)
    inner = InProcessGrid(scope["client"], 3, run_id=RUN_ID)
    scope["app"](inner, Context(RUN_ID, 0, {}, RecordDict(), {}))
    assert [array.shape for array in strategy.made] == [array.shape for array in START]
    assert list((tmp_path / "store").rglob("*.model"))
