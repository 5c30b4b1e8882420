"""Ceremonies: what holders sign, what is refused, and what python-tuf's client makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from tuf.api.metadata import Metadata

from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository import (
    Ceremony,
    CeremonyError,
    Change,
    KeyFileError,
    KeyRing,
    Repository,
    RepositoryCorrupt,
    RepositoryExists,
    RepositoryReader,
    ThresholdNotMet,
    VerificationFailed,
    verify_repository,
)
from prunecast.server.repository import repository as module
from support.ceremonies import Circle, utc_now
from support.releases import publish_model

Model = Callable[[int], PublishedModel]


@pytest.fixture
def circle(tmp_path: Path) -> Circle:
    return Circle(tmp_path / "circle")


@pytest.fixture
def founded(circle: Circle, tmp_path: Path) -> Repository:
    return circle.found(tmp_path / "served")


def _delegated(circle: Circle, repository: Repository, *patterns: str) -> Repository:
    if not (circle.folder / "host" / "robot.pem").exists():
        circle.online("host", "robot")
    change = Change(delegate={"robot": patterns}, add={"robot": circle.keys("host.robot")})
    circle.change(repository, change, "alice", "bob")
    return repository


# the first one


def test_one_signature_is_not_two(circle: Circle, tmp_path: Path) -> None:
    ring = circle.online("host", "snapshot", "timestamp")
    ceremony = circle.sign(circle.plan(["alice", "bob", "carol"], 2), ["bob"])
    with pytest.raises(
        ThresholdNotMet, match=r"root 1 has 1 of 2 .*: bob .*1 more of alice, carol"
    ):
        Repository.create(tmp_path / "served", ring, ceremony=ceremony)
    assert not (tmp_path / "served").exists()
    circle.sign(ceremony, ["bob"])  # again: still one holder
    with pytest.raises(ThresholdNotMet):
        ceremony.complete()
    circle.sign(ceremony, ["alice"])
    made = Repository.create(tmp_path / "served", ring, ceremony=ceremony)
    assert verify_repository(made, made.trusted_root()) == []
    with pytest.raises(RepositoryExists):
        Repository.create(tmp_path / "served", ring, ceremony=ceremony)


@pytest.mark.parametrize("public", [None, "no hexadecimal number"])
def test_requests_with_keys_that_are_none_are_refused(circle: Circle, public: str | None) -> None:
    path = circle.plan(["alice"], 1).folder / "root.json"
    document = json.loads(path.read_bytes())
    (keyid,) = document["signed"]["roles"]["root"]["keyids"]
    if public is None:
        del document["signed"]["keys"][keyid]
    else:
        document["signed"]["keys"][keyid]["keyval"]["public"] = public
    path.write_text(json.dumps(document))
    with pytest.raises(CeremonyError, match="asks for a key"):
        Ceremony(path.parent)


def test_holders_sign_copies_and_send_files_back(circle: Circle, tmp_path: Path) -> None:
    ceremony = circle.plan(["alice", "bob", "carol"], 2)
    sent = []
    for holder in ("alice", "carol"):
        copy = tmp_path / holder
        shutil.copytree(ceremony.folder, copy)
        sent += Ceremony(copy).sign(circle.signer(holder), utc_now())
    ceremony.merge(sent)
    assert set(ceremony.complete()) == {"root", "targets"}
    assert set(Ceremony(ceremony.folder).complete()) == {"root", "targets"}  # it is on disk


def test_the_transcript_names_keys_signers_and_times(circle: Circle) -> None:
    ceremony = circle.plan(["alice", "bob", "carol"], 2)
    when = datetime(2031, 2, 3, 4, 5, 6, tzinfo=UTC)
    ceremony.sign(circle.signer("bob"), when)
    text = (ceremony.folder / "transcript.txt").read_text()
    from prunecast.server.repository.keys.keyholders import fingerprint

    for holder in ("alice", "bob", "carol", "host.snapshot"):
        [key] = circle.keys(holder) if holder in circle.signers else [None]
        if key is not None:
            assert f"{holder} (SHA-256 of the public key {fingerprint(key)})" in text
    assert "2031-02-03T04:05:06Z  root 1  bob" in text
    assert "root 1 has 1 of 2 signatures: bob" in text
    assert "1 more of alice, carol must sign" in text
    assert ceremony.digest("root") in text
    assert text.endswith("not enacted\n")


@pytest.mark.parametrize("tamper", ["time", "digest", "signature", "role", "key", "garbage"])
def test_signature_files_that_were_changed_are_refused(circle: Circle, tamper: str) -> None:
    ceremony = circle.plan(["alice", "bob", "carol"], 2)
    [path, _] = Ceremony(ceremony.folder).sign(circle.signer("alice"), utc_now())
    document = json.loads(path.read_text())
    if tamper == "time":
        document["at"] = "2020-01-01T00:00:00Z"
    elif tamper == "digest":
        document["sha256"] = "0" * 64
    elif tamper == "signature":
        document["sig"] = document["statement"]
    elif tamper == "role":
        document["role"] = "targets"
    elif tamper == "key":
        document["keyid"] = circle.signer("bob").public_key.keyid
    path.write_text("[" if tamper == "garbage" else json.dumps(document))
    with pytest.raises(CeremonyError, match=path.name):
        ceremony.merge([path])
    assert not ceremony.signatures


def test_signatures_on_another_ceremony_do_not_count(circle: Circle) -> None:
    ceremony, other = (circle.plan(["alice", "bob", "carol"], n) for n in (2, 1))
    sent = other.sign(circle.signer("alice"), utc_now())
    with pytest.raises(CeremonyError, match="another copy of this ceremony"):
        ceremony.merge(sent)
    with pytest.raises(CeremonyError, match="asks for alice, bob, carol"):
        ceremony.sign(circle.signer("mallory"), utc_now())


def test_thresholds_that_nobody_could_meet_are_refused(circle: Circle, founded: Repository) -> None:
    with pytest.raises(CeremonyError, match="3 keys and a threshold of 4"):
        circle.plan(["alice", "bob", "carol"], 4)
    with pytest.raises(CeremonyError, match="2 keys and a threshold of 3"):
        circle.prepare(founded, Change(revoke={"root": ["bob"]}, threshold={"root": 3}))
    with pytest.raises(CeremonyError, match="lies online"):
        circle.prepare(founded, Change(add={"snapshot": circle.keys("alice")}))
    with pytest.raises(CeremonyError, match=r"it has: alice .*bob .*carol"):
        circle.prepare(founded, Change(revoke={"root": ["dave"]}))
    with pytest.raises(CeremonyError, match="nothing would change"):
        circle.prepare(founded, Change(threshold={"root": 2}))
    with pytest.raises(CeremonyError, match="no role 'mirror'"):
        circle.prepare(founded, Change(threshold={"mirror": 2}))


def test_nobody_counts_twice(circle: Circle, founded: Repository, tmp_path: Path) -> None:
    twin = Circle(tmp_path / "twin").keys("alice")
    with pytest.raises(CeremonyError, match="alice would hold two keys of the root role"):
        circle.prepare(founded, Change(add={"root": twin}))
    change = Change(add={"root": twin}, revoke={"root": ["alice"]})
    assert len(circle.prepare(founded, change).requests["root"].signed.roles["root"].keyids) == 3


# later ones


def test_a_rotation_needs_old_and_new_holders(circle: Circle, founded: Repository) -> None:
    first = founded.trusted_root()
    change = Change(add={"root": circle.keys("dave", "erin")}, revoke={"root": ["bob", "carol"]})
    ceremony = circle.sign(circle.prepare(founded, change), ["dave", "erin"])
    with pytest.raises(ThresholdNotMet, match=r"root 2 has 0 of 2 signatures \(keys of root 1\)"):
        founded.enact(ceremony)
    assert founded.trusted_root() == first
    circle.sign(ceremony, ["alice"])
    with pytest.raises(ThresholdNotMet, match="1 more of bob, carol"):
        founded.enact(ceremony)
    circle.sign(ceremony, ["carol"])
    written = founded.enact(ceremony)
    assert written == ["2.snapshot.json", "2.root.json", "timestamp.json"]
    assert "enacted" in (ceremony.folder / "transcript.txt").read_text()
    assert verify_repository(founded, first) == []
    # the revoked ones no longer count
    late = circle.prepare(founded, Change(renew=["root"]))
    with pytest.raises(CeremonyError, match="asks for alice, dave, erin"):
        late.sign(circle.signer("bob"), utc_now())


def test_a_ceremony_for_a_state_that_has_passed_is_refused(
    circle: Circle, founded: Repository
) -> None:
    stale = circle.sign(circle.prepare(founded, Change(threshold={"root": 1})), ["alice", "bob"])
    circle.change(founded, Change(renew=["root", "targets"]), "alice", "bob")
    with pytest.raises(CeremonyError, match="prepared for another root"):
        founded.enact(stale)
    stale = circle.sign(circle.prepare(founded, Change(renew=["targets"])), ["alice", "bob"])
    circle.change(founded, Change(renew=["targets"]), "alice", "bob")
    with pytest.raises(CeremonyError, match="repository has moved on"):
        founded.enact(stale)


def test_lowering_a_threshold_needs_the_old_one(circle: Circle, founded: Repository) -> None:
    ceremony = circle.prepare(founded, Change(threshold={"root": 1, "targets": 1}))
    circle.sign(ceremony, ["alice"])
    with pytest.raises(ThresholdNotMet, match="keys of root 1"):
        founded.enact(ceremony)
    founded.enact(circle.sign(ceremony, ["bob"]))
    circle.change(founded, Change(renew=["root"]), "carol")
    assert (
        verify_repository(founded, (founded.path / "metadata" / "1.root.json").read_bytes()) == []
    )


def test_revoking_a_targets_key_has_the_list_signed_again(
    circle: Circle, founded: Repository
) -> None:
    ceremony = circle.prepare(
        founded, Change(revoke={"targets": ["bob"]}, add={"targets": circle.keys("dave")})
    )
    assert set(ceremony.requests) == {"root", "targets"}
    circle.sign(ceremony, ["alice", "carol"])
    assert founded.enact(ceremony)[0] == "2.targets.json"
    assert verify_repository(founded, founded.trusted_root()) == []


def test_online_keys_change_too(circle: Circle, founded: Repository) -> None:
    first = founded.trusted_root()
    fresh = circle.online("fresh", "snapshot", "timestamp")
    change = Change(
        add={role: circle.keys(f"fresh.{role}") for role in ("snapshot", "timestamp")},
        revoke={role: [f"host.{role}"] for role in ("snapshot", "timestamp")},
    )
    ceremony = circle.sign(circle.prepare(founded, change), ["alice", "bob"])
    with pytest.raises(KeyFileError, match="not the one this repository trusts"):
        founded.enact(ceremony)
    Repository(founded.path, fresh).enact(ceremony)
    assert verify_repository(founded, first) == []
    with pytest.raises(KeyFileError):
        founded.renew()
    Repository(founded.path, fresh).renew()


def test_an_enactment_that_was_cut_off_is_repeated(
    circle: Circle, founded: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = founded.trusted_root()
    fresh = circle.online("fresh", "timestamp")
    change = Change(
        add={"timestamp": circle.keys("fresh.timestamp")}, revoke={"timestamp": ["host.timestamp"]}
    )
    ceremony = circle.sign(circle.prepare(founded, change), ["alice", "bob"])
    target = Repository(founded.path, KeyRing(*fresh.folders, circle.folder / "host"))
    real = module.write_atomically

    def cut(path: Path, data: bytes) -> None:
        if path.name == "timestamp.json":
            raise OSError("power")
        real(path, data)

    monkeypatch.setattr(module, "write_atomically", cut)
    with pytest.raises(OSError, match="power"):
        target.enact(ceremony)
    monkeypatch.undo()
    with pytest.raises(RepositoryCorrupt):  # root 2 wants another timestamp than the one there
        target.renew()
    target.enact(ceremony)
    assert verify_repository(target, first) == []
    target.renew()


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_others_read_the_state_before_while_a_key_is_rotated(
    repository: Repository,
    graph: ExportedGraph,
    model: Model,
    images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
) -> None:
    publish_model(repository, "toy", model(1), graph, selftest_inputs=images)
    real, seen = module.write_atomically, []

    def watched(path: Path, data: bytes) -> None:
        real(path, data)
        reader = RepositoryReader(repository.path)
        seen.append((path.name, reader.show("toy").version, len(reader.expires())))

    monkeypatch.setattr(module, "write_atomically", watched)
    repository.rotate_key(role)
    assert seen[0] == ("2.root.json", 1, 4)
    assert {entry[1:] for entry in seen} == {(1, 4)}


def test_a_quorum_is_not_replaced_by_one_key(circle: Circle, founded: Repository) -> None:
    with pytest.raises(ThresholdNotMet, match="release keys change"):
        Repository(founded.path, circle.online("host2", "root", "timestamp")).rotate_key("root")


# delegation


def test_the_delegated_role_publishes_without_the_holders(
    circle: Circle, founded: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    with pytest.raises(KeyFileError, match="keys change --delegate"):
        publish_model(founded, "toy", model(1), graph, selftest_inputs=images)
    _delegated(circle, founded, "toy", "toy-*")
    for number in (1, 2):
        publish_model(founded, "toy", model(number), graph, selftest_inputs=images)
    with pytest.raises(KeyFileError, match="keys change --delegate"):
        publish_model(founded, "other", model(1), graph, selftest_inputs=images)
    verified = verify_repository(founded, founded.trusted_root())
    assert [(v.name, v.version, v.patches) for v in verified] == [("toy", 1, 0), ("toy", 2, 1)]
    founded.retire("toy", 1)
    assert [e.version for e in founded.releases()] == [2]
    assert "2.targets.json" in {p.name for p in (founded.path / "metadata").iterdir()}


def test_live_releases_move_with_the_name(
    circle: Circle, tmp_path: Path, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    keys = KeyRing.create(tmp_path / "keys")
    made = Repository.create(tmp_path / "served", keys)
    root = made.trusted_root()
    for name in ("toy", "other"):
        publish_model(made, name, model(1), graph, selftest_inputs=images)
    made.retire("toy", 1)
    publish_model(made, "toy", model(2), graph, selftest_inputs=images)
    circle.online("host", "robot")
    ceremony = circle.prepare(
        made, Change(delegate={"robot": ["toy"]}, add={"robot": circle.keys("host.robot")})
    )
    ceremony.sign(keys.signers("targets")[0], utc_now())
    both = Repository(made.path, KeyRing(*keys.folders, circle.folder / "host"))
    both.enact(ceremony)
    assert [(e.name, e.version) for e in both.releases()] == [("other", 1), ("toy", 2)]
    keys.path("targets").unlink()
    assert publish_model(both, "toy", model(3), graph, selftest_inputs=images).version == 3
    assert [(v.name, v.version) for v in verify_repository(both, root)] == [
        ("other", 1),
        ("toy", 2),
        ("toy", 3),
    ]
    # and back again
    back = circle.prepare(both, Change(withdraw=["robot"]))
    with pytest.raises(CeremonyError, match="asks for key"):
        back.sign(circle.signer("host.robot"), utc_now())


def test_withdrawing_a_role_keeps_its_releases_and_numbers(
    circle: Circle, founded: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    _delegated(circle, founded, "toy")
    publish_model(founded, "toy", model(1), graph, selftest_inputs=images)
    ceremony = circle.sign(circle.prepare(founded, Change(withdraw=["robot"])), ["alice", "bob"])
    publish_model(founded, "toy", model(2), graph, selftest_inputs=images)
    with pytest.raises(CeremonyError, match=r"toy/2/release\.json would be lost"):
        founded.enact(ceremony)
    circle.change(founded, Change(withdraw=["robot"]), "bob", "carol")
    assert [e.version for e in founded.releases()] == [1, 2]
    _delegated(circle, founded, "toy")  # its list goes on after the number it had
    assert publish_model(founded, "toy", model(3), graph, selftest_inputs=images).version == 3
    assert len(verify_repository(founded, founded.trusted_root())) == 3


def test_a_revoked_publisher_is_refused(
    circle: Circle, founded: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    _delegated(circle, founded, "toy")
    publish_model(founded, "toy", model(1), graph, selftest_inputs=images)
    fresh = circle.online("fresh", "robot")
    change = Change(add={"robot": circle.keys("fresh.robot")}, revoke={"robot": ["host.robot"]})
    host = circle.folder / "host"
    ceremony = circle.sign(circle.prepare(founded, change), ["alice", "carol"])
    Repository(founded.path, KeyRing(*fresh.folders, host)).enact(ceremony)
    with pytest.raises(KeyFileError, match="not the one this repository trusts"):
        publish_model(founded, "toy", model(2), graph, selftest_inputs=images)
    assert [v.version for v in verify_repository(founded, founded.trusted_root())] == [1]


def test_a_delegated_role_may_need_two_machines(
    circle: Circle, founded: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    circle.online("host", "robot")
    circle.online("second", "robot")
    change = Change(
        delegate={"robot": ["toy"]},
        add={"robot": circle.keys("host.robot", "second.robot")},
        threshold={"robot": 2},
    )
    both = Repository(founded.path, KeyRing(circle.folder / "host", circle.folder / "second"))
    both.enact(circle.sign(circle.prepare(founded, change), ["alice", "bob"]))
    with pytest.raises(ThresholdNotMet, match="robot role needs 2 signatures, and 1"):
        publish_model(founded, "toy", model(1), graph, selftest_inputs=images)
    publish_model(both, "toy", model(1), graph, selftest_inputs=images)
    assert len(verify_repository(founded, founded.trusted_root())) == 1


def test_a_release_overtakes_one_that_a_thief_published_far_ahead(
    circle: Circle, founded: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    _delegated(circle, founded, "toy")
    publish_model(founded, "toy", model(1), graph, selftest_inputs=images)
    made = publish_model(founded, "toy", model(2), graph, selftest_inputs=images, at_least=1001)
    assert made.version == 1001
    assert (
        publish_model(founded, "toy", model(3), graph, selftest_inputs=images, at_least=5).version
        == 1002
    )


@pytest.mark.parametrize("role", ["root", "Robot", "1.robot", "robot/x", ""])
def test_roles_whose_name_cannot_be_a_file_are_refused(
    circle: Circle, founded: Repository, role: str
) -> None:
    with pytest.raises(CeremonyError, match="cannot name a role"):
        circle.prepare(founded, Change(delegate={role: ["toy"]}))


# renewal


def test_renewal_by_timer_and_its_warnings(
    circle: Circle, founded: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> None:
    _delegated(circle, founded, "toy")
    clock = [utc_now()]
    timed = Repository(founded.path, KeyRing(circle.folder / "host"), now=lambda: clock[0])
    assert set(timed.renew()) == {"snapshot", "timestamp"}
    clock[0] += timedelta(days=16)
    assert set(timed.renew()) == {"robot", "snapshot", "timestamp"}
    assert timed.expiring() == {}
    clock[0] += timedelta(days=130)
    timed.renew()
    assert set(timed.expiring()) == {"targets"}
    (circle.folder / "host" / "robot.pem").unlink()
    clock[0] += timedelta(days=25)
    assert set(timed.renew()) == {"snapshot", "timestamp"}
    assert set(timed.expiring()) == {"robot", "targets"}


def test_metadata_below_the_threshold_is_not_trusted(circle: Circle, founded: Repository) -> None:
    path = founded.path / "metadata" / "1.root.json"
    before = path.read_bytes()
    metadata = Metadata.from_bytes(before)
    metadata.signatures.popitem()
    path.write_bytes(metadata.to_bytes())
    with pytest.raises(RepositoryCorrupt, match="root 1 has 1 of 2 signatures"):
        founded.releases()
    with pytest.raises(VerificationFailed, match="does not verify"):
        verify_repository(Repository(founded.path, None), path.read_bytes())
