"""The doctor names each way in which a repository can be broken, and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from tuf.api.metadata import Metadata
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository import Change, Finding, KeyRing, Repository, examine
from support.ceremonies import Circle
from support.releases import publish_model

Model = Callable[[int], PublishedModel]


@pytest.fixture
def published(
    repository: Repository, graph: ExportedGraph, model: Model, images: np.ndarray, tmp_path: Path
) -> Repository:
    """Two releases, readable for everybody."""
    os.chmod(tmp_path, 0o755)
    for number in (1, 2):
        publish_model(repository, "toy", model(number), graph, selftest_inputs=images)
    for path in (repository.path, *repository.path.rglob("*")):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    return repository


def _codes(repository: Repository, keys: KeyRing | None = None, **options: object) -> set[str]:
    found = examine(repository.path, keys, **options)  # type: ignore[arg-type]
    assert all(f.what and f.remedy for f in found)
    # the keys fixture lies beside the repository, and so do its offline keys
    usual = {"folder-above-closed", "offline-key-here"}
    return {f.code for f in found if f.code not in usual}


def _problems(repository: Repository, keys: KeyRing | None = None) -> set[str]:
    return {f.code for f in examine(repository.path, keys) if f.severity == "problem"}


def _later(days: float) -> Callable[[], datetime]:
    return lambda: datetime.now(UTC) + timedelta(days=days)


def test_a_healthy_repository_has_no_findings(published: Repository, keys: KeyRing) -> None:
    assert _codes(published, keys) == set()
    published.renew()
    published.rotate_key("snapshot")
    assert _codes(published, keys) == {"old-key"}


def test_it_changes_nothing(published: Repository, keys: KeyRing) -> None:
    def state() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in published.path.rglob("*") if p.is_file()}

    before = state()
    (published.path / "blobs" / "orphan").write_bytes(b"x")
    examine(published.path, keys)
    assert state() == before | {published.path / "blobs" / "orphan": b"x"}


def test_metadata_that_expires(published: Repository) -> None:
    def by_role(days: float) -> dict[str, str]:
        return {f.subject: f.code for f in examine(published.path, now=_later(days))}

    assert "timestamp" not in by_role(5)
    assert by_role(6)["timestamp"] == "expires-soon"
    assert by_role(8)["timestamp"] == "expired"
    assert by_role(22)["snapshot"] == "expired"
    assert by_role(140)["targets"] == "expires-soon"
    assert by_role(366)["root"] == "expired"


def _blob(repository: Repository, name: str) -> Path:
    return repository.path / "blobs" / repository.show("toy", 2).references()[name].sha256


@pytest.mark.parametrize("name", ["model.onnx", "keyframe", "patch from 1", "expected.npz"])
def test_blobs_that_are_not_what_was_signed(published: Repository, name: str) -> None:
    blob = _blob(published, name)
    content = blob.read_bytes()
    blob.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert _problems(published) == {"blob-digest"}
    blob.write_bytes(content[:-1])
    assert _problems(published) == {"blob-size"}
    blob.unlink()
    assert _problems(published) == {"blob-missing"}
    labels = [f.what for f in examine(published.path) if f.code == "blob-missing"]
    assert any(name in label for label in labels)


def test_manifests_that_are_not_what_was_signed(published: Repository) -> None:
    [manifest] = (published.path / "targets" / "toy" / "2").iterdir()
    content = manifest.read_bytes()
    manifest.write_bytes(content.replace(b"lattice", b"LATTICE"))
    assert "manifest-digest" in _problems(published)
    assert "orphaned" not in _codes(published)  # its blobs may well be live
    manifest.write_bytes(content + b" ")
    assert "manifest-size" in _problems(published)
    manifest.unlink()
    assert "manifest-missing" in _problems(published)


def test_an_older_snapshot_under_the_newer_name(published: Repository) -> None:
    folder = published.path / "metadata"
    shutil.copy(folder / "2.snapshot.json", folder / "3.snapshot.json")
    assert "metadata-mismatch" in _problems(published)
    findings = examine(published.path)
    assert any("it says version 2" in f.what for f in findings)


def test_targets_that_differ_from_the_snapshot(published: Repository) -> None:
    file = published.path / "metadata" / "2.targets.json"
    file.write_bytes(file.read_bytes() + b"\n")
    assert _problems(published) == {"metadata-mismatch"}


def test_metadata_signed_by_another_repository(published: Repository, tmp_path: Path) -> None:
    other = Repository.create(tmp_path / "other", KeyRing.create(tmp_path / "other-keys"))
    name = "timestamp.json"
    shutil.copy(other.path / "metadata" / name, published.path / "metadata" / name)
    found = _problems(published)
    assert "metadata-signature" in found
    assert "metadata-mismatch" in found


@pytest.mark.parametrize(
    "name", ["timestamp.json", "3.snapshot.json", "2.targets.json", "2.name.toy.json"]
)
def test_missing_and_damaged_metadata(published: Repository, name: str) -> None:
    file = published.path / "metadata" / name
    for content in (b"", b"{}", b"\xff\xfe", b"[" * 5000, file.read_bytes()[:-20]):
        file.write_bytes(content)
        assert "metadata-unreadable" in _problems(published)
    file.unlink()
    assert "metadata-missing" in _problems(published)


def test_roots(published: Repository) -> None:
    for _ in range(2):
        published.renew(["root"])
    folder = published.path / "metadata"
    (folder / "2.root.json").unlink()
    assert _problems(published) == {"root-gap"}
    for root in folder.glob("*.root.json"):
        root.unlink()
    assert "metadata-missing" in _problems(published)


def test_a_publication_that_was_cut_off(
    published: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    timestamp = published.path / "metadata" / "timestamp.json"
    before = timestamp.read_bytes()
    publish_model(published, "toy", model(3), graph, selftest_inputs=images)
    timestamp.write_bytes(before)
    [finding] = [f for f in examine(published.path) if f.severity == "problem"]
    assert finding.code == "unfinished-publication"
    assert "3.name.toy.json" in finding.subject
    assert "4.snapshot.json" in finding.subject
    publish_model(published, "toy", model(3), graph, selftest_inputs=images)  # the remedy
    assert _problems(published) == set()


def test_leftovers(published: Repository) -> None:
    blobs = published.path / "blobs"
    (blobs / f".{'a' * 64}.0123456789abcdef").write_bytes(b"half")
    assert _codes(published) == {"unfinished-write"}
    (blobs / f".{'a' * 64}.0123456789abcdef").unlink()
    (blobs / ("b" * 64)).write_bytes(b"whole")
    [finding] = [f for f in examine(published.path) if f.code == "orphaned"]
    assert finding.severity == "note"
    assert "1 files (5 bytes)" in finding.what
    assert "younger" in finding.what
    [finding] = [f for f in examine(published.path, now=_later(2)) if f.code == "orphaned"]
    assert "younger" not in finding.what


def test_a_running_publication_is_no_fault(published: Repository) -> None:
    (published.path / "blobs" / ("b" * 64)).write_bytes(b"whole")
    with open(published.path / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert _codes(published) == {"busy"}
    assert _codes(published) == {"orphaned"}


def test_files_that_a_web_server_cannot_read(published: Repository) -> None:
    blob = _blob(published, "keyframe")
    os.chmod(blob, 0o600)
    [finding] = [f for f in examine(published.path) if f.severity == "problem"]
    assert finding.code == "not-readable"
    assert blob.name in finding.subject
    os.chmod(blob, 0o644)
    os.chmod(published.path / "targets", 0o700)
    assert _problems(published) == {"not-readable"}


def test_keys_in_the_served_folder(published: Repository, keys: KeyRing) -> None:
    hidden = published.path / "targets" / "toy" / "backup.txt"
    shutil.copy(keys.path("root"), hidden)
    os.chmod(hidden, 0o644)
    [finding] = [f for f in examine(published.path) if f.severity == "problem"]
    assert (finding.code, finding.subject) == ("key-served", "targets/toy/backup.txt")


def test_keys(published: Repository, keys: KeyRing, tmp_path: Path) -> None:
    folder = keys.folders[0]
    foreign = KeyRing.create(tmp_path / "foreign")
    assert _problems(published, foreign) == {"key-foreign"}
    os.chmod(folder / "snapshot.pem", 0o640)
    assert _problems(published, keys) == {"key-unusable"}
    (folder / "snapshot.pem").unlink()
    assert _problems(published, keys) == {"key-missing"}
    (folder / "timestamp.pem").write_bytes(b"no key")
    assert _problems(published, keys) == {"key-missing", "key-unusable"}


def test_offline_keys_may_be_elsewhere(published: Repository, keys: KeyRing) -> None:
    for role in ("root", "targets"):
        keys.path(role).unlink()
    assert _codes(published, keys) == {"key-offline"}
    assert _problems(published, keys) == set()


def test_a_rotation_that_was_cut_off(published: Repository, keys: KeyRing) -> None:
    (keys.folders[0] / "targets.pem.new").write_bytes(b"")
    assert _problems(published, keys) == {"unfinished-rotation"}


def test_several_faults_are_found_at_once(published: Repository, keys: KeyRing) -> None:
    _blob(published, "keyframe").unlink()
    (published.path / "metadata" / "1.root.json").write_bytes(b"{}")
    (keys.folders[0] / "snapshot.pem").unlink()
    found = _problems(published, keys)
    assert found == {"blob-missing", "metadata-unreadable", "key-missing"}


# several holders, delegated roles


@pytest.fixture
def shared(
    tmp_path: Path, graph: ExportedGraph, model: Model, images: np.ndarray
) -> tuple[Circle, Repository]:
    """Two of alice, bob and carol; the role ``robot`` has published ``toy``."""
    os.chmod(tmp_path, 0o755)
    circle = Circle(tmp_path / "elsewhere" / "circle")
    repository = circle.found(tmp_path / "served")
    circle.online("host", "robot")
    change = Change(delegate={"robot": ["toy"]}, add={"robot": circle.keys("host.robot")})
    circle.change(repository, change, "alice", "bob")
    publish_model(repository, "toy", model(1), graph, selftest_inputs=images)
    return circle, repository


def test_a_repository_of_several_holders_is_healthy(shared: tuple[Circle, Repository]) -> None:
    circle, repository = shared
    host = KeyRing(circle.folder / "host")
    assert _codes(repository, host) == {"key-offline"}
    assert not [f for f in examine(repository.path, host) if f.code == "offline-key-here"]
    (circle.folder / "host" / "robot.pem").unlink()
    [finding] = [f for f in examine(repository.path, host) if f.severity == "problem"]
    assert (finding.code, finding.subject) == ("key-missing", "robot")


def test_metadata_below_its_threshold(shared: tuple[Circle, Repository]) -> None:
    _, repository = shared
    for name, files in (("root", 1), ("targets", 2)):
        path = repository.path / "metadata" / f"{files}.{name}.json"
        metadata = Metadata.from_bytes(before := path.read_bytes())
        metadata.signatures.popitem()
        path.write_bytes(metadata.to_bytes())
        found = {f.code: f for f in examine(repository.path) if f.severity == "problem"}
        assert "has 1 of 2 signatures" in found["threshold-not-met"].what
        assert "1 valid signatures are missing, of" in found["threshold-not-met"].what
        metadata.signatures.clear()
        path.write_bytes(metadata.to_bytes())
        codes = {f.code for f in examine(repository.path) if f.severity == "problem"}
        assert "metadata-signature" in codes
        path.write_bytes(before)
    assert _problems(repository) == set()


def test_lists_of_delegated_roles(shared: tuple[Circle, Repository]) -> None:
    _, repository = shared
    folder = repository.path / "metadata"
    by_role = {f.subject: f.code for f in examine(repository.path, now=_later(25))}
    assert by_role["robot"] == "expires-soon"
    by_role = {f.subject: f.code for f in examine(repository.path, now=_later(31))}
    assert by_role["robot"] == "expired"
    listing = (folder / "2.robot.json").read_bytes()
    (folder / "2.robot.json").write_bytes((folder / "1.robot.json").read_bytes())
    assert "metadata-mismatch" in _problems(repository)
    (folder / "2.robot.json").unlink()
    assert "metadata-missing" in _problems(repository)
    (folder / "2.robot.json").write_bytes(listing)
    [manifest] = (repository.path / "targets" / "toy" / "1").iterdir()
    manifest.unlink()
    assert _problems(repository) == {"manifest-missing"}


def test_offline_keys_on_the_serving_machine(
    shared: tuple[Circle, Repository], published: Repository
) -> None:
    """Encrypted or not: a holder's key has no business there."""
    [note] = [f for f in examine(published.path) if f.code == "offline-key-here"]
    assert note.severity == "note"  # one key for everything, as `release init` begins
    assert "root.pem (root)" in note.subject
    circle, repository = shared
    assert "offline-key-here" not in _problems(repository)
    head = f"Prunecast key of bob\nKey-Id: {circle.signer('bob').public_key.keyid}\n"
    forgotten = repository.path.parent / "backup" / "bob.key"
    forgotten.parent.mkdir()
    forgotten.write_text(f"{head}-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    [finding] = [f for f in examine(repository.path) if f.severity == "problem"]
    assert finding.code == "offline-key-here"
    assert "bob.key (root, targets)" in finding.subject
    forgotten.write_bytes(circle.signer("bob").private_bytes)
    assert _problems(repository) == {"offline-key-here"}
    forgotten.write_bytes(circle.signer("mallory").private_bytes)
    assert _problems(repository) == set()


def test_an_old_list_that_is_damaged(published: Repository) -> None:
    (published.path / "metadata" / "1.targets.json").write_bytes(b"{")
    (published.path / "blobs" / ("b" * 64)).write_bytes(b"whole")
    assert _codes(published) == {"old-list-damaged"}


# the command


def _run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["release", "doctor", *map(str, arguments)])
    return done.exit_code, done.output


def test_the_command_answers_by_its_exit_code(published: Repository, keys: KeyRing) -> None:
    code, said = _run(published.path, "--keys", keys.folders[0])
    assert code == 0
    assert "nothing needs to be done" in said
    blob = _blob(published, "keyframe")
    blob.unlink()
    code, said = _run(published.path)
    assert code == 1
    assert blob.name in said.replace("\n", "")
    assert "1 problems" in said
    code, said = _run(published.path, "--json")
    assert code == 1
    document = json.loads(said)
    assert document["problems"] == 1
    assert Finding(**document["findings"][0]).code == "blob-missing"


def test_what_is_no_repository(tmp_path: Path) -> None:
    code, said = _run(tmp_path / "nowhere", "--json")
    assert code == 1
    assert json.loads(said)["findings"][0]["code"] == "no-repository"
