"""What an agent does when nobody attacks it."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from prunecast.client.edge import Agent, AgentConfig, open_model
from prunecast.client.edge.config import UpdateResult
from prunecast.client.edge.errors import (
    AgentBusy,
    AgentTooOld,
    EdgeError,
    NetworkError,
    NoModel,
    StateError,
)
from prunecast.client.edge.slots.weights import patch_base
from prunecast.client.edge.state import read_status
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository import Repository
from support.releases import publish_model

Publish = Callable[..., ReleaseManifest]
Start = Callable[..., Agent]


def _outputs(number: int, model: Callable[[int], PublishedModel], x: np.ndarray) -> np.ndarray:
    a = model(number).arrays()
    hidden = np.maximum(x @ a["w1"].T + a["b1"], 0)
    return hidden @ a["w2"].T + a["b2"]


def test_first_a_keyframe_then_patches(
    start: Start, publish: Publish, model: Callable[[int], PublishedModel], images: np.ndarray
) -> None:
    agent = start()
    assert agent.update_once().outcome == "current"
    with pytest.raises(NoModel):
        agent.model.run({"input": images})
    first = publish(1)
    result = agent.update_once()
    assert (result.outcome, result.version, result.payload) == ("updated", 1, "keyframe")
    assert result.downloaded["keyframe"] == first.keyframe.length
    assert result.downloaded["files"] == sum(ref.travels.length for ref in first.files.values())
    assert first.files["model.onnx"].travels.length < 0.6 * first.files["model.onnx"].length
    assert first.files["layout.json"].travels.length < first.files["layout.json"].length
    second = publish(2)
    result = agent.update_once()
    assert (result.outcome, result.version, result.previous) == ("updated", 2, 1)
    assert result.payload == "patch"
    assert result.downloaded["patch"] == second.patches[0].file.length
    assert result.downloaded["files"] == second.files["expected.npz"].length
    assert "keyframe" not in result.downloaded
    assert result.difference is not None
    assert result.difference < 1e-5
    got = agent.model.run({"input": images})["output"]
    assert np.abs(got - _outputs(2, model, images)).max() < 1e-5
    assert agent.update_once().outcome == "current"


def test_rounds_that_were_missed_cost_one_patch(start: Start, publish: Publish) -> None:
    publish(1)
    agent = start()
    agent.update_once()
    for number in (2, 3, 4, 5):
        last = publish(number)
    result = agent.update_once()
    assert (result.version, result.payload) == (5, "patch")
    patch = last.patch_from(publish_digest(last, 1))
    assert patch is not None
    assert result.downloaded["patch"] == patch.file.length


def publish_digest(manifest: ReleaseManifest, base: int) -> str:
    return next(p.base_digest for p in manifest.patches if p.base_version == base)


def test_weights_on_the_device_are_the_published_ones(
    start: Start, publish: Publish, config: AgentConfig, model: Callable[[int], PublishedModel]
) -> None:
    publish(1)
    manifest = publish(2)
    agent = start()
    agent.update_once()
    slot = config.state / "slots" / agent.status()["active"]["slot"]
    data = (slot / "weights.bin").read_bytes()
    layout = json.loads((slot / "layout.json").read_bytes())
    assert len(data) == manifest.weights.length
    for _, tensor, part, dtype, shape, offset in layout["segments"]:
        size = int(np.prod(shape, dtype=int))
        found = np.frombuffer(data, dtype, count=size, offset=offset).reshape(shape)
        held = model(2).tensors[tensor]
        want = {"q": lambda t: t.q, "step": lambda t: np.float32(t.step)}.get(
            part, lambda t: t.dense()
        )(held)
        assert np.array_equal(found, want)


@pytest.mark.parametrize("variant", ["lattice", "fp32"])
def test_both_variants_compute_the_same_on_the_device(
    start: Start,
    repository: Repository,
    graph: ExportedGraph,
    model: Callable[[int], PublishedModel],
    images: np.ndarray,
    variant: Literal["lattice", "fp32"],
) -> None:
    publish_model(repository, "toy", model(1), graph, selftest_inputs=images, variant=variant)
    agent = start()
    assert agent.update_once().outcome == "updated"
    got = agent.model.run({"input": images})["output"]
    assert np.abs(got - _outputs(1, model, images)).max() < 1e-5
    assert agent.model.manifest.variant == variant


def test_a_deliberate_downgrade_costs_almost_nothing_and_is_followed(
    start: Start, publish: Publish
) -> None:
    publish(1)
    agent = start()
    agent.update_once()
    publish(2)
    agent.update_once()
    third = publish(1)
    result = agent.update_once()
    assert (result.version, result.payload) == (3, "patch")
    assert agent.model.manifest.model_digest == third.model_digest


def test_the_same_model_again_needs_no_payload(start: Start, publish: Publish) -> None:
    publish(1)
    agent = start()
    agent.update_once()
    publish(1)
    result = agent.update_once()
    assert (result.version, result.payload) == (2, "none")
    assert set(result.downloaded) == {"metadata"}


def test_a_restart_serves_the_active_release_without_a_network(
    start: Start, publish: Publish, network, images: np.ndarray
) -> None:
    publish(1)
    want = None
    with start() as agent:
        agent.update_once()
        want = agent.model.run({"input": images})["output"]
    network.down = True
    again = start()
    assert again.model.version == 1
    assert np.array_equal(again.model.run({"input": images})["output"], want)
    with pytest.raises(NetworkError):
        again.update_once()
    assert again.model.version == 1
    assert "no route" in again.status()["last_error"]


def test_an_interrupted_download_resumes(start: Start, publish: Publish, network) -> None:
    manifest = publish(1)
    path = f"blobs/{manifest.keyframe.sha256}"
    network.cut[path] = 128
    agent = start()
    result = agent.update_once()
    assert result.outcome == "updated"
    assert [offset for asked, offset in network.asked if asked == path] == [0, 128]
    assert result.downloaded["keyframe"] == manifest.keyframe.length


def test_a_download_resumes_in_a_later_process(start: Start, publish: Publish, network) -> None:
    manifest = publish(1)
    path = f"blobs/{manifest.keyframe.sha256}"
    seen: list[str] = []

    def die(step: str) -> None:
        seen.append(step)
        if step == "download keyframe":
            network.cut[path] = 192

    real = network.open

    def failing(url: str, offset: int = 0):  # the network stays away after the cut
        if path in url and offset:
            network.down = True
        return real(url, offset)

    network.open = failing
    agent = start(on_step=die)
    with pytest.raises(NetworkError):
        agent.update_once()
    network.down = False
    network.open = real
    network.asked.clear()
    assert start().update_once().outcome == "updated"
    assert (path, 192) in network.asked
    assert (path, 0) not in network.asked


def test_a_damaged_part_is_fetched_again(
    start: Start, publish: Publish, network, config: AgentConfig
) -> None:
    manifest = publish(1)
    downloads = config.state / "downloads"
    downloads.mkdir(parents=True)
    (downloads / f"{manifest.keyframe.sha256}.part").write_bytes(b"x" * 100)
    assert start().update_once().outcome == "updated"
    asked = [o for path, o in network.asked if path.endswith(manifest.keyframe.sha256)]
    assert asked == [100, 0]


def test_an_older_agent_keeps_what_it_has(
    start: Start,
    publish: Publish,
    repository: Repository,
    graph: ExportedGraph,
    model: Callable[[int], PublishedModel],
    images: np.ndarray,
) -> None:
    publish(1)
    agent = start()
    agent.update_once()
    publish_model(repository, "toy", model(2), graph, selftest_inputs=images, minimum_agent="9.0")
    with pytest.raises(AgentTooOld, match=r"needs agent 9\.0"):
        agent.update_once()
    assert agent.model.version == 1


def test_releases_beyond_the_size_limit_are_refused(
    config: AgentConfig, network, publish: Publish
) -> None:
    publish(1)
    with (
        Agent(replace(config, most_bytes=100), fetcher=network) as agent,
        pytest.raises(EdgeError, match="larger than the 100 bytes"),
    ):
        agent.update_once()


def test_two_agents_do_not_share_a_state_folder(start: Start, config: AgentConfig) -> None:
    start()
    with pytest.raises(AgentBusy):
        Agent(config)


def test_a_state_folder_follows_one_release(
    start: Start, publish: Publish, config: AgentConfig
) -> None:
    publish(1)
    with start() as agent:
        agent.update_once()
    with pytest.raises(StateError, match="follows release 'toy'"):
        Agent(replace(config, name="other"))


def test_inference_in_another_process_needs_only_the_state_folder(
    start: Start, publish: Publish, config: AgentConfig, images: np.ndarray
) -> None:
    with pytest.raises(NoModel):
        open_model(config.state)
    publish(1)
    agent = start()
    agent.update_once()
    served = open_model(config.state).infer({"input": images})
    assert served.version == 1
    assert np.array_equal(served.outputs["output"], agent.model.run({"input": images})["output"])


def test_status_is_plain_json(start: Start, publish: Publish, config: AgentConfig) -> None:
    with pytest.raises(StateError, match="does not exist"):
        read_status(config.state)
    publish(1)
    agent = start()
    agent.update_once()
    status = json.loads(json.dumps(agent.status()))
    assert status["active"]["version"] == 1
    assert status["last_result"]["outcome"] == "updated"
    assert status["downloaded_total"]["keyframe"] > 0
    assert status["last_error"] is None


def test_a_call_in_progress_never_mixes_versions(
    start: Start, publish: Publish, model: Callable[[int], PublishedModel], images: np.ndarray
) -> None:
    """Threads infer without pause while releases are activated under them."""
    publish(1)
    agent = start()
    agent.update_once()
    want = {n: _outputs(n, model, images) for n in range(1, 6)}
    stop, wrong, served = threading.Event(), [], set()

    def infer() -> None:
        while not stop.is_set():
            got = agent.model.infer({"input": images})
            served.add(got.version)
            if np.abs(got.outputs["output"] - want[got.version]).max() > 1e-4:
                wrong.append(got.version)

    threads = [threading.Thread(target=infer) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(2, 6):
        publish(number)
        assert agent.update_once().version == number
    stop.set()
    for thread in threads:
        thread.join(timeout=10)
    assert wrong == []
    assert served >= {1, 5} or len(served) >= 2


def test_the_loop_follows_releases_confirms_them_and_stops(
    start: Start, publish: Publish, config: AgentConfig, network
) -> None:
    publish(1)
    stop, results = threading.Event(), []

    def on_result(result: UpdateResult | EdgeError) -> None:
        results.append(result)
        if len(results) == 1:
            network.down = True
        if len(results) == 2:
            network.down = False
            publish(2)
        if isinstance(result, UpdateResult) and result.version == 2:
            stop.set()

    with Agent(replace(config, confirm_after=0.0), fetcher=network) as agent:
        loop = threading.Thread(
            target=agent.run,
            args=(0.05,),
            kwargs={"stop": stop, "rng": random.Random(1), "on_result": on_result},
        )
        loop.start()
        loop.join(timeout=30)
        assert not loop.is_alive()
        assert isinstance(results[1], NetworkError)
        assert agent.model.version == 2
        assert agent.status()["previous"]["confirmed"]


def test_an_agent_can_be_asked_to_go_back(start: Start, publish: Publish) -> None:
    publish(1)
    agent = start()
    agent.update_once()
    with pytest.raises(StateError, match="no previous"):
        agent.roll_back("worse")
    publish(2)
    agent.update_once()
    assert agent.roll_back("accuracy on the line fell") == 1
    assert agent.update_once().outcome == "current"
    assert "accuracy on the line fell" in agent.status()["rejected"].popitem()[1]
    publish(3)
    assert agent.update_once().version == 3


def test_a_slot_keeps_its_weights_once(start: Start, publish: Publish, config: AgentConfig) -> None:
    publish(1)
    start().update_once()
    slot = config.state / "slots" / "a"
    # steps and names, and no keyframe of the weights beside them
    assert (slot / "rest.model").stat().st_size < 300
    found = patch_base(slot)
    assert found is not None
    assert found.digest == load_manifest(slot)


def load_manifest(slot: Path) -> bytes:
    manifest = ReleaseManifest.from_bytes((slot / "release.json").read_bytes())
    return bytes.fromhex(manifest.model_digest)


@pytest.mark.parametrize("variant", ["lattice", "fp32"])
@pytest.mark.parametrize("damage", ["weights.bin", "rest.model", "layout.json"])
def test_a_base_that_was_damaged_while_running_costs_a_keyframe(
    start: Start,
    repository: Repository,
    graph: ExportedGraph,
    model: Callable[[int], PublishedModel],
    images: np.ndarray,
    config: AgentConfig,
    variant: Literal["lattice", "fp32"],
    damage: str,
) -> None:
    publish_model(repository, "toy", model(1), graph, selftest_inputs=images, variant=variant)
    agent = start()
    agent.update_once()
    path = config.state / "slots" / "a" / damage
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    publish_model(repository, "toy", model(2), graph, selftest_inputs=images, variant=variant)
    result = agent.update_once()
    # with fp32 weights.bin holds no integers, and no patch reads them there
    whole = variant == "fp32" and damage == "weights.bin"
    assert (result.version, result.payload) == (2, "patch" if whole else "keyframe")


def test_metadata_of_a_check_that_finds_nothing_is_small(start: Start, publish: Publish) -> None:
    for number in range(1, 17):
        publish(number)
    agent = start()
    cold = agent.update_once()
    assert cold.downloaded["metadata"] < 16_000
    idle = agent.update_once()
    assert idle.downloaded["metadata"] < 1_000


def test_state_files_are_where_the_documentation_says(
    start: Start, publish: Publish, config: AgentConfig
) -> None:
    publish(1)
    start().update_once()
    names = {str(p.relative_to(config.state)) for p in Path(config.state).rglob("*")}
    assert {"state.json", "status.json", "slots/a/release.json", "slots/a/weights.bin"} <= names
    assert not any(name.startswith("downloads/") for name in names)


def test_a_stop_just_before_its_wake_is_cleared_ends_the_loop(start: Start) -> None:
    class Late(threading.Event):
        """Whoever stops the loop is heard between its check and the clearing of the wake."""

        def clear(self) -> None:
            stop.set()
            self.set()
            super().clear()

    agent, stop, results = start(), threading.Event(), []
    loop = threading.Thread(
        target=lambda: agent.run(3600, stop=stop, wake=Late(), on_result=results.append),
        daemon=True,
    )
    loop.start()
    loop.join(timeout=30)
    assert not loop.is_alive()
    assert not results
