"""Releases that do not work, and power cuts: a complete verified version always runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prunecast.client.edge import Agent, AgentConfig, open_model
from prunecast.client.edge.errors import NoModel, NoRelease, StateError
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.compression.release.selftest import Tolerance
from prunecast.server.repository import Repository
from support.releases import publish_model

Publish = Callable[..., ReleaseManifest]
Start = Callable[..., Agent]

STEPS = [
    *("refresh metadata", "download manifest", "download files", "download patch", "apply patch"),
    *("free slot", "build slot", "verify slot", "self-test", "activate", "swap", "clean up"),
]


@pytest.fixture
def publish_failing(monkeypatch: pytest.MonkeyPatch, publish: Publish) -> Publish:
    """Publishes a release whose recorded outputs no device reproduces."""
    import prunecast.server.repository.authoring.build as build

    def publish_failing(number: int) -> ReleaseManifest:
        real = build.pack_arrays
        with monkeypatch.context() as patched:
            patched.setattr(
                build,
                "pack_arrays",
                lambda arrays: real({n: a + 1 if n == "output" else a for n, a in arrays.items()}),
            )
            return publish(number)

    return publish_failing


def test_a_failed_self_test_keeps_the_old_version(
    start: Start, publish: Publish, publish_failing: Publish, images: np.ndarray, network
) -> None:
    publish(1)
    agent = start()
    agent.update_once()
    publish_failing(2)
    result = agent.update_once()
    assert (result.outcome, result.version) == ("rejected", 1)
    assert "self-test" in str(result.reason)
    assert agent.model.infer({"input": images}).version == 1
    network.asked.clear()
    assert agent.update_once().outcome == "current"  # not tried again
    assert not any(path.startswith(("blobs/", "targets/")) for path, _ in network.asked)
    again = start()
    assert again.model.version == 1
    publish(3)
    assert again.update_once().version == 3


def test_a_model_that_onnxruntime_refuses_keeps_the_old_version(
    start: Start, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prunecast.client.edge.slots.slot as slot
    from prunecast.compression.release import RuntimeFailure

    publish(1)
    agent = start()
    agent.update_once()
    publish(2)

    def refuse(*args: object, **options: object) -> None:
        raise RuntimeFailure("no kernel for this operator on this device")

    monkeypatch.setattr(slot, "open_session", refuse)
    result = agent.update_once()
    assert result.outcome == "rejected"
    assert "no kernel" in str(result.reason)
    assert agent.model.version == 1


def test_a_first_release_that_fails_leaves_no_model(
    start: Start, publish_failing: Publish, config: AgentConfig
) -> None:
    publish_failing(1)
    agent = start()
    assert agent.update_once().outcome == "rejected"
    assert agent.model.version is None
    with pytest.raises(NoModel):
        open_model(config.state)


def test_a_tolerance_in_the_manifest_is_what_decides(
    start: Start, repository: Repository, graph, model, images: np.ndarray, monkeypatch
) -> None:
    import prunecast.server.repository.authoring.build as build

    real = build.pack_arrays
    monkeypatch.setattr(
        build,
        "pack_arrays",
        lambda arrays: real({n: a + 0.01 if n == "output" else a for n, a in arrays.items()}),
    )
    wide = Tolerance(atol=0.1, rtol=0.0, argmax=False)
    publish_model(repository, "toy", model(1), graph, selftest_inputs=images, tolerance=wide)
    result = start().update_once()
    assert result.outcome == "updated"
    assert result.difference == pytest.approx(0.01, rel=0.01)


def test_a_damaged_active_slot_falls_back_to_the_previous_one(
    start: Start, publish: Publish, config: AgentConfig
) -> None:
    publish(1)
    agent = start()
    agent.update_once()
    publish(2)
    agent.update_once()
    weights = config.state / "slots" / agent.status()["active"]["slot"] / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[5] ^= 1
    weights.write_bytes(data)
    assert open_model(config.state).version == 1
    again = start()
    assert again.model.version == 1
    assert "damaged" in again.status()["last_error"]
    # the disk was at fault and not the release: it is fetched again
    assert again.status()["rejected"] == {}
    assert again.update_once().version == 2
    assert again.model.version == 2


@pytest.mark.parametrize("file", ["weights.bin", "model.onnx", "release.json", "selftest.npz"])
def test_a_device_whose_only_slot_is_damaged_fetches_the_release_again(
    start: Start, publish: Publish, config: AgentConfig, images: np.ndarray, file: str
) -> None:
    publish(1)
    agent = start()
    agent.update_once()
    agent.confirm()
    path = config.state / "slots" / agent.status()["active"]["slot"] / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    again = start()
    with pytest.raises(NoModel):
        again.model.run({"input": images})
    assert "release 1" in again.status()["last_error"]
    result = again.update_once()
    assert (result.outcome, result.version) == ("updated", 1)
    assert again.model.run({"input": images})
    assert start().model.version == 1


def test_a_name_the_repository_does_not_have_is_an_error(
    start: Start, publish: Publish, repository: Repository
) -> None:
    publish(1, name="other")
    with pytest.raises(NoRelease, match=r"'toy'.*other"):
        start().update_once()


def test_a_release_that_is_never_confirmed_is_given_up(
    start: Start, publish: Publish, config: AgentConfig, kill: Callable[[], None]
) -> None:
    """A crash loop: the process starts with the release again and again and never gets far."""
    publish(1)
    agent = start()
    agent.update_once()
    agent.confirm()
    publish(2)
    agent.update_once()
    kill()
    versions = []
    for _ in range(3):
        versions.append(start().model.version)
        kill()
    assert versions == [2, 2, 1]
    assert "not confirmed after 3 starts" in str(start().status()["rejected"])
    assert start().update_once().outcome == "current"


def test_a_confirmed_release_is_not_given_up(start: Start, publish: Publish) -> None:
    publish(1)
    agent = start()
    agent.update_once()
    publish(2)
    agent.update_once()
    agent.confirm()
    assert [start().model.version for _ in range(5)] == [2] * 5


def test_the_last_confirmed_release_survives_an_update_over_an_unconfirmed_one(
    start: Start, publish: Publish, publish_failing: Publish
) -> None:
    publish(1)
    agent = start()
    agent.update_once()
    agent.confirm()
    publish(2)
    agent.update_once()
    publish_failing(3)
    assert agent.update_once().outcome == "rejected"
    assert agent.model.version == 2  # still in memory
    assert start().model.version == 1  # what is on disk is the confirmed one


def test_a_self_test_that_kills_the_process_is_not_repeated_forever(
    start: Start, publish: Publish, config: AgentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prunecast.client.edge.serving as module

    publish(1)
    start().update_once()
    publish(2)

    class Killed(BaseException):
        pass

    def die(*args: object, **options: object) -> None:
        raise Killed

    for _ in range(3):
        agent = start()
        with monkeypatch.context() as patched:
            patched.setattr(module, "open_slot", die)
            with pytest.raises(Killed):
                agent.update_once()
    agent = start()
    assert agent.model.version == 1
    result = agent.update_once()
    assert result.outcome == "rejected"
    assert "never ended" in str(result.reason)


def test_the_state_of_a_newer_agent_says_what_to_do(start: Start, config: AgentConfig) -> None:
    config.state.mkdir(parents=True)
    (config.state / "state.json").write_text('{"schema": 9}')
    with pytest.raises(StateError, match="update the agent"):
        start()


DRIVER = """
import os, pathlib, sys
sys.path.insert(0, {here!r})
from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.updating.transport import Fetcher, Stream
from tuf.api.exceptions import DownloadHTTPError

