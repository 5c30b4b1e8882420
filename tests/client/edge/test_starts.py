"""How starts end, and what of that a release has to answer for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import prunecast.client.edge.starts as starts
from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.config import UpdateResult
from prunecast.client.edge.errors import EdgeError, MemoryShort
from prunecast.compression.release import OutOfMemory
from prunecast.compression.release.manifest import ReleaseManifest

Publish = Callable[..., ReleaseManifest]
Start = Callable[..., Agent]
Kill = Callable[[], None]


class Machine:
    """What the system tells: which boot this is, and how many processes it killed for memory."""

    def __init__(self, folder: Path) -> None:
        self.boot, self.counters = folder / "boot_id", folder / "vmstat"
        self.boots = self.kills = 0
        self.power_cut()
        self.kill_for_memory()

    def power_cut(self) -> None:
        self.boots += 1
        self.boot.write_text(f"boot-{self.boots}\n")

    def kill_for_memory(self) -> None:
        self.kills += 1
        self.counters.write_text(f"pgfault 17\noom_kill {self.kills}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(starts, "_BOOT", made.boot)
    monkeypatch.setattr(starts, "_OOM_COUNTERS", (made.counters, tmp_path / "absent"))
    return made


@pytest.fixture
def two(start: Start, publish: Publish, machine: Machine) -> Agent:
    """Release 1 confirmed, release 2 active and not confirmed."""
    publish(1)
    agent = start()
    agent.update_once()
    agent.confirm()
    publish(2)
    assert agent.update_once().version == 2
    return agent


def _active(config: AgentConfig) -> dict[str, object]:
    found: dict[str, object] = json.loads((config.state / "state.json").read_bytes())["active"]
    return found


def _serve(agent: Agent) -> None:
    """Run until the first check is over."""
    stop = threading.Event()

    def over(result: UpdateResult | EdgeError) -> None:
        assert isinstance(result, UpdateResult)
        stop.set()

    agent.run(3600, stop=stop, on_result=over)


def test_clean_ends_count_against_nobody(two: Agent, start: Start, config: AgentConfig) -> None:
    assert [start().model.version for _ in range(8)] == [2] * 8
    start().close()
    assert start().status()["rejected"] == {}
    assert _active(config)["starts"] == 0


def test_service_of_several_starts_adds_up(
    two: Agent, start: Start, config: AgentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four starts of 20 seconds that end cleanly: the third confirms."""
    import prunecast.client.edge.agent as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    served = []
    for _ in range(4):
        agent = start()
        stop = threading.Event()

        def over(_: object, stop: threading.Event = stop) -> None:
            now[0] += 20.0
            stop.set()

        agent.run(3600, stop=stop, on_result=over)
        agent.close()
        served.append((_active(config)["served"], _active(config)["confirmed"]))
    assert served == [(20.0, False), (40.0, False), (0.0, True), (0.0, True)]


