"""Quotas, metrics, kinds of blobs, health: with clocks of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from prunecast.server.repository import KeyRing, Repository
from prunecast.server.repository.serving.connection import Quota
from prunecast.server.repository.serving.monitoring import BlobKinds, Metrics, check_health


@pytest.fixture
def clock() -> Callable[..., float]:
    at = [100.0]

    def clock(forward: float = 0.0) -> float:
        at[0] += forward
        return at[0]

    return clock


def test_a_quota_lets_ten_seconds_through_at_once_and_then_its_rate(
    clock: Callable[..., float],
) -> None:
    quota = Quota(2.0, clock=clock)
    assert [quota.take("a", 1) for _ in range(20)] == [0.0] * 20
    assert quota.take("a", 1) == pytest.approx(0.5)
    assert quota.take("b", 1) == 0.0
    clock(0.5)
    assert quota.take("a", 1) == 0.0
    assert quota.take("a", 1) > 0
    clock(1000.0)
    assert [quota.take("a", 1) for _ in range(21)][-1] > 0  # what was not used is not saved up


def test_a_large_file_is_paid_for_afterwards(clock: Callable[..., float]) -> None:
    quota = Quota(100.0, clock=clock)
    assert quota.take("a", 5000) == 0.0
    assert quota.take("a", 1) == pytest.approx(40.01)
    quota.give_back("a", 3900)
    assert quota.take("a", 1) == pytest.approx(1.01)
    clock(1.02)
    assert quota.take("a", 1) == 0.0


def test_a_burst_is_what_was_said(clock: Callable[..., float]) -> None:
    quota = Quota(1.0, burst=2, clock=clock)
    assert [quota.take("cam", 1) for _ in range(3)] == [0.0, 0.0, 1.0]
    clock(1.0)
    assert quota.take("cam", 1) == 0.0


def test_quotas_forget_who_asked_least_recently(clock: Callable[..., float]) -> None:
    quota = Quota(1.0, most=2, clock=clock)
    for client in "abac":
        quota.take(client, 50)
    assert sorted(quota._accounts) == ["a", "c"]


def test_metrics_are_what_prometheus_reads() -> None:
    metrics = Metrics()
    for seconds in (0.0005, 0.02, 400.0):
        metrics.answered("patch", 206, 1000, seconds, complete=seconds < 1)
    metrics.answered("keyframe", 200, 7, 0.001, complete=True)
    metrics.refused("bytes")
    lines = metrics.text(ready=True, expires={"root": 1.5e9}).decode().splitlines()
    assert 'prunecast_serve_requests_total{kind="patch",status="206"} 3.0' in lines
    assert 'prunecast_serve_sent_bytes_total{kind="patch"} 3000.0' in lines
    assert 'prunecast_serve_interrupted_total{kind="patch"} 1.0' in lines
    assert 'prunecast_serve_interrupted_total{kind="keyframe"} 0.0' in lines
    assert 'prunecast_serve_refused_total{reason="bytes"} 1.0' in lines
    buckets = [line for line in lines if "request_seconds_bucket" in line and "patch" in line]
    counts = {line.split('le="')[1].split('"')[0]: float(line.split()[1]) for line in buckets}
    assert list(counts.values()) == sorted(counts.values())
    assert (counts["0.001"], counts["0.025"], counts["300.0"], counts["+Inf"]) == (1, 2, 2, 3)
    assert 'prunecast_serve_request_seconds_bucket{kind="keyframe",le="0.001"} 1.0' in lines
    assert 'prunecast_serve_request_seconds_count{kind="patch"} 3.0' in lines
    assert 'prunecast_serve_request_seconds_sum{kind="patch"} 400.0205' in lines
    assert 'prunecast_metadata_expires_seconds{role="root"} 1.5e+09' in lines
    assert "prunecast_serve_ready 1.0" in lines
    named = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert all(
        line.split("{")[0].split()[0].startswith(tuple(named)) for line in lines if line[0] != "#"
    )


def test_blobs_are_told_apart_by_the_manifests(tmp_path: Path, clock: Callable[..., float]) -> None:
    kinds = BlobKinds(tmp_path, clock=clock)
    assert kinds.stale
    name = f"targets/toy/2/{'f' * 64}.release.json"
    (tmp_path / name).parent.mkdir(parents=True)
    document = {
        "weights": {"sha256": "w"},
        "keyframe": {"sha256": "k", "length": 1},
        "patches": [{"sha256": "p", "base_version": 1}],
        "files": {"model.onnx": {"sha256": "m"}},
        "variants": [{"keyframe": {"sha256": "k2"}, "patches": [{"sha256": "p2"}]}],
    }
    (tmp_path / name).write_text(json.dumps(document))
    kinds.look()
    found = {digest: kinds.of(digest) for digest in ("w", "k", "p", "m", "k2", "p2", "x")}
    wanted = ["blob", "keyframe", "patch", "file", "keyframe", "patch", "blob"]
    assert list(found.values()) == wanted
    assert not kinds.stale
    clock(11.0)
    assert kinds.stale
    broken = f"targets/toy/3/{'e' * 64}.release.json"
    (tmp_path / broken).parent.mkdir()
    (tmp_path / broken).write_text("[" * 100_000)
    kinds.look()  # leaves out what cannot be read


def test_health_verifies_signatures_and_dates(tmp_path: Path, keys: KeyRing) -> None:
    root = Repository.create(tmp_path / "repository", keys).path
    now = datetime.now(UTC)
    fresh = check_health(root, now)
    assert fresh.ready
    assert not fresh.warnings
    assert sorted(fresh.expires) == ["root", "snapshot", "targets", "timestamp"]
    late = check_health(root, now + timedelta(days=6))
    assert late.ready
    assert [f.subject for f in late.warnings] == ["timestamp"]
    expired = check_health(root, now + timedelta(days=8))
    assert not expired.ready
    said = json.loads(expired.json())
    assert said["status"] == "not ready"
    assert [(p["code"], p["subject"]) for p in said["problems"]] == [("expired", "timestamp")]
    assert "release renew" in said["problems"][0]["remedy"]
    assert sorted(expired.expires) == ["root", "snapshot", "targets", "timestamp"]

    timestamp = root / "metadata" / "timestamp.json"
    text = timestamp.read_text()
    timestamp.write_text(text.replace('"version":1', '"version":2', 1))
    assert "metadata-signature" in {f.code for f in check_health(root, now).problems}
    timestamp.unlink()
    gone = check_health(root, now)
    assert not gone.ready
    assert {f.code for f in gone.problems} == {"metadata-missing"}
    (root / "metadata").rename(root / "elsewhere")
    assert not check_health(root, now).ready
