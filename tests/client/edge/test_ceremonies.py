"""What a device makes of ceremonies: it follows those that holders signed, and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata

from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.errors import NetworkError, NoRelease, TrustError
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository import Change, KeyRing, Repository
from support.ceremonies import Circle, utc_now
from support.network import Network
from support.releases import publish_model

Model = Callable[[int], PublishedModel]
Publish = Callable[[int], None]


@pytest.fixture
def circle(tmp_path: Path) -> Circle:
    return Circle(tmp_path / "circle")


@pytest.fixture
def served(circle: Circle, tmp_path: Path) -> Repository:
    """Keys of alice, bob and carol, two of three; the role ``robot`` publishes ``toy``."""
    repository = circle.found(tmp_path / "served")
    circle.online("host", "robot")
    change = Change(delegate={"robot": ["toy"]}, add={"robot": circle.keys("host.robot")})
    circle.change(repository, change, "alice", "bob")
    return repository


@pytest.fixture
def publish(served: Repository, graph: ExportedGraph, model: Model, images: np.ndarray) -> Publish:
    def publish(number: int) -> None:
        publish_model(served, "toy", model(number), graph, selftest_inputs=images)

    return publish


@pytest.fixture
def network(served: Repository) -> Network:
    return Network(served.path)


@pytest.fixture
def agent(served: Repository, publish: Publish, network: Network, tmp_path: Path):
    """A device that runs release 1, provisioned with the first root."""
    publish(1)
    root = (served.path / "metadata" / "1.root.json").read_bytes()
    config = AgentConfig(tmp_path / "state", "http://r.invalid/", "toy", root, threads=1)
    with Agent(config, fetcher=network, wait=lambda _: None) as agent:
        assert agent.update_once().version == 1
        yield agent


def test_it_updates_by_a_delegated_role(agent: Agent, publish: Publish) -> None:
    publish(2)
    result = agent.update_once()
    assert (result.version, result.payload) == (2, "patch")
    assert agent.update_once().outcome == "current"


def test_it_sleeps_through_three_rotations(
    agent: Agent,
    circle: Circle,
    served: Repository,
    graph: ExportedGraph,
    model: Model,
    images: np.ndarray,
) -> None:
    """In the end not one of the keys it was provisioned with is left."""
    hand = [("alice", "dora"), ("bob", "emil"), ("carol", "fritz")]
    present = {"alice", "bob", "carol"}
    for old, new in hand:
        both = ("root", "targets")
        change = Change(
            add={role: circle.keys(new) for role in both}, revoke={role: [old] for role in both}
        )
        ceremony = circle.prepare(served, change)
        served.enact(circle.sign(ceremony, [*sorted(present)[:2], new]))
        present = present - {old} | {new}
        served.renew()
    fresh = circle.online("fresh", "snapshot", "timestamp", "robot")
    change = Change(
        add={r: circle.keys(f"fresh.{r}") for r in ("snapshot", "timestamp", "robot")},
        revoke={r: [f"host.{r}"] for r in ("snapshot", "timestamp", "robot")},
    )
    awake = Repository(served.path, fresh)
    awake.enact(circle.sign(circle.prepare(served, change), ["dora", "emil"]))
    held = Metadata.from_bytes(served.trusted_root()).signed
    assert held.version == 5
    first = Metadata.from_bytes((served.path / "metadata" / "1.root.json").read_bytes()).signed
    assert not set(held.keys) & set(first.keys)
    assert agent.update_once().outcome == "current"
    publish_model(awake, "toy", model(2), graph, selftest_inputs=images)
    assert agent.update_once().version == 2


def test_a_threshold_that_rises(
    agent: Agent, circle: Circle, served: Repository, publish: Publish
) -> None:
    circle.change(served, Change(threshold={"root": 3}), "alice", "bob", "carol")
    circle.change(served, Change(renew=["root"]), "alice", "bob", "carol")
    publish(2)
    assert agent.update_once().version == 2


def _serve_root(network: Network, root: Metadata, signers: list[CryptoSigner]) -> None:
    root.signed.version += 1
    root.signatures.clear()
    for signer in signers:
        root.sign(signer, append=True)
    network.replaced[f"metadata/{root.signed.version}.root.json"] = root.to_bytes()


@pytest.mark.parametrize("thieves", [["alice"], ["bob", "mallory"], ["mallory", "moriarty"]])
def test_too_few_holders_cannot_change_the_root(
    agent: Agent, circle: Circle, served: Repository, network: Network, thieves: list[str]
) -> None:
    root = Metadata.from_bytes(served.trusted_root())
    for key in circle.keys("mallory", "moriarty"):
        root.signed.add_key(key, "root")
    _serve_root(network, root, [circle.signer(name) for name in thieves])
    with pytest.raises(TrustError, match="not signed by the keys this device trusts"):
        agent.update_once()
    assert agent.model.version == 1


def test_a_revoked_holder_counts_no_more(
    agent: Agent, circle: Circle, served: Repository, network: Network
) -> None:
    both = ("root", "targets")
    change = Change(
        add={role: circle.keys("dora") for role in both}, revoke={role: ["bob"] for role in both}
    )
    circle.change(served, change, "alice", "carol")
    agent.update_once()
    _serve_root(
        network,
        Metadata.from_bytes(served.trusted_root()),
        [circle.signer("alice"), circle.signer("bob")],
    )
    with pytest.raises(TrustError, match="1/2 keys"):
        agent.update_once()


def test_a_revoked_publisher_cannot_publish(
    agent: Agent, circle: Circle, served: Repository, network: Network, publish: Publish
) -> None:
    """Even with the snapshot and timestamp keys of the same machine."""
    before = (served.path / "metadata").iterdir()
    stolen = {p.name: p.read_bytes() for p in before}
    fresh = circle.online("fresh", "robot")
    change = Change(add={"robot": circle.keys("fresh.robot")}, revoke={"robot": ["host.robot"]})
    ceremony = circle.sign(circle.prepare(served, change), ["alice", "bob"])
    Repository(served.path, KeyRing(*fresh.folders, circle.folder / "host")).enact(ceremony)
    agent.update_once()
    state = served._load()
    listing = Metadata.from_bytes(stolen["2.robot.json"])
    listing.signed.version = 9
    listing.sign(circle.signer("host.robot"))
    state.delegated["robot"] = listing
    files = state._listed("robot")
    files |= state.sign(["snapshot"], served._signers, served._expiry, utc_now())
    network.replaced |= {f"metadata/{name}": data for name, data in files.items()}
    with pytest.raises(TrustError, match="robot was signed by 0/1 keys"):
        agent.update_once()


def test_a_delegated_role_cannot_speak_for_other_names(
    agent: Agent, served: Repository, network: Network, publish: Publish, tmp_path: Path
) -> None:
    state = served._load()
    listing = state.delegated["robot"].signed
    [held] = listing.targets.values()
    listing.targets["other/1/release.json"] = held
    served._commit(state.sign(["robot"], served._signers, served._expiry, utc_now()))
    config = replace(agent.config, name="other", state=tmp_path / "other")
    with Agent(config, fetcher=network) as other, pytest.raises(NoRelease, match="it has: toy"):
        other.update_once()
    assert [e.name for e in served.releases()] == ["toy"]


@pytest.mark.parametrize("attack", ["old list", "expired list", "missing list", "handed on"])
def test_a_delegated_list_that_is_not_the_one_in_force(
    agent: Agent, served: Repository, network: Network, publish: Publish, attack: str
) -> None:
    name, old = "metadata/3.robot.json", served.path / "metadata" / "2.robot.json"
    if attack == "expired list":
        past = utc_now() - timedelta(days=40)
        state = served._load()
        files = state.sign(["robot"], served._signers, served._expiry, past)
        files |= state.sign(["snapshot"], served._signers, served._expiry, utc_now())
        served._commit(files)
    elif attack == "handed on":
        state = served._load()
        state.delegated["robot"].signed.delegations = state.targets.signed.delegations
        served._commit(state.sign(["robot"], served._signers, served._expiry, utc_now()))
    else:
        publish(2)
        network.replaced[name] = old.read_bytes() if attack == "old list" else None
    with pytest.raises((TrustError, NetworkError)):
        agent.update_once()
    assert agent.model.version == 1
