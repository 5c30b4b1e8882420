"""The simulated nodes: numbered without being asked, bounded in what they keep, on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict, UserConfig

from prunecast.client.training.housekeeping import kept_bytes
from prunecast.client.training.store import NodeStore
from prunecast.compression.versions import LatticeTensor, PublishedModel
from prunecast.server.federation import Ledger
from prunecast.simulations.runner import EngineFailed
from prunecast.simulations.runner import nodes as module
from prunecast.simulations.runner.federate import run_arms, simulated_client
from prunecast.simulations.runner.inprocess import InProcessGrid
from prunecast.simulations.runner.nodes import StoreBound, client_number_mod, number_nodes
from prunecast.simulations.runner.prepared import PreparedRun, prepare
from prunecast.simulations.runner.run import new_run_folder, run_scenario
from prunecast.simulations.scenarios import scenario_from_mapping

RUN = 7


class Nodes(InProcessGrid):
    """Lists ids as Flower draws them: in no order. Refuses to send anything."""

    def get_node_ids(self) -> list[int]:
        return [2**63 + 5, 12, 900]

    def push_messages(self, messages):
        raise AssertionError("nobody is asked")


def test_nodes_are_numbered_by_id_without_asking_them(tiny, tmp_path):
    prepared = prepare(scenario_from_mapping(tiny), tmp_path)
    nodes = number_nodes(Nodes({}, 3), prepared)
    assert nodes == [12, 900, 2**63 + 5]
    numbers = []
    for node in nodes:
        config = UserConfig({"partition-id": 99, "num-partitions": 3})
        context = Context(1, node, config, RecordDict(), UserConfig())
        mod = client_number_mod(prepared)
        numbers.append(mod("message", context, lambda m, c: c.node_config["partition-id"]))
    assert numbers == [0, 1, 2]


def test_nodes_that_do_not_come_up_are_counted(tiny, tmp_path, monkeypatch):
    prepared = prepare(scenario_from_mapping({**tiny, "clients": {"count": 4}}), tmp_path)
    monkeypatch.setattr(module, "_START_SECONDS", 0.0)
    with pytest.raises(EngineFailed, match="only 3 of 4 simulated nodes came up"):
        number_nodes(Nodes({}, 3), prepared)


def test_what_goes_along_with_every_message_does_not_grow_with_the_clients(tiny, tmp_path):
    import cloudpickle

    few = prepare(scenario_from_mapping(tiny), tmp_path)
    many = PreparedRun(few.folder, few.scenario, (1,) * 10_000)
    sizes = [len(cloudpickle.dumps(simulated_client(p))) for p in (few, many)]
    assert sizes[0] == sizes[1]


# -- the bound ------------------------------------------------------------------------------------


def keeps(root: Path, node: int, *, version: int = 500, dropped: int = 1000) -> int:
    """A node holds a version and staged what a reply dropped; bytes on disk."""
    store = NodeStore(root, RUN, node)
    store.keep("arrays", PublishedModel({"w": LatticeTensor(np.ones(version, np.int8), 0.5)}, 1))
    store.stage("arrays", "t", {"w": np.ones(dropped, np.float32)})
    return kept_bytes(root, RUN, node)


def holds(root: Path, node: int) -> tuple[bool, bool]:
    """Whether it holds a version, and a residual."""
    store = NodeStore(root, RUN, node)
    return store.held("arrays") is not None, bool(store.residual("arrays", "t"))


def test_nodes_asked_longest_ago_forget_first(tmp_path):
    size = keeps(tmp_path, 1)
    bound = StoreBound(tmp_path, RUN, most=2 * size, history=16)
    for node in (1, 2, 1, 3):  # 2 was asked longest ago
        keeps(tmp_path, node)
        bound.after([node])
    assert [holds(tmp_path, node) for node in (1, 2, 3)] == [
        (True, True),
        (False,) * 2,
        (True,) * 2,
    ]
    assert (bound.forgotten, bound.peak) == (1, 2 * size)


def test_versions_that_no_delta_leads_to_go_before_residuals(tmp_path):
    size = keeps(tmp_path, 1, version=4000, dropped=100)
    bound = StoreBound(tmp_path, RUN, most=3 * size, history=1)
    for node in (1, 2, 3, 4):
        keeps(tmp_path, node, version=4000, dropped=100)
        bound.after([node])
    # 1 and 2 were asked more than one exchange ago; 3 may still get a delta
    assert [holds(tmp_path, node) for node in (1, 2, 3, 4)] == [(False, True)] * 2 + [
        (True,) * 2
    ] * 2
    assert bound.forgotten == 0
    assert bound.peak <= 3 * size


def test_who_keeps_nothing_is_not_remembered(tmp_path):
    bound = StoreBound(tmp_path, RUN, most=0, history=1)
    bound.after(range(100))
    assert (bound.peak, bound.forgotten) == (0, 0)
    assert list(tmp_path.iterdir()) == []


def run(mapping: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """The outcome of the prunecast arm, and its ledger."""
    prepared = prepare(scenario_from_mapping(mapping), folder)
    grid = InProcessGrid(simulated_client(prepared), num_nodes=prepared.scenario.clients.count)
    [outcome] = run_arms(grid, prepared, lambda event: None)
    return outcome, list(Ledger.read(prepared.ledger("prunecast")))


def test_nodes_that_forget_everything_get_keyframes_and_the_run_goes_on(tiny, tmp_path):
    arms = {"prunecast": tiny["arms"]["prunecast"]}
    mapping = {**tiny, "arms": arms, "engine": {"backend": "inline", "store_bytes": 0}}
    outcome, entries = run(mapping, tmp_path)
    assert [row["round"] for row in outcome["rounds"]] == [0, 1, 2, 3]
    assert (outcome["store_bytes"], outcome["forgotten"]) == (0, 9)
    # the server believed that they hold a version: base missing, and a keyframe within the round
    for number in (2, 3):
        kinds = [e.kind for e in entries if e.round == number]
        assert sorted(kinds) == sorted(
            3 * [*("reuse" if "reuse" in kinds else "delta",), "base-missing", "keyframe", "update"]
        )


def test_a_bound_that_only_takes_useless_versions_changes_no_figure(tiny, tmp_path):
    policy = {**tiny["arms"]["prunecast"], "policy": {"history": 1, "history_bytes": 0}}
    mapping = {
        **tiny,
        "rounds": 6,
        "arms": {"prunecast": policy},
        "clients": {"count": 4, "fraction": 0.25},
    }
    free, before = run(mapping, tmp_path / "free")
    most = free["store_bytes"] - 1
    bound, after = run(
        {**mapping, "engine": {"backend": "inline", "store_bytes": most}}, tmp_path / "bound"
    )
    assert bound["store_bytes"] < free["store_bytes"]
    assert bound["forgotten"] == 0
    assert [r["loss"] for r in bound["rounds"]] == [r["loss"] for r in free["rounds"]]
    assert [(e.kind, e.payload_bytes) for e in after] == [(e.kind, e.payload_bytes) for e in before]


# -- Ray ------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_a_cluster_of_two_machines_gives_what_one_process_gives(tiny, tmp_path, two_machines):
    arms = {"prunecast": tiny["arms"]["prunecast"]}
    losses = {}
    engines = {"inline": {"backend": "inline"}}
    engines["cluster"] = {"address": two_machines.address, "gpus": 0.5}
    for name, engine in engines.items():
        mapping = {**tiny, "rounds": 1, "arms": arms, "engine": engine}
        folder = new_run_folder(tmp_path, name)
        result = run_scenario(scenario_from_mapping(mapping), folder)
        losses[name] = [row["loss"] for row in result["arms"]["prunecast"]["rounds"]]
    assert losses["cluster"] == losses["inline"]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"address": "127.0.0.1:1"}, "no Ray cluster answers at engine.address = '127.0.0.1:1'"),
        (
            {"cpus": 1, "gpus": 4096.5},
            r"no machine has the engine.cpus = 1 and engine.gpus = 4096.5",
        ),
    ],
)
def test_an_engine_that_cannot_be_had_is_named(tiny, tmp_path, engine, said):
    with pytest.raises(EngineFailed, match=said):
        run_scenario(
            scenario_from_mapping({**tiny, "engine": engine}), new_run_folder(tmp_path, "x")
        )
