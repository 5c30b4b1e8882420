"""A state folder that lost its state, or that cannot be written: what is there is served."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import prunecast.common.files as files
from prunecast.client.edge import Agent, AgentConfig, open_model
from prunecast.client.edge.errors import NoModel, StateError, TrustError
from prunecast.client.edge.state import read_status
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.server.repository import KeyRing, Repository

Publish = Callable[..., ReleaseManifest]
Start = Callable[..., Agent]


def _zero(path: Path) -> None:
    path.write_bytes(b"")


def _torn(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) // 2))


def _other(path: Path) -> None:
    path.write_text('{"schema": 1, "name": "toy"}')


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _missing(path: Path) -> None:
    path.unlink()


@pytest.fixture
def served(start: Start, publish: Publish, config: AgentConfig) -> AgentConfig:
    """Release 1 and, active, release 2."""
    for number in (1, 2):
        publish(number)
        agent = start()
        assert agent.update_once().version == number
        agent.confirm()
        agent.close()
    return config


@pytest.mark.parametrize("damage", [_zero, _torn, _other, _missing])
def test_a_damaged_state_is_recovered_from_the_slots(
    served: AgentConfig,
    start: Start,
    network,
    images: np.ndarray,
    damage: Callable[[Path], None],
) -> None:
    damage(served.state / "state.json")
    assert open_model(served.state).version == 2
    if damage is not _missing:
        assert "the agent recovers it" in read_status(served.state)["last_error"]
    network.down = True
    told: list[str] = []
    agent = start(on_warning=told.append)
    assert "release 2 is recovered from its slot" in told[0]
    assert agent.model.infer({"input": images}).version == 2
    assert "recovered" in agent.status()["last_error"]
    assert (agent.status()["previous"]["version"], len(told)) == (1, 1)
    network.down = False
    assert agent.update_once().outcome == "current"
    told.clear()
    assert start(on_warning=told.append).model.version == 2
    assert told == []


def test_a_state_that_is_a_folder_is_served_past(
    served: AgentConfig, start: Start, images: np.ndarray
) -> None:
    _folder(served.state / "state.json")
    told: list[str] = []
    agent = start(on_warning=told.append)
    assert agent.model.infer({"input": images}).version == 2
    assert any("the state is not kept" in line for line in told)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        *((_file, name) for name in ("metadata", "metadata/root_history", "slots", "slots/b")),
        *((_folder, f"metadata/{name}.json") for name in ("timestamp", "snapshot", "targets")),
        (_folder, "metadata/root_history/1.root.json"),
        (_pipe, "metadata/targets.json"),
        (_pipe, "metadata/time.floor"),
    ],
)
def test_what_is_in_the_place_of_something_else_ends_no_updates(
    served: AgentConfig, start: Start, publish: Publish, damage: Callable[[Path], None], place: str
) -> None:
    damage(served.state / place)
    publish(3)
    agent = start()
    assert agent.update_once().version == 3
    assert agent.model.version == 3


def test_only_what_was_signed_is_recovered(
    served: AgentConfig, start: Start, publish: Publish, network
) -> None:
    """A slot with a manifest of somebody else's making, intact as it may be, is not taken."""
    slots = served.state / "slots"
    current = json.loads((served.state / "state.json").read_bytes())["active"]["slot"]
    manifest = slots / current / "release.json"
    document = json.loads(manifest.read_bytes())
    manifest.write_text(json.dumps({**document, "version": 9}, sort_keys=True))
    _zero(served.state / "state.json")
    agent = start()
    assert agent.model.version == 1
    assert agent.update_once().version == 2


@pytest.mark.parametrize("what", ["targets.json", "root_history"])
def test_without_signed_metadata_nothing_is_recovered(
    served: AgentConfig, start: Start, what: str, tmp_path: Path
) -> None:
    metadata = served.state / "metadata"
    other = Repository.create(tmp_path / "other", KeyRing.create(tmp_path / "other-keys"))
    if what == "targets.json":
        shutil.copy(other.path / "metadata" / "1.targets.json", metadata / what)
    else:
        served = replace(served, root=other.trusted_root())
    _zero(served.state / "state.json")
    told: list[str] = []
    with Agent(served, on_warning=told.append) as agent:
        assert agent.model.version is None
    assert "no slot holds a release that was signed" in told[0]


def test_what_was_given_up_is_not_recovered(
    served: AgentConfig, start: Start, images: np.ndarray
) -> None:
    agent = start()
    agent.roll_back("worse recall")
    agent.close()
    _zero(served.state / "state.json")
    assert start().model.version == 1


