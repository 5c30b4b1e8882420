"""Agents under a fleet, over TLS on loopback."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tuf.api.exceptions import DownloadHTTPError

from prunecast.client.edge import Agent
from prunecast.client.edge.control import ControlChannel, ControlFetcher
from prunecast.client.edge.state import StateFolder
from prunecast.client.edge.updating.acquire import Download
from prunecast.common.files import file_digest
from prunecast.common.fleet_protocol import CHUNK_BYTES
from prunecast.compression.release.manifest import FileRef, blob_path
from prunecast.server.control import ControlServer
from prunecast.server.fleet.audit import AuditKind
from prunecast.server.fleet.events import Abort, PinDevice, StartRollout
from prunecast.server.fleet.model import Device, Release, RolloutPolicy
from prunecast.server.fleet.service import FleetService
from prunecast.server.repository import Repository
from support.authority import Authority
from support.control import LIMITS

pytestmark = pytest.mark.engine

Enrol = Callable[[str], Any]
Look = Callable[[str], Device]
Until = Callable[..., None]


def test_up_by_a_rollout_and_down_when_it_is_aborted(
    enrol: Enrol, device: Look, fleet: FleetService, wait_until: Until
) -> None:
    one = enrol("cam1")
    one.start()
    wait_until(lambda: device("cam1").told.outcome, "it reports the stable release")
    assert one.version == 1  # although 2 is live and higher
    fleet.operate(
        StartRollout(
            at=time.time(),
            rollout="r2",
            release=Release("toy", 2),
            groups=("lab",),
            stages=(100,),
            policy=RolloutPolicy(automatic=False),
        )
    )
    wait_until(lambda: fleet.rollout("r2").tally.confirmed, "it reports success")
    assert (one.version, device("cam1").running) == (2, 2)
    fleet.operate(Abort(at=time.time(), rollout="r2"))
    wait_until(lambda: device("cam1").running == 1, "it goes down")
    assert one.version == 1
    wait_until(lambda: device("cam1").told.outcome == "confirmed", "it says so")
    last = one.results[-1]
    assert (last.version, last.reason) in ((1, "it was in the other slot"), (1, None))
    health = fleet.health("cam1")
    assert health is not None
    assert health[0].figures["starts"] == 1


def test_without_a_server_the_agent_keeps_what_it_was_told(
    enrol: Enrol, device: Look, wait_until: Until
) -> None:
    one = enrol("cam2")
    one.start()
    wait_until(lambda: device("cam2").told.outcome, "it runs the stable release")
    one.end()
    # nobody is there: 2 is live, but the last directive says 1
    one.move("127.0.0.1:9", None)
    one.start(interval=0.05)
    wait_until(lambda: len(one.results) > 5 and one.events, "it goes on polling")
    one.end()
    assert one.version == 1
    assert "control server (unavailable)" in str(one.events[-1])
    # a device that never heard a directive installs nothing
    new = enrol("cam3")
    new.move("127.0.0.1:9", None)
    new.start(interval=0.05)
    wait_until(lambda: len(new.results) > 2, "it polls")
    assert new.version is None


def test_a_server_that_comes_back_gets_what_happened_meanwhile_once(
    enrol: Enrol,
    device: Look,
    fleet: FleetService,
    database: str,
    repository: Repository,
    authority: Authority,
    wait_until: Until,
) -> None:
    certificate, key = authority.server()
    options: dict[str, Any] = {"certificate": certificate, "key": key, "limits": LIMITS}
    one = enrol("cam4")
    with ControlServer(database, repository.path, interval=0.1, **options) as first:
        one.move(first.address, authority.ca)
        one.start()
        wait_until(lambda: device("cam4").told.outcome, "1 is reported")
        fleet.operate(PinDevice(at=time.time(), device="cam4", version=2))
        told = lambda: (device("cam4").told.version, device("cam4").told.outcome)  # noqa: E731
        wait_until(lambda: told() == (2, "confirmed"), "2 is reported")
    wait_until(lambda: one.events[-1] is not True, "it notices")
    one.agent.roll_back("worse recall")  # as the program around it may decide
    one.controller.note(one.results[-1])
    one.end()
    waiting = json.loads((one.config.state / "control.json").read_bytes())["reports"]
    assert [r["answer"]["outcome"] for r in waiting if r["answer"]] == ["rolled back"]
    one.start()  # another process, still without a server
    with ControlServer(database, repository.path, port=first.port, **options):
        wait_until(lambda: told() == (2, "rolled back"), "the failure arrives")
        wait_until(lambda: len(one.controller.store) == 0, "and is crossed off")
        kinds = [e.kind for e in fleet.audit(subject="cam4")]
        assert kinds.count(AuditKind.RELEASE_FAILED) == 1
        assert device("cam4").refused == {2}
        one.end()


def test_a_crash_loop_is_reported_by_the_next_process(
    enrol: Enrol, device: Look, fleet: FleetService, wait_until: Until
) -> None:
    one = enrol("cam5")
    one.start()
    wait_until(lambda: device("cam5").told.outcome, "1 is reported")
    fleet.operate(PinDevice(at=time.time(), device="cam5", version=2))
    wait_until(lambda: device("cam5").running == 2, "2 is reported")
    one.end()
    folder = StateFolder(one.config.state)
    document = json.loads((folder.path / "state.json").read_bytes())
    document["active"] |= {"confirmed": False, "starts": 3}  # it died again and again
    folder.write_json("state.json", document)
    one.start()
    assert one.version == 1
    wait_until(lambda: device("cam5").told.outcome == "crash loop", "that is reported")
    assert 2 in device("cam5").refused


def test_strangers_and_confusions_are_told_what_is_wrong(
    enrol: Enrol, device: Look, fleet: FleetService, wait_until: Until
) -> None:
    one, other = enrol("cam6"), enrol("cam7")
    good = one.token_file.read_text()
    one.token_file.write_text("A" * 43)
    one.start()
    wait_until(lambda: one.events, "it is refused")
    assert "the token is unknown or revoked" in str(one.events[0])
    one.token_file.write_text(good)  # is read again at the next connection
    wait_until(lambda: one.version == 1, "it is let in")
    one.end()
    # the same state folder with another device's token: what belongs to the old one is dropped
    one.token_file.write_text(other.token_file.read_text())
    one.start()
    wait_until(lambda: device("cam7").told.outcome == "confirmed", "it is the other one now")
    one.end()
    assert json.loads((one.config.state / "control.json").read_bytes())["device"] == "cam7"
    one.config = replace(one.config, state=one.config.state.with_name("new"), name="digits")
    one.start()
    wait_until(lambda: "--name toy" in str(one.events[-1]), "it follows another release")


def test_a_device_with_a_certificate_needs_no_token(
    enrol: Enrol,
    device: Look,
    database: str,
    repository: Repository,
    authority: Authority,
    wait_until: Until,
) -> None:
    certificate, key = authority.server("mutual")
    one = enrol("cam11")
    one.token_file.unlink()
    with ControlServer(
        *(database, repository.path),
        certificate=certificate, key=key, client_ca=authority.ca, interval=0.1,
    ) as mutual:  # fmt: skip
        one.move(mutual.address, authority.ca)
        pair = authority.device("cam11")
        one.settings = replace(one.settings, token_file=None, certificate=pair)
        one.start()
        wait_until(lambda: device("cam11").told.outcome == "confirmed", "it is known by its name")
        one.end()


def test_a_server_of_another_authority_is_refused(
    enrol: Enrol, tmp_path: Path, wait_until: Until
) -> None:
    one = enrol("cam8")
    foreign = Authority(tmp_path / "foreign")
    one.move(one.settings.address, foreign.ca)
    one.start()
    wait_until(lambda: one.events, "it is refused")
    assert "--control-ca" in str(one.events[0])
    assert one.version is None


def test_files_resume_where_a_transfer_broke(
    enrol: Enrol, repository: Repository, tmp_path: Path
) -> None:
    content = bytes(range(251)) * 10_000
    path = tmp_path / "content"
    path.write_bytes(content)
    sha = file_digest(path)
    (repository.path / blob_path(sha)).write_bytes(content)
    line = ControlChannel(enrol("cam9").settings)
    url = line.settings.url + blob_path(sha)
    asked: list[int] = []

    class Breaking(ControlFetcher):
        def open(self, url: str, offset: int = 0) -> Any:
            asked.append(offset)
            stream = super().open(url, offset)
            if len(asked) > 1:
                return stream

            def cut() -> Any:
                yield next(stream.chunks)
                line.reset()  # the connection is gone
                yield from stream.chunks

            return type(stream)(stream.start, cut())

    target = tmp_path / "target"
    ref = FileRef(sha, len(content))
    Download(Breaking(line), url, ref, target, wait=lambda _: None).run()
    assert target.read_bytes() == content
    assert asked[0] == 0
    assert asked[1] >= CHUNK_BYTES
    fetcher = ControlFetcher(line)
    for wrong, offset, status in (
        ("blobs/" + "0" * 64, 0, 404),
        ("../keys", 0, 400),
        (blob_path(sha), len(content) + 1, 416),
    ):
        with pytest.raises(DownloadHTTPError) as caught:
            fetcher.open(line.settings.url + wrong, offset)
        assert caught.value.status_code == status
    line.reset()


def test_an_agent_without_control_goes_to_the_highest(enrol: Enrol) -> None:
    one = enrol("cam10")
    line = ControlChannel(one.settings)
    with Agent(one.config, fetcher=ControlFetcher(line)) as agent:
        assert agent.update_once().version == 2
    line.reset()
