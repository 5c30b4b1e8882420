from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from prunecast.compression.onnx import BindError
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.release import ManifestError, RuntimeFailure
from prunecast.compression.versions import PublishedModel, RawTensor, decode_model
from prunecast.server.repository import (
    Expiry,
    KeyFileError,
    KeyRing,
    ReleaseNotFound,
    Repository,
    RepositoryCorrupt,
    RepositoryError,
    RepositoryExists,
    VerificationFailed,
    verify_repository,
)
from support.releases import publish_model

Model = Callable[[int], PublishedModel]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_release_carries_what_its_manifest_says(
    repository: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    made = publish_model(
        repository,
        "toy",
        model(1),
        graph,
        selftest_inputs=images,
        metrics={"accuracy": 0.9},
        licence="MIT",
    )
    manifest = repository.show("toy")
    assert manifest == made.manifest
    assert (manifest.version, manifest.counter) == (1, 1)
    assert manifest.model_digest == model(1).digest.hex()
    assert manifest.metrics == {"accuracy": 0.9}
    assert manifest.inputs[0].shape == ("batch", 12)
    assert repository.model(manifest).digest == model(1).digest
    assert made.onnx_bytes is not None
    assert made.onnx_bytes > made.manifest.keyframe.length
    assert made.patch_bytes == {}
    assert [(e.name, e.version) for e in repository.releases()] == [("toy", 1)]


def test_a_patch_leads_from_every_live_release(
    repository: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    for number in (1, 2, 3):
        made = publish_model(repository, "toy", model(number), graph, selftest_inputs=images)
    assert set(made.patch_bytes) == {1, 2}
    assert max(made.patch_bytes.values()) < made.manifest.keyframe.length
    for base in (1, 2):
        patch = made.manifest.patch_from(model(base).digest.hex())
        assert patch is not None
        held = repository.model(repository.show("toy", base))
        rebuilt = decode_model(repository.blob(patch.file), held=held, stream=b"toy")
        assert rebuilt.digest == model(3).digest


def test_unchanged_small_files_are_stored_once(
    repository: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    first = publish_model(repository, "toy", model(1), graph, selftest_inputs=images).manifest
    second = publish_model(repository, "toy", model(2), graph, selftest_inputs=images).manifest
    for name in ("model.onnx", "layout.json", "selftest.npz"):
        assert first.files[name] == second.files[name]
    assert first.files["expected.npz"] != second.files["expected.npz"]


def test_the_oldest_release_leaves_the_window_and_numbers_are_not_reused(
    tmp_path: Path, keys: KeyRing, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    repository = Repository.create(tmp_path / "r", keys, window=2)
    retired = [
        publish_model(repository, "toy", model(n), graph, selftest_inputs=images).retired
        for n in (1, 2, 3)
    ]
    assert retired == [(), (), (1,)]
    repository.retire("toy", 3)
    assert publish_model(repository, "toy", model(4), graph, selftest_inputs=images).version == 4
    assert [e.version for e in repository.releases()] == [2, 4]
    with pytest.raises(ReleaseNotFound, match=r"no live release 3 \(live: 2, 4\)"):
        repository.retire("toy", 3)
    with pytest.raises(ReleaseNotFound, match="live names: toy"):
        repository.show("other")


def test_names_are_independent(
    repository: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    publish_model(repository, "toy", model(1), graph, selftest_inputs=images)
    other = publish_model(repository, "other", model(2), graph, selftest_inputs=images)
    assert other.version == 1
    assert other.patch_bytes == {}


def test_publishing_the_same_model_again_needs_no_patch(
    repository: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    publish_model(repository, "toy", model(1), graph, selftest_inputs=images)
    publish_model(repository, "toy", model(2), graph, selftest_inputs=images)
    downgrade = publish_model(repository, "toy", model(1), graph, selftest_inputs=images)
    assert downgrade.version == 3
    assert set(downgrade.patch_bytes) == {2}


def test_a_failed_publication_changes_nothing_visible(
    repository: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    publish_model(repository, "toy", model(1), graph, selftest_inputs=images)
    before = _files(repository.path)
    extra = PublishedModel({**model(2).tensors, "w9": RawTensor(np.zeros(1, np.float32))})
    with pytest.raises(BindError):
        publish_model(repository, "toy", extra, graph, selftest_inputs=images)
    with pytest.raises(RuntimeFailure, match="complex64"):
        publish_model(
            repository, "toy", model(2), graph, selftest_inputs=images.astype(np.complex64)
        )
    with pytest.raises(ManifestError):
        publish_model(repository, "../toy", model(2), graph, selftest_inputs=images)
    with pytest.raises(RepositoryError, match="self-test input"):
        publish_model(repository, "toy", model(2), graph, selftest_inputs={})
    assert _files(repository.path) == before


def test_every_file_is_in_place_before_timestamp_changes(
    repository: Repository,
    graph: ExportedGraph,
    model: Model,
    images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reader at any moment of a publication sees one complete state."""
    from prunecast.server.repository import repository as module

    publish_model(repository, "toy", model(1), graph, selftest_inputs=images)
    root = repository.trusted_root()
    seen = []
    real = module.write_atomically

    def observed(path: Path, data: bytes) -> None:
        for moment in ("before", "after"):
            verified = verify_repository(Repository(repository.path, None), root)
            seen.append((moment, path.name, [v.version for v in verified]))
            if moment == "before":
                real(path, data)

    monkeypatch.setattr(module, "write_atomically", observed)
    publish_model(repository, "toy", model(2), graph, selftest_inputs=images)
    assert seen[-2:] == [("before", "timestamp.json", [1]), ("after", "timestamp.json", [1, 2])]
    assert all(versions == [1] for _, _, versions in seen[:-1])


def test_readers_need_no_keys_and_cannot_write(
    repository: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    reader = Repository(repository.path, None)
    assert reader.releases() == []
    with pytest.raises(KeyFileError, match="name the folder"):
        publish_model(reader, "toy", model(1), graph, selftest_inputs=images)


def test_foreign_keys_cannot_publish(
    repository: Repository, graph: ExportedGraph, model: Model, images: np.ndarray, tmp_path: Path
) -> None:
    before = _files(repository.path / "metadata")
    foreign = Repository(repository.path, KeyRing.create(tmp_path / "foreign"))
    with pytest.raises(KeyFileError, match="not the one this repository trusts"):
        publish_model(foreign, "toy", model(1), graph, selftest_inputs=images)
    assert _files(repository.path / "metadata") == before


def test_tampered_targets_are_not_signed_again(
    repository: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    publish_model(repository, "toy", model(1), graph, selftest_inputs=images)
    (newest,) = (repository.path / "metadata").glob("1.name.toy.json")
    document = json.loads(newest.read_bytes())
    document["signed"]["targets"]["toy/1/release.json"]["length"] += 1
    newest.write_text(json.dumps(document))
    with pytest.raises(RepositoryCorrupt, match="cannot be trusted"):
        publish_model(repository, "toy", model(2), graph, selftest_inputs=images)


def test_creating_twice_or_opening_nothing_is_refused(
    repository: Repository, keys: KeyRing, tmp_path: Path
) -> None:
    with pytest.raises(RepositoryExists):
        Repository.create(repository.path, keys)
    with pytest.raises(RepositoryCorrupt, match="not a release repository"):
        Repository(tmp_path / "nothing", keys)


def test_renewing_moves_the_expiry_and_needs_only_the_online_keys(
    tmp_path: Path, keys: KeyRing
) -> None:
    clock = [datetime(2030, 1, 1, tzinfo=UTC)]
    expiry = Expiry(timestamp=timedelta(days=1), snapshot=timedelta(days=2))
    repository = Repository.create(tmp_path / "r", keys, expiry=expiry, now=lambda: clock[0])
    keys.path("root").unlink()
    keys.path("targets").unlink()
    clock[0] += timedelta(hours=12)
    renewed = repository.renew()
    assert renewed == {
        "snapshot": datetime(2030, 1, 3, 12, tzinfo=UTC),
        "timestamp": datetime(2030, 1, 2, 12, tzinfo=UTC),
    }
    assert repository.expires()["timestamp"] == renewed["timestamp"]
    assert repository.expires()["root"].year == 2031
    with pytest.raises(KeyFileError, match="root key is needed"):
        repository.renew(["root"])
    with pytest.raises(RepositoryError, match="roles are"):
        repository.renew(["mirror"])


def test_garbage_goes_after_the_grace_period_only(
    tmp_path: Path, keys: KeyRing, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    clock = [datetime.now(UTC)]
    repository = Repository.create(tmp_path / "r", keys, window=1, now=lambda: clock[0])
    first = publish_model(repository, "toy", model(1), graph, selftest_inputs=images).manifest
    publish_model(repository, "toy", model(2), graph, selftest_inputs=images)
    old = repository.path / "blobs" / first.keyframe.sha256
    repository.renew()
    assert old.is_file()
    clock[0] += timedelta(days=2)
    repository.renew()
    assert not old.exists()
    assert (repository.path / "blobs" / first.files["model.onnx"].travels.sha256).is_file()
    assert [v.version for v in verify_repository(repository, repository.trusted_root())] == [2]


def test_two_writers_exclude_each_other(repository: Repository) -> None:
    repository.patience = timedelta(0)
    with (
        repository.held(),
        pytest.raises(RepositoryError, match="another process"),
    ):
        repository.renew()


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_a_rotated_key_is_accepted_from_the_first_root_on(
    repository: Repository, graph: ExportedGraph, model: Model, images: np.ndarray, role: str
) -> None:
    root = repository.trusted_root()
    publish_model(repository, "toy", model(1), graph, selftest_inputs=images)
    repository.rotate_key(role)
    publish_model(repository, "toy", model(2), graph, selftest_inputs=images)
    assert [v.version for v in verify_repository(repository, root)] == [1, 2]
    assert json.loads(repository.trusted_root())["signed"]["version"] == 2


class TestVerify:
    def test_a_sound_repository_passes(
        self, repository: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
    ) -> None:
        for number in (1, 2, 3):
            publish_model(repository, "toy", model(number), graph, selftest_inputs=images)
        verified = verify_repository(repository, repository.trusted_root())
        assert [(v.version, v.patches) for v in verified] == [(1, 0), (2, 1), (3, 2)]
        assert all(v.difference < 1e-5 for v in verified)

    @pytest.mark.parametrize("what", ["keyframe", "model.onnx", "patch from 1", "expected.npz"])
    def test_a_flipped_bit_is_found(
        self,
        repository: Repository,
        graph: ExportedGraph,
        model: Model,
        images: np.ndarray,
        what: str,
    ) -> None:
        publish_model(repository, "toy", model(1), graph, selftest_inputs=images)
        made = publish_model(repository, "toy", model(2), graph, selftest_inputs=images)
        path = repository.path / "blobs" / made.manifest.references()[what].sha256
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(VerificationFailed, match="damaged"):
            verify_repository(repository, repository.trusted_root())

    def test_another_root_does_not_verify(self, repository: Repository, tmp_path: Path) -> None:
        other = Repository.create(tmp_path / "other", KeyRing.create(tmp_path / "k2"))
        with pytest.raises(VerificationFailed, match="does not verify"):
            verify_repository(repository, other.trusted_root())
