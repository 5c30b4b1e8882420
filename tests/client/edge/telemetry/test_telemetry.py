"""Figures that are right, bounded, survive restarts, and cost the flash little."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prunecast.client.edge import Agent
from prunecast.client.edge.state import read_status
from prunecast.client.edge.telemetry import (
    LAST_BUCKET,
    LatencyHistogram,
    Telemetry,
    TelemetrySnapshot,
    read_telemetry,
)
from prunecast.common.documents import from_document
from prunecast.compression.release import RuntimeFailure
from prunecast.compression.release.manifest import ReleaseManifest


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


@pytest.mark.parametrize("seed", [0, 1])
def test_quantiles_lie_within_five_per_cent(seed: int) -> None:
    values = np.random.default_rng(seed).lognormal(-6, 1.5, 5000)
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(float(value))
    for share in (0.0, 0.5, 0.9, 0.99, 1.0):
        exact = np.quantile(values, share, method="lower")
        assert histogram.quantile(share) == pytest.approx(exact, rel=0.0501)


def test_histograms_of_two_devices_merge_into_that_of_both() -> None:
    first, second, both = LatencyHistogram(), LatencyHistogram(), LatencyHistogram()
    for n, value in enumerate(np.random.default_rng(2).lognormal(-6, 2, 400)):
        (first if n % 2 else second).add(float(value))
        both.add(float(value))
    first.merge(LatencyHistogram(second.pairs()))
    assert first.pairs() == both.pairs()
    assert both.count == 400


def test_a_histogram_is_bounded_at_both_ends() -> None:
    histogram = LatencyHistogram()
    for seconds in (0.0, -1.0, 1e-9, 1e9, float("inf")):
        histogram.add(seconds)
    assert {bucket for bucket, _ in histogram.pairs()} == {0, LAST_BUCKET}
    assert LatencyHistogram().quantile(0.5) is None


@pytest.mark.parametrize("pairs", [[(-1, 1)], [(LAST_BUCKET + 1, 1)], [(3, 0)], [(3, 1), (3, 1)]])
def test_impossible_histograms_are_refused(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="no histogram"):
        LatencyHistogram(pairs)


def test_counts_continue_after_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    first = Telemetry(tmp_path, clock=clock)
    first.activated(3, 1e-6)
    first.observe(3, "answered", 0.01)
    first.observe(3, "refused", 0.001)
    clock.at += 50
    first.save()
    second = Telemetry(tmp_path, clock=clock)
    second.activated(3, 1e-6)
    second.observe(3, "answered", 0.03)
    second.observe(3, "failed", 0.001)
    clock.at += 25
    found = second.snapshot()
    (release,) = found.releases
    assert (release.answered, release.refused, release.failed) == (2, 1, 1)
    assert release.served_seconds == 75
    assert release.latency(1.0) == pytest.approx(0.03, rel=0.05)
    assert (found.starts, found.active, found.uptime_seconds) == (2, 3, 25)
    assert found.resident_bytes is None or found.resident_bytes > 1 << 20
    assert from_document(TelemetrySnapshot, json.loads(json.dumps(found.to_json()))) == found


def test_only_the_latest_releases_and_the_active_one_are_remembered(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path)
    telemetry.activated(1, 0.0)
    for version in range(2, 40):
        for number in range(300):
            telemetry.observe(version, "answered", 1e-6 * 1.1**number)
        telemetry.rejected(version, "x" * 1000)
    telemetry.save()
    assert [r.version for r in telemetry.snapshot().releases] == [1, *range(33, 40)]
    assert (tmp_path / "telemetry.json").stat().st_size < 32_768


def test_nothing_is_written_while_nothing_happens(tmp_path: Path) -> None:
    clock = Clock()
    telemetry = Telemetry(tmp_path, clock=clock)
    telemetry.activated(1, 0.0)
    telemetry.save()
    written = (tmp_path / "telemetry.json").stat().st_ino
    clock.at += 5000
    telemetry.save()
    assert (tmp_path / "telemetry.json").stat().st_ino == written
    telemetry.observe(1, "answered", 0.1)
    telemetry.save()
    assert (tmp_path / "telemetry.json").stat().st_ino != written


def test_a_disk_that_refuses_does_not_disturb(tmp_path: Path) -> None:
    (tmp_path / "telemetry.json").mkdir()
    telemetry = Telemetry(tmp_path)
    with telemetry.saving(0.001):
        telemetry.observe(1, "answered", 0.1)
    assert telemetry.snapshot().releases[0].answered == 1


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{}",
        b"[1]",
        b"null",
        b'{"schema":2}',
        b"\xff",
        b"[" * 9000,
    ],
)
def test_unreadable_figures_are_begun_anew(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "telemetry.json").write_bytes(damage)
    assert read_telemetry(tmp_path) is None
    assert Telemetry(tmp_path).snapshot().starts == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("answered", -1),
        ("served_seconds", float("nan")),
        ("self_test", "perhaps"),
        ("buckets", [[0, -4]]),
        ("buckets", 3),
    ],
)
def test_impossible_figures_are_begun_anew(tmp_path: Path, field: str, value: object) -> None:
    telemetry = Telemetry(tmp_path)
    telemetry.observe(1, "answered", 0.1)
    telemetry.save()
    path = tmp_path / "telemetry.json"
    document = json.loads(path.read_bytes())
    document["releases"][0][field] = value
    path.write_text(json.dumps(document))
    assert read_telemetry(tmp_path) is None


def test_threads_lose_no_count(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path)

    def count() -> None:
        for _ in range(2000):
            telemetry.observe(1, "answered", 0.001)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (release,) = telemetry.snapshot().releases
    assert release.answered == LatencyHistogram(release.buckets).count == 8000


def test_an_agent_counts_by_release_and_tells_in_its_status(
    start: Callable[..., Agent],
    publish: Callable[[int], ReleaseManifest],
    images: np.ndarray,
) -> None:
    publish(1)
    agent = start()
    agent.update_once()
    for _ in range(3):
        agent.model.infer({"input": images})
    with pytest.raises(RuntimeFailure):
        agent.model.infer({"input": images[:, :3]})
    publish(2)
    agent.update_once()
    agent.model.infer({"input": images})
    state = agent.config.state
    agent.close()
    told = read_status(state)["telemetry"]
    assert told["active"] == 2
    first, second = told["releases"]
    assert (first["answered"], first["refused"], first["failed"]) == (3, 1, 0)
    assert (second["answered"], second["self_test"]) == (1, "passed")
    assert 0 < second["latency_p50_seconds"] < 10
    again = start()
    (_, second) = again.telemetry.snapshot().releases
    assert second.answered == 1
    assert again.telemetry.snapshot().starts == 2


def test_a_failed_self_test_is_told(
    start: Callable[..., Agent],
    publish: Callable[[int], ReleaseManifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish(1)
    monkeypatch.setattr(
        "prunecast.client.edge.slots.trial.unpack_arrays",
        lambda data: {"input": np.zeros((4, 12), np.float32), "output": np.ones((4, 5), "f4")},
    )
    monkeypatch.setattr(
        "prunecast.client.edge.slots.trial.InferenceSession.run", lambda *_, **__: {}
    )
    agent = start()
    assert agent.update_once().outcome == "rejected"
    (release,) = agent.telemetry.snapshot().releases
    assert release.self_test == "failed"
    assert release.problem is not None
    assert "self-test" in release.problem
    assert replace(release, version=9).to_json()["version"] == 9
