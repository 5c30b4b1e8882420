"""Releases that never end, or take all memory, are rejected; the agent goes on and can be ended."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from prunecast.cli.edge import _line
from prunecast.cli.main import app
from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.config import Bounds, memory_bytes
from prunecast.client.edge.control.controller import fleet_figures
from prunecast.client.edge.errors import NetworkError, StateError
from prunecast.client.edge.slots import trial
from prunecast.client.edge.slots.slot import open_slot
from prunecast.common import bounded
from prunecast.compression.release import OutOfMemory, OutOfTime, RuntimeFailure, SelfTestFailed
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.compression.release.overseer import OVERSEER
from prunecast.compression.release.runtime import InferenceSession
from prunecast.compression.release.selftest import pack_arrays
from prunecast.server.repository import Repository
from prunecast.server.repository.authoring import ReleaseRecipe
from prunecast.server.repository.authoring.sources import from_onnx
from support import endless, foreign
from support.network import Network

SHORT = Bounds(seconds=5.0, inference_bytes=64 << 20)


def _open(folder: Path, model: onnx.ModelProto, bounds: Bounds = SHORT, **options) -> object:
    manifest = endless.make_slot(folder, model)
    return open_slot(folder, manifest, threads=1, bounds=bounds, **options)


@pytest.mark.parametrize("make", [endless.endless, endless.endless_in_function, endless.folding])
def test_what_never_ends_is_refused(make: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    """In the self-test, and in loading, which nothing but the end of a process breaks off."""
    with pytest.raises(OutOfTime, match="did not end within 5 seconds"):
        _open(tmp_path / "slot", make(), replace(SHORT, inference_bytes=2 << 30))
    assert not OVERSEER.is_late(0.0)


@pytest.mark.parametrize("values", [2**26, 2**33, 2**40])
def test_small_graphs_that_become_gigabytes_are_refused(values: int, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match="raise --inference-memory"):
        _open(tmp_path / "slot", endless.hungry(values), replace(SHORT, seconds=60.0))


def test_a_self_test_that_needs_more_memory_than_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "slot"
    manifest = endless.make_slot(folder, endless.outer())
    rows = {"x": np.ones((6000, 4), np.float32)}  # 144 MB for the square
    (folder / "selftest.npz").write_bytes(pack_arrays(rows))
    (folder / "expected.npz").write_bytes(pack_arrays({"y": rows["x"]}))
    with pytest.raises(OutOfMemory, match="more than the 67,"):
        open_slot(folder, manifest, threads=1, bounds=SHORT)
    more = Bounds(inference_bytes=512 << 20)
    with pytest.raises(SelfTestFailed, match="differ"):  # it runs, and is wrong
        open_slot(folder, manifest, threads=1, bounds=more)


def _refused() -> onnx.ModelProto:
    return foreign.model(
        [onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])],
        [foreign.value("x", "n", 4)],
        [foreign.value("y", "n", 4)],
        [],
    )


def test_a_refusal_in_the_trial_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match="NoSuchOperator"):
        _open(tmp_path / "slot", _refused(), replace(SHORT, seconds=60.0))


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (bounded.ChildKilled(11), RuntimeFailure, "crashed with this model: ended by SIGSEGV"),
        (bounded.ChildKilled(9), StateError, "want of memory.*tried again"),
        (bounded.ChildFailed("MemoryError", ""), OutOfMemory, "raise --inference-memory"),
        (bounded.ChildFailed("NoAnswer", "no answer"), StateError, "no answer"),
    ],
)
def test_how_a_trial_ends_says_whose_fault_it_is(
    error: Exception, expected: type[Exception], words: str, tmp_path: Path, monkeypatch
) -> None:
    def end(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(trial, "call_bounded", end)
    with pytest.raises(expected, match=words):
        _open(tmp_path / "slot", endless.outer())


def test_a_release_that_has_passed_here_is_not_tried_again(
    start: Callable[..., Agent], publish: Callable[[int], ReleaseManifest], monkeypatch
) -> None:
    publish(1)
    start().update_once()
    tried = []
    monkeypatch.setattr(
        "prunecast.client.edge.slots.slot.try_release", lambda *_, **__: tried.append(1)
    )
    assert start().model.version == 1
    assert tried == []
    monkeypatch.setattr("onnxruntime.__version__", "99.0.0")
    assert start().model.version == 1
    assert tried == [1]
    assert start().model.version == 1
    assert tried == [1]


@pytest.fixture
def publish_endless(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """Publishes a release that states outputs which nobody ever computed."""

    def publish() -> None:
        onnx.save(endless.endless(), tmp_path / "endless.onnx")
        with monkeypatch.context() as patch:
            patch.setattr(InferenceSession, "run", lambda self, inputs, **_: {"y": inputs["x"]})
            contents = from_onnx(tmp_path / "endless.onnx", inputs=endless.INPUTS)
            repository.publish("toy", contents, at_least=1)

    return publish


def test_an_endless_release_is_rejected_and_the_old_one_serves(
    config: AgentConfig,
    network: Network,
    publish: Callable[[int], ReleaseManifest],
    publish_endless: Callable[[], None],
    images: np.ndarray,
) -> None:
    publish(1)
    with Agent(replace(config, bounds=SHORT), fetcher=network, wait=lambda _: None) as agent:
        assert agent.update_once().version == 1
        publish_endless()
        result = agent.update_once()
        assert (result.outcome, result.version) == ("rejected", 1)
        assert "release 2: loading and the self-test did not end within 5 seconds" in str(
            result.reason
        )
        assert agent.model.infer({"input": images}).version == 1
        assert agent.update_once().outcome == "current"  # not tried again
        publish(3)
        assert agent.update_once().version == 3


def test_the_agent_can_be_ended_during_a_trial(
    config: AgentConfig,
    network: Network,
    publish: Callable[[int], ReleaseManifest],
    publish_endless: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes no notice of the 600 seconds, and the release is not charged with it."""
    publish(1)
    stop = threading.Event()

    def wait(seconds: float) -> None:
        if stop.wait(seconds):
            raise NetworkError("the agent was asked to end")

    real = trial.call_bounded

    def stopping(*arguments: object, **options: object) -> object:
        stop.set()
        return real(*arguments, **options)  # type: ignore[arg-type]

    patient = replace(config, bounds=Bounds(seconds=600.0))
    with Agent(patient, fetcher=network, wait=wait) as agent:
        assert agent.update_once().version == 1
        publish_endless()
        monkeypatch.setattr(trial, "call_bounded", stopping)
        with pytest.raises(NetworkError, match="asked to end"):
            agent.update_once()
        assert agent.model.version == 1
        assert agent.status()["rejected"] == {}