def test_recovering_does_not_loosen_trust(
    served: AgentConfig, start: Start, network, publish: Publish
) -> None:
    """The metadata that were seen still detect a repository that has gone back."""
    old = {f"metadata/{p.name}": p.read_bytes() for p in (network.folder / "metadata").iterdir()}
    publish(3)
    assert start().update_once().version == 3
    start().close()
    _zero(served.state / "state.json")
    network.replaced |= old
    agent = start()
    assert agent.model.version == 3
    with pytest.raises(TrustError, match="older"):
        agent.update_once()


def test_an_empty_state_without_slots_begins_anew(
    start: Start, config: AgentConfig, publish: Publish
) -> None:
    publish(1)
    config.state.mkdir(parents=True)
    for content in ("", "{", "{}", '{"schema": 1, "name": "toy"}'):
        (config.state / "state.json").write_text(content)
        told: list[str] = []
        agent = start(on_warning=told.append)
        assert "fetched again" in told[0]
        assert agent.model.version is None
        with pytest.raises(NoModel):
            open_model(config.state)
        agent.close()
    assert start().update_once().version == 1


@pytest.fixture
def read_only(served: AgentConfig, tmp_path: Path) -> Iterator[Callable[[bool], None]]:
    """A function: the state folder becomes read-only, or writable again."""
    if os.geteuid() != 0:
        pytest.skip("needs to mount")
    made = []

    def mount(*arguments: str) -> None:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr}")

    def change(closed: bool) -> None:
        if not made:
            mount("--bind", str(served.state), str(served.state))
            made.append(served.state)
        mount("-o", f"remount,bind,{'ro' if closed else 'rw'}", str(served.state))

    yield change
    for path in made:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_read_only_file_system_is_served(
    served: AgentConfig,
    start: Start,
    publish: Publish,
    read_only: Callable[[bool], None],
    images: np.ndarray,
) -> None:
    read_only(True)
    told: list[str] = []
    agent = start(on_warning=told.append)
    assert agent.model.infer({"input": images}).version == 2
    assert "release 2 is served, and nothing is updated" in told[-1]
    assert agent.update_once().outcome == "current"
    publish(3)
    with pytest.raises(StateError, match="Read-only file system"):
        agent.update_once()
    assert agent.model.version == 2
    read_only(False)
    assert agent.update_once().version == 3


def test_a_read_only_folder_without_a_model_is_an_error(
    served: AgentConfig, start: Start, read_only: Callable[[bool], None]
) -> None:
    shutil.rmtree(served.state / "slots")
    read_only(True)
    with pytest.raises(StateError, match="Read-only file system"):
        start()


def test_an_unconfirmed_release_is_not_served_where_its_starts_cannot_be_counted(
    served: AgentConfig, start: Start, publish: Publish, read_only: Callable[[bool], None]
) -> None:
    publish(3)
    assert start().update_once().version == 3
    start().close()
    read_only(True)
    told: list[str] = []
    assert start(on_warning=told.append).model.version == 2
    assert any("release 2 is served until the next start" in line for line in told)
    start().close()
    read_only(False)
    assert start().model.version == 3


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function: from now on no file can be written, and none can be made."""

    def full() -> None:
        def refuse(*args: object, **options: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", refuse)
        monkeypatch.setattr(files, "_write", refuse)
        monkeypatch.setattr(os, "symlink", refuse)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))

    return full


def test_a_full_disk_with_nothing_to_do_fails_no_check(
    served: AgentConfig,
    start: Start,
    publish: Publish,
    full: Callable[[], None],
    images: np.ndarray,
) -> None:
    full()
    told: list[str] = []
    agent = start(on_warning=told.append)
    assert [agent.update_once().outcome for _ in range(3)] == ["current"] * 3
    assert sum("the status is not kept" in line for line in told) == 1
    assert all("No space left" in line for line in told)
    agent.confirm()
    assert agent.model.infer({"input": images}).version == 2


def test_a_full_disk_does_not_end_the_loop(
    served: AgentConfig, network, publish: Publish, full: Callable[[], None]
) -> None:
    """A release is confirmed in memory where the disk does not take it."""
    publish(3)
    with Agent(replace(served, confirm_after=0.05), fetcher=network) as agent:
        assert agent.update_once().version == 3
        full()
        stop, results = threading.Event(), []

        def look(result: object) -> None:
            results.append(result)
            if agent._kept.state.active.confirmed:
                stop.set()

        agent.run(0.05, stop=stop, on_result=look)
        assert agent.model.version == 3
        assert {r.outcome for r in results} == {"current"}