def test_kills_do_not_add_up_to_a_confirmation(
    two: Agent, start: Start, kill: Kill, config: AgentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that crashes after 40 seconds each time is given up, not confirmed."""
    import prunecast.client.edge.agent as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    versions = []
    for _ in range(4):
        agent = start()
        versions.append(agent.model.version)
        stop = threading.Event()

        def over(_: object, stop: threading.Event = stop, agent: Agent = agent) -> None:
            now[0] += 40.0
            agent._kept.note_service(agent.model.version)
            kill()  # what is written after this is lost
            stop.set()

        agent.run(3600, stop=stop, on_result=over)
    assert versions == [2, 2, 2, 1]


def test_a_power_cut_counts_for_a_third_of_a_start(
    two: Agent, start: Start, kill: Kill, machine: Machine
) -> None:
    versions = []
    for _ in range(9):
        kill()
        machine.power_cut()
        versions.append(start().model.version)
    assert versions == [2] * 8 + [1]  # bounded all the same: it may be what resets the machine


def test_a_device_that_is_always_cut_off_confirms_its_releases(
    start: Start, publish: Publish, kill: Kill, machine: Machine, config: AgentConfig
) -> None:
    """How the release before it ended is how this device is used."""
    publish(1)
    start().update_once()
    start().confirm()
    for _ in range(3):
        start()
        kill()
        machine.power_cut()
    publish(2)
    agent = start()
    agent.update_once()
    for _ in range(12):
        agent._kept.note(replace(agent._kept.begun, served=15.0))  # type: ignore[type-var]
        kill()
        machine.power_cut()
        agent = start()
        assert agent.model.version == 2
    assert agent.status()["rejected"] == {}
    assert _active(config)["served"] == 12 * 15.0  # the next check confirms it
    _serve(agent)
    assert _active(config)["confirmed"]


def test_kills_for_memory_count_for_a_third_of_a_start(
    two: Agent, start: Start, kill: Kill, machine: Machine
) -> None:
    versions = []
    for _ in range(9):
        kill()
        machine.kill_for_memory()
        versions.append(start().model.version)
    assert versions == [2] * 8 + [1]


def test_a_kill_that_the_release_before_suffered_as_well_is_not_its_own(
    start: Start, publish: Publish, kill: Kill, machine: Machine
) -> None:
    publish(1)
    start().update_once()
    start().confirm()
    for _ in range(3):
        start()
        kill()
    publish(2)
    start().update_once()
    for _ in range(6):
        kill()
        assert start().model.version == 2
    assert start().status()["rejected"] == {}


def test_a_release_is_forgiven_when_the_one_before_it_ends_in_the_same_way(
    two: Agent, start: Start, kill: Kill
) -> None:
    for _ in range(3):
        kill()
        agent = start()
    assert agent.model.version == 1
    assert agent.failure(2).kind == "crash loop"  # type: ignore[union-attr]
    told: list[str] = []
    for _ in range(3):
        assert start(on_warning=told.append).update_once().version == 1
        kill()
    agent = start(on_warning=told.append)
    assert "may be tried again" in told[-1]
    assert (agent.model.version, agent.failure(2)) == (1, None)
    assert agent.update_once().version == 2
    for _ in range(4):
        kill()
        assert start().model.version == 2


def test_a_kill_during_an_installation_is_not_charged_to_what_runs(
    two: Agent, start: Start, publish: Publish, kill: Kill, config: AgentConfig
) -> None:
    publish(3)

    class Killed(BaseException):
        pass

    for step in ("download files", "apply patch", "download keyframe", "build slot") * 2:

        def die(now: str, step: str = step) -> None:
            if now == step:
                raise Killed

        agent = start(on_step=die)
        assert agent.model.version in (1, 2)
        if step == "download keyframe":
            continue
        with pytest.raises(Killed):
            agent.update_once()
        kill()
    agent = start()
    assert agent.status()["rejected"] == {}
    assert _active(config)["starts"] == 0
    assert agent.update_once().version == 3


def test_a_crash_of_the_program_around_it_counts_and_a_lost_network_does_not(
    two: Agent, start: Start, config: AgentConfig, network
) -> None:
    with pytest.raises(ZeroDivisionError), start():
        _ = 1 / 0
    start().close()
    assert _active(config)["starts"] == 1.0
    network.down = True
    with pytest.raises(EdgeError), start() as agent:
        agent.update_once()
    for kind in (KeyboardInterrupt, SystemExit, BrokenPipeError):
        with pytest.raises(kind), start():
            raise kind
    assert _active(config)["starts"] == 1.0


@pytest.mark.parametrize("when", ["start", "installation"])
def test_too_little_memory_is_no_fault_of_a_release(
    two: Agent, start: Start, publish: Publish, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """It has passed its trial, in a process of its own, within the same bounds."""
    import prunecast.client.edge.slots.slot as module

    real, fails = module.open_session, [True]

    def short(path: Path, **options: object) -> object:
        if (
            fails[0]
            and json.loads((path.parent / "release.json").read_bytes())["version"] == wanted
        ):
            fails[0] = False
            raise OutOfMemory("it needs more memory than there is")
        return real(path, **options)  # type: ignore[arg-type]

    wanted = 2 if when == "start" else 3
    monkeypatch.setattr(module, "open_session", short)
    told: list[str] = []
    agent = start(on_warning=told.append)
    if when == "start":
        assert agent.model.version == 1
        assert "release 1 is served until the next start" in told[0]
        assert start().model.version == 2
    else:
        publish(3)
        with pytest.raises(MemoryShort, match="too little memory for release 3"):
            agent.update_once()
        assert agent.model.version == 2
        assert agent.update_once().version == 3
    assert start().status()["rejected"] == {}


def test_a_kill_during_a_trial_is_not_charged_to_the_release(
    two: Agent, start: Start, publish: Publish, kill: Kill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release runs in a process of its own meanwhile, and can end only that one."""
    publish(3)

    class Killed(BaseException):
        pass

    def die(*args: object, **options: object) -> None:
        raise Killed

    for _ in range(5):
        agent = start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("prunecast.client.edge.slots.slot.try_release", die)
            with pytest.raises(Killed):
                agent.update_once()
        kill()
    assert start().update_once().version == 3


def test_a_kill_after_a_passed_trial_counts_for_a_third(
    two: Agent, start: Start, publish: Publish, kill: Kill
) -> None:
    publish(3)

    class Killed(BaseException):
        pass

    def die(*args: object, **options: object) -> None:
        raise Killed

    results = []
    for _ in range(10):
        agent = start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("prunecast.client.edge.slots.slot.patiently", die)
            try:
                results.append(agent.update_once().outcome)
            except Killed:
                kill()
    assert results == ["rejected"]  # at the tenth


def test_a_self_test_that_a_power_cut_ended_may_be_repeated(
    two: Agent, start: Start, publish: Publish, kill: Kill, machine: Machine
) -> None:
    publish(3)

    class Cut(BaseException):
        pass

    import prunecast.client.edge.serving as module

    def cut(*args: object, **options: object) -> None:
        raise Cut

    for _ in range(5):
        agent = start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "open_slot", cut)
            with pytest.raises(Cut):
                agent.update_once()
        kill()
        machine.power_cut()
    assert start().update_once().version == 3


def test_states_of_older_agents_are_read(two: Agent, start: Start, config: AgentConfig) -> None:
    two.close()
    path = config.state / "state.json"
    document = json.loads(path.read_bytes())
    for slot in ("active", "previous"):
        for field in ("served", "ends", "passed"):
            del document[slot][field]
        document[slot]["starts"] = 1
    path.write_text(json.dumps(document))
    assert start().model.version == 2