def test_loading_in_the_agent_is_left_when_it_is_asked_to_end() -> None:
    """The thread stays behind, and the process counts as late until it is done."""
    begun, over = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        over.wait(60)

    def poll() -> None:
        if begun.is_set():
            raise NetworkError("the agent was asked to end")

    with pytest.raises(NetworkError):
        trial.patiently(work, 600.0, poll)
    assert OVERSEER.is_late(0.0)
    over.set()
    while OVERSEER.is_late(0.0):
        pass


def test_loading_in_the_agent_that_nobody_can_break_off() -> None:
    over = threading.Event()
    with pytest.raises(OutOfTime, match="did not end within 0 seconds"):
        trial.patiently(lambda: over.wait(60), 0.01, lambda: None)
    assert OVERSEER.is_late(1.0)
    over.set()
    while OVERSEER.is_late(0.0):
        pass


def test_the_memory_of_a_control_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/self/cgroup": "0::/system.slice/edge.service\n",
        "/sys/fs/cgroup/system.slice/edge.service/memory.max": "max\n",
        "/sys/fs/cgroup/system.slice/memory.max": "268435456\n",
    }

    def read(path: Path) -> str:
        if (text := files.get(str(path))) is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert memory_bytes() == 256 << 20


def test_a_device_says_with_which_settings_a_release_runs(
    start: Callable[..., Agent], repository: Repository, config: AgentConfig, tmp_path: Path
) -> None:
    """In the result of the update, in the telemetry, in the status and in what is printed."""
    onnx.save(foreign.shared_zeros(), tmp_path / "m.onnx")
    release = ReleaseRecipe(onnx=tmp_path / "m.onnx").release(repository, "toy")
    assert release.settings["session.x64quantprecision"] == "refused"
    agent = start()
    result = agent.update_once()
    assert (result.outcome, result.version) == ("updated", 1)
    assert result.settings["session.x64quantprecision"] == "refused"
    assert "onnxruntime: session.x64quantprecision refused" in _line(result)
    snapshot = agent.telemetry.snapshot()
    assert snapshot.releases[0].settings == result.settings
    assert fleet_figures(snapshot)["settings_refused"] == 1
    agent.close()
    shown = CliRunner().invoke(app, ["edge", "status", "--state", str(config.state)]).output
    assert "onnxruntime: session.x64quantprecision refused" in " ".join(shown.split())
    told = json.loads(
        CliRunner().invoke(app, ["edge", "status", "--state", str(config.state), "--json"]).output
    )
    assert told["telemetry"]["releases"][0]["settings"] == result.settings
