"""A device's clock that is wrong: behind, far ahead, and what is said about it."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import tuf.ngclient._internal.trusted_metadata_set as tuf_set
from tuf.api.exceptions import DownloadError

import support.authority as authority_module
from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.control import ControlChannel, ControlFetcher, ControlSettings
from prunecast.client.edge.errors import TrustError
from prunecast.client.edge.updating.clock import TimeFloor
from prunecast.client.edge.updating.proxies import Proxies
from prunecast.client.edge.updating.transport import HttpFetcher
from prunecast.common import clock as common_clock
from prunecast.common.clock import BUILT, ClockWrong
from prunecast.common.fleet_protocol import add_servicer
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.server.repository import KeyRing, Repository
from prunecast.server.repository.serving import ReleaseServer
from support.authority import Authority
from support.releases import publish_model

Publish = Callable[..., ReleaseManifest]
Start = Callable[..., Agent]
SetClock = Callable[[datetime], None]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """A function: what tuf takes for the time from now on."""

    def set_clock(at: datetime) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
                return at

        fake = SimpleNamespace(datetime=Clock, timezone=dt.timezone)
        monkeypatch.setattr(tuf_set, "datetime", fake)

    return set_clock


@pytest.mark.parametrize("behind", [timedelta(days=400), datetime.now(UTC) - EPOCH])
def test_a_clock_that_is_behind_does_not_keep_metadata_from_expiring(
    start: Start, publish: Publish, set_clock: SetClock, behind: timedelta
) -> None:
    """A freeze: the same metadata for ever, to a device that wakes up in the past."""
    now = datetime.now(UTC)
    publish(1)
    agent = start()
    assert agent.update_once().version == 1
    set_clock(now + timedelta(days=30))
    with pytest.raises(TrustError, match=r"timestamp.json is expired, since 20\d\d-\d\d-\d\d"):
        agent.update_once()
    told: list[str] = []
    again = start(on_warning=told.append)
    for at in (now - behind, now - behind + timedelta(minutes=5)):
        set_clock(at)
        with pytest.raises(TrustError, match=r"past for certain.*set the clock"):
            again.update_once()
    assert told == [line for line in told if f"it says {now - behind:%Y-%m-%d}" in line]
    assert len(told) == 1
    assert again.model.version == 1
    set_clock(now)
    assert again.update_once().outcome == "current"


def test_a_device_that_wakes_up_in_1970_still_updates(
    start: Start, publish: Publish, set_clock: SetClock
) -> None:
    """Before it has heard the time, say: what is fresh is taken, and the clock is named."""
    publish(1)
    start().update_once()
    set_clock(EPOCH)
    publish(2)
    told: list[str] = []
    agent = start(on_warning=told.append)
    assert agent.update_once().version == 2
    assert "this device's clock is behind: it says 1970-01-01" in told[0]
    assert told[0] == agent.status()["last_warning"]
    set_clock(datetime.now(UTC))
    agent.update_once()
    assert agent.status()["last_warning"] is None


def _old_repository(
    folder: Path, keys: KeyRing, graph: ExportedGraph, model: object, images: object, at: datetime
) -> Repository:
    made = Repository.create(folder, keys, now=lambda: at)
    publish_model(made, "toy", model(1), graph, selftest_inputs=images)  # type: ignore[operator]
    return made


def test_a_new_device_knows_when_it_was_made(
    network,
    graph: ExportedGraph,
    model: object,
    images: object,
    tmp_path: Path,
    config: AgentConfig,
    keys: KeyRing,
    set_clock: SetClock,
) -> None:
    old = _old_repository(tmp_path / "old", keys, graph, model, images, BUILT - timedelta(days=30))
    network.folder = old.path
    set_clock(EPOCH)
    with (
        Agent(replace(config, root=old.trusted_root()), fetcher=network) as agent,
        pytest.raises(TrustError, match=f"judged by {BUILT:%Y-%m-%d} 00:00 UTC"),
    ):
        agent.update_once()


def test_what_is_signed_tells_a_device_without_a_clock_the_time(
    start: Start, publish: Publish, network, keys: KeyRing, set_clock: SetClock, config: AgentConfig
) -> None:
    """A release that was made later than the floor moves the time on, and locks nobody out."""
    now = datetime.now(UTC)
    set_clock(EPOCH)
    publish(1)
    start().update_once()
    kept = json.loads((config.state / "metadata" / "time.floor").read_bytes())
    assert abs(kept["seen"] - now.timestamp()) < 120
    assert kept["floor"] == 0.0


def test_a_clock_far_ahead_is_named_and_does_not_lock_the_device_out(
    start: Start, publish: Publish, set_clock: SetClock
) -> None:
    publish(1)
    agent = start()
    assert agent.update_once().version == 1
    set_clock(datetime(2099, 1, 1, tzinfo=UTC))
    with pytest.raises(TrustError, match="clock says 2099-01-01 00:00 UTC, far ahead of"):
        agent.update_once()
    set_clock(EPOCH)  # the best that is known is now 2099, until the clock is set
    with pytest.raises(TrustError, match=r"judged by 2099-01-01.*set the clock"):
        start().update_once()
    set_clock(datetime.now(UTC))
    assert start().update_once().outcome == "current"
    set_clock(EPOCH)  # the clock that was right has corrected it
    assert start().update_once().outcome == "current"


def test_a_little_ahead_names_the_clock_and_the_remedy(
    start: Start, publish: Publish, set_clock: SetClock
) -> None:
    publish(1)
    start().update_once()
    at = datetime.now(UTC) + timedelta(days=9)
    set_clock(at)
    with pytest.raises(TrustError, match=rf"clock says {at:%Y-%m-%d} .*prunecast release renew"):
        start().update_once()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b'{"schema": 2}', b'{"schema": 1, "floor": 1e300, "seen": -1e300}'],
)
def test_a_damaged_floor_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "time.floor").write_bytes(content)
    floor = TimeFloor(tmp_path)
    assert floor.floor == BUILT
    assert floor.judge(EPOCH) == BUILT
    now = datetime.now(UTC)
    floor.verified(now)
    assert TimeFloor(tmp_path).floor == now


def test_a_clock_that_was_set_back_a_little_is_believed(tmp_path: Path) -> None:
    floor, now = TimeFloor(tmp_path), datetime.now(UTC)
    floor.verified(now)
    floor.saw(now + timedelta(days=30))
    back = now - timedelta(hours=20)
    assert (floor.problem(back), floor.judge(back)) == (None, now)
    assert floor.judge(now - timedelta(hours=25)) == now + timedelta(days=30)


def test_small_steps_are_not_written(tmp_path: Path) -> None:
    floor, now = TimeFloor(tmp_path), datetime.now(UTC)
    floor.verified(now)
    written = (tmp_path / "time.floor").read_bytes()
    for minutes in range(1, 60):
        floor.verified(now + timedelta(minutes=minutes))
    assert (tmp_path / "time.floor").read_bytes() == written
    floor.verified(now + timedelta(minutes=61))
    assert TimeFloor(tmp_path).floor == now + timedelta(minutes=61)


def test_a_floor_that_cannot_be_kept_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "metadata").write_text("a file in the place of the folder")
    TimeFloor(tmp_path / "metadata").verified(datetime.now(UTC))


@pytest.fixture
def dated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], tuple[Authority, tuple[Path, Path]]]:
    """A function: days -> an authority, and a server's certificate that it issued then."""

    def dated(days: int) -> tuple[Authority, tuple[Path, Path]]:
        made = Authority(tmp_path / str(days))

        class Clock(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
                return datetime.now(UTC) + timedelta(days=days)

        with monkeypatch.context() as patch:
            patch.setattr(authority_module, "datetime", Clock)
            return made, made.server()

    return dated


@pytest.mark.parametrize(
    ("days", "says"),
    [(-3, "has expired by this device's"), (3, "is not valid yet by this device's")],
)
def test_certificates_and_dates_name_the_clock(
    dated: Callable[[int], tuple[Authority, tuple[Path, Path]]],
    repository: Repository,
    tmp_path: Path,
    days: int,
    says: str,
) -> None:
    authority, (certificate, key) = dated(days)
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    with ReleaseServer(repository.path, certificate=certificate, key=key) as server:
        fetcher = HttpFetcher(ca_file=authority.ca, proxies=Proxies({}))
        with pytest.raises(DownloadError, match=f"{says} clock, which says {today}"):
            fetcher.open(f"{server.url}metadata/timestamp.json")

    class Servicer:
        def Fetch(self, request: object, context: object) -> object: ...
        def Watch(self, request: object, context: object) -> object: ...
        def Report(self, request: object, context: object) -> object: ...

    control = grpc.server(None)
    add_servicer(Servicer(), control)
    both = [(key.read_bytes(), certificate.read_bytes())]
    port = control.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(both))
    control.start()
    (tmp_path / "token").write_text("A" * 43)
    settings = ControlSettings(f"localhost:{port}", authority.ca, tmp_path / "token")
    channel = ControlChannel(settings, proxies=Proxies({}))
    with pytest.raises(DownloadError, match=f"{says} clock, which says {today}"):
        ControlFetcher(channel).open(f"{settings.url}file")
    channel.reset()
    control.stop(None)


def test_a_publisher_whose_clock_is_behind_signs_nothing(
    repository: Repository, tmp_path: Path, keys: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return EPOCH

    monkeypatch.setattr(common_clock, "datetime", Clock)
    before = sorted(p.name for p in (repository.path / "metadata").iterdir())
    with pytest.raises(ClockWrong, match=r"clock says 1970-01-01 00:00 UTC.*set it"):
        Repository(repository.path, keys).renew()
    assert sorted(p.name for p in (repository.path / "metadata").iterdir()) == before