class Folder(Fetcher):
    def open(self, url, offset=0):
        path = pathlib.Path({repository!r}) / url.removeprefix("http://x/")
        if not path.is_file():
            raise DownloadHTTPError("missing", 404)
        return Stream(offset, iter([path.read_bytes()[offset:]]))

def step(name):
    if name == {step!r}:
        os._exit(9)

root = pathlib.Path({root!r}).read_bytes()
config = AgentConfig(pathlib.Path({state!r}), "http://x/", "toy", root, threads=1)
with Agent(config, fetcher=Folder(), on_step=step) as agent:
    agent.update_once()
"""


@pytest.mark.engine
@pytest.mark.parametrize("step", STEPS)
def test_kill_between_any_two_steps(
    step: str,
    publish: Publish,
    repository: Repository,
    config: AgentConfig,
    start: Start,
    tmp_path: Path,
    images: np.ndarray,
) -> None:
    """A process that ends without any clean-up, at every step of an update."""
    publish(1)
    with start() as agent:
        agent.update_once()
    publish(2)
    code = DRIVER.format(
        here=os.getcwd(),
        repository=str(repository.path),
        root=str(repository.path / "metadata" / "1.root.json"),
        state=str(config.state),
        step=step,
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert done.returncode == 9, done.stderr.decode()
    expected = 2 if step in ("swap", "clean up") else 1
    assert open_model(config.state).infer({"input": images}).version == expected
    again = start()
    assert again.model.version == expected
    again.update_once()
    assert again.model.version == 2


def test_confirming_waits_for_service(start: Start, publish: Publish, config: AgentConfig) -> None:
    publish(1)
    agent = start()
    agent.update_once()
    assert not agent.status()["active"]["confirmed"]
    agent.confirm()
    assert agent.status()["active"]["confirmed"]
    assert replace(config, confirm_after=1.0).confirm_after == 1.0
