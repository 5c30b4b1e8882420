"""The optimised model: quick where it is the one that was sealed, never opened where it is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from prunecast.client.edge import Agent, AgentConfig, open_model
from prunecast.client.edge.slots import slot as module
from prunecast.client.edge.state import StateFolder
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository import KeyRing, Repository
from support.network import Network
from support.releases import publish_model


@pytest.fixture(scope="module")
def installed(
    tmp_path_factory: pytest.TempPathFactory,
    graph: ExportedGraph,
    model: Callable[[int], PublishedModel],
    images: np.ndarray,
) -> tuple[AgentConfig, Network]:
    """A repository of release 1, and a state folder that holds it, confirmed and optimised."""
    folder = tmp_path_factory.mktemp("optimised")
    repository = Repository.create(folder / "repository", KeyRing.create(folder / "keys"))
    publish_model(repository, "toy", model(1), graph, selftest_inputs=images)
    root, url = repository.trusted_root(), "http://repository.invalid/"
    config = AgentConfig(folder / "state", url, "toy", root, threads=1, optimise=True)
    network = Network(repository.path)
    with Agent(config, fetcher=network) as agent:
        agent.update_once()
        agent.confirm()
        assert agent.model.current().seal
    return config, network


@pytest.fixture
def config(installed: tuple[AgentConfig, Network], tmp_path: Path) -> AgentConfig:
    shutil.copytree(installed[0].state, tmp_path / "state")
    return replace(installed[0], state=tmp_path / "state")


@pytest.fixture
def start(
    config: AgentConfig, installed: tuple[AgentConfig, Network]
) -> Iterator[Callable[..., Agent]]:
    """A function: an agent that optimises, on the test's state folder."""
    agents: list[Agent] = []

    def start(**options: object) -> Agent:
        for agent in agents:
            agent.close()
        chosen = replace(config, **options)  # type: ignore[arg-type]
        agents.append(Agent(chosen, fetcher=installed[1], wait=lambda _: None))
        return agents[-1]

    yield start
    for agent in agents:
        agent.close()


@pytest.fixture
def answers(images: np.ndarray, model: Callable[[int], PublishedModel]) -> Callable[[Agent], None]:
    """A function: checks that an agent computes what release 1 computes."""

    def check(agent: Agent) -> None:
        a = model(1).arrays()
        want = np.maximum(images @ a["w1"].T + a["b1"], 0) @ a["w2"].T + a["b2"]
        served = agent.model.infer({"input": images})
        assert served.version == 1
        assert np.abs(served.outputs["output"] - want).max() < 1e-5

    return check


@pytest.fixture
def slot(config: AgentConfig) -> Path:
    """The slot of release 1; no agent runs."""
    return config.state / "slots" / "a"


def _sealed(config: AgentConfig) -> str | None:
    state = StateFolder(config.state).read()
    assert state
    assert state.active
    return state.active.optimised


def test_a_restart_opens_the_optimised_model(
    slot: Path, start: Callable[..., Agent], config: AgentConfig, answers: Callable[[Agent], None]
) -> None:
    assert {p.name for p in (slot / "optimised").iterdir()} == {"model.onnx", "weights.bin"}
    before = (slot / "optimised" / "weights.bin").stat().st_mtime_ns
    seal = _sealed(config)
    (slot / "optimised.new").mkdir()  # what a crash may leave behind
    agent = start()
    assert not (slot / "optimised.new").exists()
    assert agent.model.current().seal == seal
    answers(agent)
    assert (slot / "optimised" / "weights.bin").stat().st_mtime_ns == before
    assert not (slot / "optimised.loading").exists()
    assert open_model(config.state, threads=1).current().seal == seal
    assert start(optimise=False).model.current().seal is None


@pytest.mark.parametrize("file", ["model.onnx", "weights.bin"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "link", "other"])
def test_what_does_not_match_is_made_anew(
    slot: Path,
    start: Callable[..., Agent],
    config: AgentConfig,
    answers: Callable[[Agent], None],
    file: str,
    damage: str,
) -> None:
    path, before = slot / "optimised" / file, _sealed(config)
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "link":
        elsewhere = config.state / "elsewhere"
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)
    elif damage == "other":
        path.write_bytes((slot / file).read_bytes())
    assert open_model(config.state, threads=1).current().seal is None
    agent = start()
    answers(agent)
    assert agent.model.current().seal == _sealed(config) is not None
    assert not path.is_symlink()
    assert start().model.current().seal == _sealed(config)
    assert before is not None


