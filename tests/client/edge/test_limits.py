"""Too little disk, limited bandwidth, quiet hours: the running release stays, nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest

from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.config import QuietHours
from prunecast.client.edge.errors import NetworkError, StateError
from prunecast.client.edge.updating.transport import Fetcher, Passing, Stream, TokenBucket
from prunecast.compression.release.manifest import ReleaseManifest

Publish = Callable[..., ReleaseManifest]
Start = Callable[..., Agent]


def test_a_full_disk_is_noticed_before_the_download(
    start: Start, publish: Publish, network, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(1)
    agent = start()
    agent.update_once()
    publish(2)
    network.asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(StateError, match=r"release 2 needs [\d,]+ bytes of disk.*1,000 are"):
            agent.update_once()
    assert not any(path.startswith("blobs/") for path, _ in network.asked)
    assert agent.model.infer({"input": images}).version == 1
    assert agent.update_once().version == 2


def test_disk_that_the_update_frees_counts(
    start: Start, publish: Publish, config: AgentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot that will be rebuilt need not fit twice."""
    publish(1)
    agent = start()
    agent.update_once()
    agent.confirm()
    publish(2)
    agent.update_once()
    agent.confirm()
    spare = config.state / "slots" / agent.status()["previous"]["slot"]
    (spare / "large").write_bytes(bytes(2 << 20))
    publish(3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert agent.update_once().version == 3


def test_downloads_of_a_superseded_release_are_removed(
    start: Start, publish: Publish, network, config: AgentConfig
) -> None:
    first = publish(1)
    network.cut[f"blobs/{first.keyframe.sha256}"] = 128
    agent = start()
    real = network.open

    def once(url: str, offset: int = 0) -> Stream:
        if offset:
            network.down = True
        return real(url, offset)

    network.open = once
    with pytest.raises(NetworkError):
        agent.update_once()
    part = config.state / "downloads" / f"{first.keyframe.sha256}.part"
    assert part.stat().st_size == 128
    network.open, network.down = real, False
    publish(2)
    removed = []
    agent._step = lambda step: removed.append(part.exists()) if step == "download files" else None
    assert agent.update_once().version == 2
    assert removed == [False]


class _Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, []  # type: ignore[var-annotated]

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class _Source(Fetcher):
    def open(self, url: str, offset: int = 0) -> Stream:
        return Stream(offset, self._chunks())

    def _chunks(self) -> Iterator[bytes]:
        for n in range(10):
            yield bytes([n]) * 65_536


def test_bandwidth_is_kept_on_average() -> None:
    clock = _Clock()
    limited = Passing(_Source(), TokenBucket(10_000, clock=clock, sleep=clock.sleep).slow)
    data = b"".join(limited.open("http://x/").chunks)
    assert data == b"".join(bytes([n]) * 65_536 for n in range(10))
    assert clock.now == pytest.approx((len(data) - 10_000) / 10_000, abs=0.01)  # one second's burst
    assert max(clock.slept) <= 0.2501  # so that it can be interrupted
    clock.now += 3600
    clock.slept.clear()
    next(limited.open("http://x/").chunks)
    assert clock.slept == []  # idle time allows a burst, but of one second only
    with pytest.raises(ValueError, match="above zero"):
        TokenBucket(0)


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("22:00-06:00", ["22:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "21:59"]),
        ("07:00-19:30", ["07:00", "19:29"], ["06:59", "19:30", "23:00"]),
    ],
)
def test_windows_of_time(window: str, inside: list[str], outside: list[str]) -> None:
    hours = QuietHours.parse(window)
    assert all(datetime.strptime(at, "%H:%M") in hours for at in inside)
    assert not any(datetime.strptime(at, "%H:%M") in hours for at in outside)


@pytest.mark.parametrize("text", ["", "7-8", "24:00-06:00", "06:00-06:00", "22:00-06:60"])
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="like 22:00-06:00"):
        QuietHours.parse(text)


def test_quiet_hours_postpone_a_release(
    config: AgentConfig, network, publish: Publish, images: np.ndarray
) -> None:
    publish(1)
    at = [datetime(2026, 1, 1, 12, 0)]
    config = replace(config, quiet=QuietHours.parse("22:00-06:00"))
    with Agent(config, fetcher=network, now=lambda: at[0]) as agent:
        assert agent.update_once().version == 1
        publish(2)
        at[0] = datetime(2026, 1, 1, 23, 0)
        network.asked.clear()
        result = agent.update_once()
        assert (result.outcome, result.version) == ("current", 1)
        assert "release 2 waits for the end of the quiet hours at 06:00" in str(result.reason)
        assert all(path.startswith("metadata/") for path, _ in network.asked)
        at[0] = datetime(2026, 1, 2, 6, 0)
        assert agent.update_once().version == 2


def test_a_download_pauses_when_quiet_hours_begin(
    config: AgentConfig, network, publish: Publish
) -> None:
    manifest = publish(1)
    at = [datetime(2026, 1, 1, 21, 59)]
    config = replace(config, quiet=QuietHours.parse("22:00-06:00"))
    keyframe = f"blobs/{manifest.keyframe.sha256}"
    real = network.open

    def late(url: str, offset: int = 0) -> Stream:
        stream = real(url, offset)
        if keyframe not in url:
            return stream

        def chunks() -> Iterator[bytes]:
            for number, chunk in enumerate(stream.chunks):
                if number == 3:
                    at[0] = datetime(2026, 1, 1, 22, 0)
                yield chunk

        return Stream(stream.start, chunks())

    network.open = late
    with Agent(config, fetcher=network, now=lambda: at[0]) as agent:
        with pytest.raises(NetworkError, match=r"quiet hours at 06:00; what has come is kept"):
            agent.update_once()
        network.open, at[0] = real, datetime(2026, 1, 2, 6, 0)
        network.asked.clear()
        assert agent.update_once().version == 1
        assert (keyframe, 192) in network.asked
