"""SecAgg+ as Flower has it, its legacy workflow and mod, over a grid that compresses."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow, SecAggWorkflow

from prunecast.client import shared_mask_mod
from prunecast.client.training import compression_mod, contribute_statistics
from prunecast.compression.flower import STATISTICS_RECORD
from prunecast.compression.flower.envelope import unpack
from prunecast.compression.flower.secure import SECURE_RECORD, narrowed, widened
from prunecast.compression.versions import INSTRUCTION_FORMAT, Capabilities
from prunecast.server import SecureStrategy
from prunecast.server.federation import FederationError, Policy
from prunecast.server.federation.publishing.classes import class_of, parse_classes
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID

START = [
    np.random.default_rng(0).normal(size=(64, 40)).astype(np.float32) * np.float32(0.1),
    np.zeros(64, np.float32),
]
KEY, NODES = "fitins.parameters", 3
WEIGHTS = sum(array.size for array in START)


class Client(NumPyClient):
    """Goes a part of the way to 0.3, a longer one on the third node."""

    def __init__(self, node, part):
        self.node, self.part = node, np.float32(part * (2 if node == 3 else 1))

    def fit(self, parameters, config):
        contribute_statistics("gradient", {"0": np.ones((64, 40), np.float32)})
        return [p + self.part * (np.float32(0.3) - p) for p in parameters], 10, {}

    def evaluate(self, parameters, config):
        return float(np.mean([np.abs(0.3 - p).mean() for p in parameters])), 10, {}


class Keeping(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        made = super().aggregate_fit(server_round, results, failures)
        self.made = parameters_to_ndarrays(made[0])
        self.failures = failures
        return made


def client(store, *mods, part=0.25):
    return ClientApp(
        client_fn=lambda context: Client(context.node_id, part).to_client(),
        mods=[*([] if store is None else [compression_mod(store)]), *mods],
    )


def ran(
    grid,
    strategy,
    rounds,
    wrap=lambda strategy, grid: SecureStrategy(strategy, grid),
    workflow=None,
    **options,
):
    context = LegacyContext(
        context=Context(RUN_ID, 0, {}, RecordDict(), {}),
        config=ServerConfig(num_rounds=rounds),
        strategy=wrap(strategy, grid),
    )
    secure = workflow or SecAggPlusWorkflow(NODES, 2, max_weight=10, **options)
    DefaultWorkflow(fit_workflow=secure)(grid, context)
    return strategy.made


def keeping():
    start = ndarrays_to_parameters(START)
    return Keeping(initial_parameters=start, min_available_clients=NODES, min_fit_clients=NODES)


def expected(rounds, part=0.25):
    """What averaging in the clear makes."""
    mean = part * (1 + 1 + 2) / 3
    return [0.3 - (0.3 - array.astype("f8")) * (1 - mean) ** rounds for array in START]


def error(made, exact):
    distance = sum(float(np.sum((m - e) ** 2)) for m, e in zip(made, exact, strict=True))
    return float(np.sqrt(distance / WEIGHTS))


def masked(grid):
    return [e for e in grid.ledger.entries if e.direction == "up" and e.dense_bytes > 4 * WEIGHTS]


@pytest.mark.parametrize("workflow", [None, SecAggWorkflow(2, max_weight=10)], ids=["+", ""])
def test_without_a_lattice_it_needs_no_more_than_the_mod(federation, tmp_path, workflow):
    app = client(tmp_path / "store", secaggplus_mod)
    grid, _, _ = federation("lossless", app=app)
    made = ran(grid, keeping(), 3, wrap=lambda strategy, grid: strategy, workflow=workflow)
    assert error(made, expected(3)) < 1e-4
    assert len(masked(grid)) == 3 * NODES
    for entry in masked(grid):  # four bytes a weight, where Flower has eight
        assert 8 * WEIGHTS < entry.dense_bytes < 8 * WEIGHTS + 2500
        assert 4 * WEIGHTS < entry.payload_bytes < 4 * WEIGHTS + 2500


def test_on_a_lattice_it_is_refused_without_the_wrapper(federation, tmp_path):
    grid, _, _ = federation("balanced", app=client(tmp_path / "store", secaggplus_mod))
    with pytest.raises(FederationError, match="SecureStrategy"):
        ran(grid, keeping(), 1, wrap=lambda strategy, grid: strategy)


def test_changes_far_smaller_than_a_step_add_up(federation, tmp_path):
    """Fifteen of them, each a thirtieth of the step, or less."""
    app = client(tmp_path / "store", secaggplus_mod, part=0.01)
    grid, _, _ = federation("balanced", app=app)
    made = ran(grid, keeping(), 15)
    gone = error(START, expected(15, 0.01))
    assert error(made, expected(15, 0.01)) < 0.1 * gone
    assert [a.dtype for a in made] == [np.float32, np.float32]  # Flower's workflow makes float64


PRUNED = {"sparsity": 0.8, "pruning_begin": 1, "pruning_end": 2, "pruning_records": (KEY,)}


@pytest.mark.parametrize("shares", [True, False])
def test_of_a_pruned_model_the_kept_weights_alone_are_summed(federation, tmp_path, shares):
    mods = (secaggplus_mod, shared_mask_mod) if shares else (secaggplus_mod,)
    policy = Policy.preset("small", **PRUNED)
    grid, _, _ = federation(policy, app=client(tmp_path / "store", *mods))
    strategy = keeping()
    made = ran(grid, strategy, 5)
    assert not strategy.failures
    version = grid.securely_trained
    mask = version.model["0"].mask()
    assert 0.7 < version.model.sparsity() < 0.9
    kept = int(mask.sum()) + 64
    last = masked(grid)[-1]
    assert 8 * WEIGHTS < last.dense_bytes < 8 * WEIGHTS + 2500
    sent = kept if shares else WEIGHTS
    assert 4 * sent < last.payload_bytes < 4 * sent + 2500
    # the mean of what was trained, where weights are kept; elsewhere the master stays
    moved = version.master["0"] + (0.25 * 4 / 3) * (0.3 - version.model["0"].dense())
    assert np.abs(made[0] - np.where(mask, moved, version.master["0"])).max() < 1e-4


def test_a_node_that_is_lost_leaves_the_sum_of_the_others(federation, tmp_path):
    grid, inner, _ = federation("balanced", app=client(tmp_path / "store", secaggplus_mod))
    lost = []

    def lose(reply):
        content = unpack(reply.content)
        configs = content.config_records.get(SECURE_RECORD, {})
        if reply.metadata.src_node_id == 3 and "masked_params" in configs:
            lost.append(reply)
            return None
        return reply

    inner.on_reply = lose
    made = ran(grid, keeping(), 1, timeout=3.0)
    assert len(lost) == 1
    exact = [0.3 - (0.3 - array.astype("f8")) * 0.75 for array in START]
    published = [t.dense() for t in grid.securely_trained.model.tensors.values()]
    moved = [a + 0.25 * (0.3 - p) for a, p in zip(START, published, strict=True)]
    assert error(made, moved) < 1e-4
    assert error(made, exact) < 0.02


def test_nothing_is_said_of_a_nodes_data_beside_the_sum(federation, tmp_path):
    """Statistics for pruning would be of one node, and in the clear; no residual is kept."""
    policy = Policy.preset("small", **PRUNED, pruning_criterion="fisher")
    grid, inner, _ = federation(policy, app=client(tmp_path / "store", secaggplus_mod))
    keys = set()
    inner.on_reply = lambda reply: keys.update(unpack(reply.content)) or reply
    ran(grid, keeping(), 3)
    assert SECURE_RECORD in keys
    assert STATISTICS_RECORD not in keys
    assert not list((tmp_path / "store").rglob("*.residual"))


def test_the_documented_apps(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNECAST_STORE", str(tmp_path / "store"))
    page = (Path(__file__).parents[3] / "docs" / "composition.md").read_text()
    strategy = keeping()
    scope = {
        "strategy": strategy,
        "client_fn": lambda context: Client(context.node_id, 0.05).to_client(),
    }
    for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL):
        exec(block, scope)
    inner = InProcessGrid(scope["client"], NODES, run_id=RUN_ID)
    scope["app"](inner, Context(RUN_ID, 0, {}, RecordDict(), {}))
    assert error(strategy.made, expected(20, 0.05)) < 0.5 * error(START, expected(20, 0.05))


def test_a_mod_in_the_wrong_place_is_named(federation, tmp_path, caplog):
    app = client(None, secaggplus_mod, compression_mod(tmp_path / "store"))
    grid, _, _ = federation("balanced", app=app)
    with pytest.raises(AttributeError):
        ran(grid, keeping(), 1)  # there is no mean
    reasons = {e.reason for e in grid.ledger.entries if e.kind == "error"}
    assert reasons == {"KeyError: 'secaggplus_configs'"}
    told = [r.getMessage() for r in caplog.records if "secaggplus_configs" in r.getMessage()]
    assert any("add it to ClientApp(mods=[...]) on the clients, as the first" in t for t in told)


def test_width_classes_are_refused(federation, tmp_path):
    app = client(tmp_path / "store", secaggplus_mod)
    grid, _, _ = federation(Policy.preset("balanced", widths={"half": 0.5}), app=app)
    with pytest.raises(FederationError, match="sums vectors of one length"):
        ran(grid, keeping(), 1)


@pytest.mark.parametrize("pruned", [True, False])
def test_a_dense_class_is_refused_by_name_where_the_others_leave_out_what_is_pruned(
    federation, tmp_path, pruned
):
    knobs = PRUNED if pruned else {"pruning_records": (KEY,)}
    policy = Policy.preset("balanced", **knobs, classes={"poor": "memory<512:dense"})
    apps = client(tmp_path / "store", secaggplus_mod, shared_mask_mod)
    dense = client(None, secaggplus_mod, shared_mask_mod)
    grid, _, _ = federation(policy, app={1: apps, 2: dense, 3: apps})
    node = grid._streams.node(2)  # as it said in a run before
    node.able = Capabilities(formats=(INSTRUCTION_FORMAT,) * 2, memory=256 * 10**6)
    node.treatment = class_of(parse_classes(policy.classes), node.able)
    if pruned:
        with pytest.raises(FederationError, match=r"node 2 is of the class 'poor' .* Take 'dense'"):
            ran(grid, keeping(), 2)
        return
    made = ran(grid, keeping(), 2)
    assert error(made, expected(2)) < 0.2 * error(START, expected(2))
    assert not [e for e in grid.ledger.entries if e.kind == "error"]
    assert {e.kind for e in grid.ledger.entries if e.capability == "poor"} >= {"dense"}


def test_masked_vectors_that_fit_no_four_bytes_are_as_they_were():
    def saved(array):
        stream = io.BytesIO()
        np.save(stream, array)
        return stream.getvalue()

    for array in (np.array([2**32, 1]), np.array([-1, 1]), np.zeros(3), np.zeros(0, "i8")):
        record = ConfigRecord({"masked_params": [saved(array)], "n": 1})
        assert widened(narrowed(record)) == record
    record = ConfigRecord({"masked_params": [saved(np.array([2**32 - 1, 0]))]})
    assert len(narrowed(record)["masked_params"][0]) == len(record["masked_params"][0]) - 8
    assert widened(narrowed(record)) == record
    damaged = ConfigRecord({"masked_params": [saved(np.zeros(9, "u4"))[:-1]]})
    for bad in (damaged, ConfigRecord({"masked_params": [b"\x93NUMPY"]})):
        with pytest.raises(ValueError):  # noqa: PT011
            widened(bad)