@pytest.mark.parametrize("what", ["onnxruntime", "CPU", "release"])
def test_the_seal_binds_more_than_the_bytes(
    slot: Path,
    start: Callable[..., Agent],
    config: AgentConfig,
    answers: Callable[[Agent], None],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    before = _sealed(config)
    if what == "onnxruntime":
        monkeypatch.setattr(onnxruntime, "__version__", "99.0.0")
    elif what == "CPU":
        monkeypatch.setattr(module.platform, "machine", lambda: "another")
    else:
        manifest = ReleaseManifest.from_bytes((slot / "release.json").read_bytes())
        (slot / "release.json").write_bytes((slot / "release.json").read_bytes() + b" ")
        assert module.open_optimised(slot, manifest, before, threads=1) is None
        return
    agent = start()
    answers(agent)
    assert _sealed(config) == agent.model.current().seal != before


def test_the_self_test_runs_with_what_is_served(
    slot: Path,
    start: Callable[..., Agent],
    config: AgentConfig,
    answers: Callable[[Agent], None],
) -> None:
    """An optimised model that computes something else, under a seal that fits."""
    weights = slot / "optimised" / "weights.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    folder = StateFolder(config.state)
    state = folder.read()
    assert state
    assert state.active
    forged = module._seal(slot, slot / "optimised")
    folder.write(replace(state, active=replace(state.active, optimised=forged)))
    manifest = ReleaseManifest.from_bytes((slot / "release.json").read_bytes())
    how = module._How(slot, manifest, 1, config.bounds, lambda: None)
    assert module._open_sealed(how, True) is not None
    agent = start()
    answers(agent)
    assert agent.model.current().seal not in (None, forged)


def test_what_ended_the_process_is_not_opened_again(
    slot: Path, start: Callable[..., Agent], answers: Callable[[Agent], None]
) -> None:
    (slot / "optimised.loading").touch()
    for _ in range(2):
        agent = start()
        assert agent.model.current().seal is None
        answers(agent)


def test_optimising_that_ends_the_process_is_not_tried_again(
    slot: Path,
    start: Callable[..., Agent],
    answers: Callable[[Agent], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(*args: Any, **options: Any) -> Any:
        assert "save_optimised" in options
        raise SystemExit("out of memory")

    shutil.rmtree(slot / "optimised")
    with monkeypatch.context() as patch:
        patch.setattr(module, "open_session", end)
        with pytest.raises(SystemExit):
            start()
    agent = start()
    assert agent.model.current().seal is None
    answers(agent)


@pytest.mark.parametrize("trouble", ["no room", "refused", "too large"])
def test_a_full_disk_costs_the_optimised_model_alone(
    start: Callable[..., Agent],
    config: AgentConfig,
    answers: Callable[[Agent], None],
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    shutil.rmtree(config.state)
    if trouble == "no room":
        monkeypatch.setattr(
            module,
            "shutil",
            SimpleNamespace(**{**vars(shutil), "disk_usage": lambda _: SimpleNamespace(free=1000)}),
        )
    elif trouble == "refused":
        monkeypatch.setattr(module, "_NEW", os.path.join("absent", "folder"))
    else:
        monkeypatch.setattr(module, "_most_bytes", lambda *_: 100)
    agent = start()
    assert agent.update_once().outcome == "updated"
    answers(agent)
    assert agent.model.current().seal is None
    assert _sealed(config) is None
    assert not [p for p in (config.state / "slots" / "a").iterdir() if "optimised" in p.name]


def test_every_release_takes_its_own_along(
    repository: Repository,
    publish: Callable[[int], ReleaseManifest],
    tmp_path: Path,
) -> None:
    root = repository.trusted_root()
    config = AgentConfig(tmp_path / "new", "http://x/", "toy", root, threads=1, optimise=True)
    seals = []
    with Agent(config, fetcher=Network(repository.path)) as agent:
        for number in (1, 2):
            publish(number)
            assert agent.update_once().version == number
            agent.confirm()
            assert agent.model.current().seal == _sealed(config)
            seals.append(_sealed(config))
        assert agent.roll_back("slower") == 1
        assert agent.model.current().seal == _sealed(config) == seals[0]
    assert len(set(seals)) == 2
