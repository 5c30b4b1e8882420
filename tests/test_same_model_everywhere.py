"""One model, bit for bit: on the server, on every client, and on an edge device.

Three clients take part; one skips rounds, one loses its store and one joins late. Every version
is released, and a device follows the releases over a real server on loopback.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg
from torch import nn

from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.slots.weights import patch_base
from prunecast.client.edge.state import read_status
from prunecast.client.training.store import NodeStore
from prunecast.compression.onnx.export import export_graph
from prunecast.server.federation import CompressedGrid, Ledger, Policy
from prunecast.server.repository import KeyRing, Repository
from prunecast.server.repository.serving import ReleaseServer
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID, make_app, to_record
from support.releases import publish_model

POLICY = Policy.preset("small", pruning_begin=1, pruning_end=6)
SKIPS, LOSES, LATE = 1, 2, 3


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 40),
        nn.ReLU(),
        nn.Linear(40, 5),
    )


def device_digest(state: Path) -> bytes:
    """Digest of the model whose weights lie in the device's active slot."""
    held = patch_base(state / "slots" / read_status(state)["active"]["slot"])
    assert held is not None
    return held.digest


@pytest.mark.engine
def test_every_version_is_the_same_everywhere(tmp_path):
    module = network().eval()
    images = np.random.default_rng(0).normal(size=(32, 1, 12, 12)).astype(np.float32)
    graph = export_graph(module, (torch.from_numpy(images[:2]),))
    keys = KeyRing.create(tmp_path / "keys")
    repository = Repository.create(tmp_path / "repository", keys)

    seen: list = []
    inner = InProcessGrid(make_app(tmp_path / "store", seen), 3, run_id=RUN_ID)
    grid = CompressedGrid(inner, POLICY, ledger=Ledger(keep=1000), poll_interval=0.01)
    arrays = to_record({name: value.numpy() for name, value in module.state_dict().items()})
    strategy = FedAvg(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)
    random.seed(0)
    plan = [{1, 2}, {1, 2}, {2}, {1, 2, 3}, {2, 3}, {1, 2, 3}, {1, 3}, {1, 2, 3}]

    with ReleaseServer(repository.path) as server:
        config = AgentConfig(
            tmp_path / "device", server.url, "classifier", repository.trusted_root()
        )
        with Agent(config) as agent:
            for number, online in enumerate(plan, start=1):
                inner.online = set(online)
                if number == 6:
                    shutil.rmtree(tmp_path / "store" / str(RUN_ID) / str(LOSES))
                sent = arrays
                messages = strategy.configure_train(number, sent, ConfigRecord(), grid)
                replies = grid.send_and_receive(messages)
                arrays, _ = strategy.aggregate_train(number, replies)

                model = grid.published(sent)
                for node in online:
                    held = NodeStore(tmp_path / "store", RUN_ID, node).held("arrays")
                    assert held.digest == model.digest, (number, node)
                publish_model(repository, "classifier", model, graph, selftest_inputs=images[:4])
                result = agent.update_once()
                assert result.outcome == "updated", result.reason
                assert result.payload == ("keyframe" if number == 1 else "patch")
                assert device_digest(tmp_path / "device") == model.digest, number

                # and what it computes is what torch computes with the published arrays
                module.load_state_dict(
                    {k: torch.from_numpy(np.array(v)) for k, v in model.arrays().items()}
                )
                with torch.inference_mode():
                    expected = module(torch.from_numpy(images)).numpy()
                (signature,) = agent.model.manifest.inputs
                (found,) = agent.model.run({signature.name: images}).values()
                assert np.abs(found - expected).max() < 1e-4
                assert np.array_equal(found.argmax(1), expected.argmax(1))

    kinds = {
        node: [e.kind for e in grid.ledger.entries if e.node == node and e.direction == "down"]
        for node in (SKIPS, LOSES, LATE)
    }
    assert kinds[SKIPS] == ["keyframe", *["delta"] * 5]
    assert kinds[LOSES] == ["keyframe", *["delta"] * 5, "keyframe", "delta"]
    assert kinds[LATE] == ["keyframe", *["delta"] * 4]
    assert not [e for e in grid.ledger.entries if e.kind == "error"]
    assert model.sparsity() == pytest.approx(0.8, abs=0.01)
