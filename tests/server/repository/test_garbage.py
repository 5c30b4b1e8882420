"""What is removed, and what stays because nobody can tell."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository import KeyRing, Repository, verify_repository
from prunecast.server.repository.reading import collect
from support.releases import publish_model

Model = Callable[[int], PublishedModel]


@pytest.fixture
def aged(
    tmp_path: Path, keys: KeyRing, graph: ExportedGraph, model: Model, images: np.ndarray
) -> Repository:
    """Release 2 is live, release 1 has left the window; every file is two days old."""
    repository = Repository.create(tmp_path / "r", keys, window=1)
    for number in (1, 2):
        publish_model(repository, "toy", model(number), graph, selftest_inputs=images)
    old = (datetime.now(UTC) - timedelta(days=2)).timestamp()
    for path in repository.path.rglob("*"):
        os.utime(path, (old, old))
    return repository


def _collect(repository: Repository, *, days: float = 1) -> set[str]:
    removed = collect(repository.path, datetime.now(UTC), timedelta(days=days))
    return {str(path.relative_to(repository.path)) for path in removed}


def test_a_damaged_old_list_keeps_what_it_may_refer_to(
    aged: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    folder = aged.path / "metadata"
    (folder / "1.name.toy.json").write_bytes(b"\xff{")
    os.utime(folder / "1.name.toy.json", (0, 0))
    os.utime(folder / "2.name.toy.json")  # superseded just now: the grace period keeps it
    orphan = aged.path / "blobs" / ("b" * 64)
    orphan.write_bytes(b"x")
    os.utime(orphan, (0, 0))
    before = set(aged.path.rglob("*"))
    with caplog.at_level(logging.WARNING):
        removed = _collect(aged)
    assert removed == {
        "metadata/1.snapshot.json",
        "metadata/2.snapshot.json",
        "metadata/1.targets.json",
    }
    assert "metadata/1.name.toy.json cannot be read" in caplog.text
    assert before - set(aged.path.rglob("*")) == {aged.path / name for name in removed}
    (folder / "1.name.toy.json").unlink()
    assert "blobs/" + "b" * 64 in _collect(aged)
    assert [v.version for v in verify_repository(aged, aged.trusted_root())] == [2]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"signed": {}}', b'{"signed": {"targets": [1]}}']
)
def test_every_kind_of_damage_is_survived(aged: Repository, content: bytes) -> None:
    os.utime(aged.path / "metadata" / "2.name.toy.json")
    (aged.path / "metadata" / "1.name.toy.json").write_bytes(content)
    assert not [name for name in _collect(aged) if not name.startswith("metadata")]
    aged.renew()


def test_a_damaged_manifest_keeps_the_blobs(aged: Repository) -> None:
    [manifest] = (aged.path / "targets" / "toy" / "2").iterdir()
    manifest.write_bytes(b"{}")
    removed = _collect(aged)
    assert not [name for name in removed if name.startswith("blobs")]
    assert [name for name in removed if name.startswith("targets/toy/1")]


def test_a_sound_repository_loses_what_is_old(aged: Repository) -> None:
    assert _collect(aged, days=3) == set()
    removed = _collect(aged)
    assert [name for name in removed if name.startswith("blobs")]
    assert [v.version for v in verify_repository(aged, aged.trusted_root())] == [2]
