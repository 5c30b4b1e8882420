"""A list of releases for each name: who signs it, what moves into it, and what comes back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from tuf.api.metadata import Metadata, Targets

from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository import (
    CeremonyError,
    Change,
    KeyFileError,
    KeyRing,
    Repository,
    RepositoryError,
    RoleKeys,
    ThresholdNotMet,
    examine,
    verify_repository,
)
from prunecast.server.repository import repository as module
from prunecast.server.repository.roles import NEXT_VERSION, delegations_of, hand_over, undelegate
from support.ceremonies import Circle, utc_now
from support.releases import publish_model

Publish = Callable[..., int]


@pytest.fixture
def publish(
    repository: Repository,
    graph: ExportedGraph,
    model: Callable[[int], PublishedModel],
    images: np.ndarray,
) -> Publish:
    """A function: name and number of a model -> the number of its release."""

    def publish(name: str, number: int = 1, by: Repository = repository) -> int:
        return publish_model(by, name, model(number), graph, selftest_inputs=images).version

    return publish


@pytest.fixture
def circle(tmp_path: Path) -> Circle:
    return Circle(tmp_path / "circle")


def _signed(repository: Repository, role: str, number: int | None = None) -> Targets:
    folder = repository.path / "metadata"
    numbers = [int(path.name.split(".")[0]) for path in folder.glob(f"*.{role}.json")]
    found = Metadata[Targets].from_file(str(folder / f"{number or max(numbers)}.{role}.json"))
    return found.signed


def _live(repository: Repository) -> list[tuple[str, int]]:
    """What devices that were given the first root accept."""
    root = (repository.path / "metadata" / "1.root.json").read_bytes()
    return [(v.name, v.version) for v in verify_repository(repository, root)]


def _as_before(repository: Repository, keys: KeyRing) -> None:
    """The layout of before: one list of all names, signed by the targets keys."""
    state = repository._load()
    for role in state.own_lists:
        hand_over(state.delegated.pop(role).signed, state.targets.signed, None)
        undelegate(state.targets.signed, role)
    repository._commit(state.sign(["targets"], keys.signers, repository._expiry, utc_now()))


def _by_targets_keys(circle: Circle, repository: Repository, keys: KeyRing, change: Change) -> None:
    """A change that the sole keys of root and targets sign."""
    ceremony = circle.prepare(repository, change)
    for role in ceremony.requests:
        ceremony.sign(keys.signers(role)[0], utc_now())
    Repository(repository.path, KeyRing(*keys.folders, circle.folder / "host")).enact(ceremony)


def test_targets_hold_delegations_and_no_releases(repository: Repository, publish: Publish) -> None:
    for name, number in (("a", 1), ("b.2_x-y", 1), ("a", 2)):
        publish(name, number)
    targets = _signed(repository, "targets")
    assert (targets.version, targets.targets) == (3, {})  # one more for each name, not each release
    given = delegations_of(targets)
    assert {role: each.paths for role, each in given.items()} == {
        "name.a": ["a/*/release.json"],
        "name.b.2_x-y": ["b.2_x-y/*/release.json"],
    }
    assert set(_signed(repository, "name.a").targets) == {"a/1/release.json", "a/2/release.json"}
    assert set(_signed(repository, "name.b.2_x-y").targets) == {"b.2_x-y/1/release.json"}
    repository.retire("a", 1)
    assert _live(repository) == [("a", 2), ("b.2_x-y", 1)]
    assert _signed(repository, "targets").version == 3
    assert publish("a", 3) == 3
    assert not [f for f in examine(repository.path) if f.severity == "problem"]


def test_two_publish_new_names_at_the_same_time(
    repository: Repository, keys: KeyRing, publish: Publish
) -> None:
    """Neither delegation is lost, nor a release of the same name."""
    start, numbers, errors = threading.Barrier(4), [], []

    def work(name: str, number: int) -> None:
        start.wait(timeout=60)
        try:
            numbers.append((name, publish(name, number, Repository(repository.path, keys))))
        except RepositoryError as error:  # pragma: no cover
            errors.append(error)

    workers = [
        threading.Thread(target=work, args=each)
        for each in (("a", 1), ("b", 1), ("c", 1), ("c", 2))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert not errors
    assert sorted(numbers) == _live(repository) == [("a", 1), ("b", 1), ("c", 1), ("c", 2)]


def test_lists_follow_a_rotated_key(
    repository: Repository, keys: KeyRing, publish: Publish
) -> None:
    for name in ("a", "b"):
        publish(name)
    old = keys.signers("targets")[0].public_key.keyid
    repository.rotate_key("targets")
    new = keys.signers("targets")[0].public_key.keyid
    targets = _signed(repository, "targets")
    assert targets.delegations is not None
    assert set(targets.delegations.keys) == {new} != {old}
    for role in ("name.a", "name.b"):
        path = repository.path / "metadata" / f"2.{role}.json"
        assert set(Metadata[Targets].from_file(str(path)).signatures) == {new}
    assert _live(repository) == [("a", 1), ("b", 1)]
    assert publish("a", 2) == 2
    keys.path("targets").write_bytes((keys.folders[0] / "targets.pem.old").read_bytes())
    with pytest.raises(KeyFileError, match="not the one this repository trusts"):
        publish("a", 3)


def test_every_key_of_targets_signs_the_list_of_a_name(
    circle: Circle, tmp_path: Path, publish: Publish
) -> None:
    online = circle.online("host", "snapshot", "timestamp")
    for folder in ("one", "two"):
        circle.online(folder, "targets")
    offline = RoleKeys(circle.keys("one.targets", "two.targets"), 2)
    made = module.first_metadata(
        {
            "root": RoleKeys(circle.keys("alice")),
            "targets": offline,
            **{role: RoleKeys(circle.keys(f"host.{role}")) for role in ("snapshot", "timestamp")},
        },
        module.Expiry(),
        utc_now(),
    )
    ceremony = circle.sign(
        module.Ceremony.create(circle.folder / "first", made, None, utc_now()),
        ["alice", "one.targets", "two.targets"],
    )
    Repository.create(tmp_path / "served", online, ceremony=ceremony)
    folders = [circle.folder / name for name in ("host", "one", "two")]
    both = Repository(tmp_path / "served", KeyRing(*folders))
    publish("a", by=both)
    assert delegations_of(_signed(both, "targets"))["name.a"].threshold == 2
    assert _live(both) == [("a", 1)]
    with pytest.raises(ThresholdNotMet, match="targets role needs 2 signatures, and 1"):
        publish("a", 2, Repository(both.path, KeyRing(*folders[:2])))


@pytest.mark.parametrize("why", ["other keys", "renewal"])
def test_holders_sign_one_list_and_it_is_parted_again(
    circle: Circle, repository: Repository, keys: KeyRing, publish: Publish, why: str
) -> None:
    """What they compare is one digest, however many names there are."""
    for name, number in (("a", 1), ("a", 2), ("b", 1)):
        publish(name, number)
    repository.retire("a", 1)
    circle.online("fresh", "targets")
    old = keys.signers("targets")[0].public_key.keyid
    change = Change(renew=["targets"])
    if why == "other keys":
        change = Change(add={"targets": circle.keys("fresh.targets")}, revoke={"targets": [old]})
    ceremony = circle.prepare(repository, change)
    assert set(ceremony.requests) <= {"root", "targets"}
    ceremony.sign(keys.signers("root")[0], utc_now()) if why == "other keys" else None
    signer = circle.signer("fresh.targets") if why == "other keys" else keys.signers("targets")[0]
    ceremony.sign(signer, utc_now())
    repository.enact(ceremony)
    targets = _signed(repository, "targets")
    assert delegations_of(targets) == {}
    assert targets.unrecognized_fields[NEXT_VERSION] == {"a": 3, "b": 2}
    assert _live(repository) == [("a", 2), ("b", 1)]
    folder = circle.folder / "fresh"
    ring = KeyRing(folder, *keys.folders) if why == "other keys" else keys
    if why == "other keys":
        keys.path("targets").unlink()
    assert publish("a", 3, Repository(repository.path, ring)) == 3
    assert _signed(repository, "targets").targets == {}
    assert _signed(repository, "name.a").version > 3  # it goes on: devices notice a rollback
    assert _live(repository) == [("a", 2), ("a", 3), ("b", 1)]


def test_a_name_that_is_handed_over_takes_its_list_along(
    circle: Circle, repository: Repository, keys: KeyRing, publish: Publish
) -> None:
    for name, number in (("toy", 1), ("toy-2", 1), ("other", 1), ("toy", 2)):
        publish(name, number)
    repository.retire("toy", 2)
    circle.online("host", "robot")
    change = Change(delegate={"robot": ["toy", "toy-*"]}, add={"robot": circle.keys("host.robot")})
    _by_targets_keys(circle, repository, keys, change)
    assert set(delegations_of(_signed(repository, "targets"))) == {"name.other", "robot"}
    assert _signed(repository, "targets").targets == {}
    assert _live(repository) == [("other", 1), ("toy", 1), ("toy-2", 1)]
    keys.path("targets").unlink()
    robot = Repository(repository.path, KeyRing(*keys.folders, circle.folder / "host"))
    assert publish("toy", 3, robot) == 3
    with pytest.raises(KeyFileError, match="keys change --delegate"):
        publish("other", 2, robot)


@pytest.mark.parametrize("meanwhile", ["retired", "published and retired"])
def test_nothing_that_was_retired_comes_back(
    circle: Circle, repository: Repository, keys: KeyRing, publish: Publish, meanwhile: str
) -> None:
    publish("a")
    publish("a", 2)
    ceremony = circle.prepare(repository, Change(renew=["targets"]))
    ceremony.sign(keys.signers("targets")[0], utc_now())
    if meanwhile == "published and retired":
        publish("a", 3)
        repository.retire("a", 3)
    else:
        repository.retire("a", 2)
    with pytest.raises(CeremonyError, match="retired since the ceremony was prepared"):
        repository.enact(ceremony)


def test_the_list_of_a_name_has_no_keys_of_its_own(
    circle: Circle, repository: Repository, publish: Publish
) -> None:
    publish("a")
    for change in (
        Change(threshold={"name.a": 1}),
        Change(add={"name.a": circle.keys("mallory")}),
        Change(withdraw=["name.a"]),
    ):
        with pytest.raises(CeremonyError, match=r"no role 'name\.a'"):
            circle.prepare(repository, change)
    with pytest.raises(CeremonyError, match="cannot name a role"):
        circle.prepare(repository, Change(delegate={"name.b": ["b"]}))
    with pytest.raises(RepositoryError, match=r"timestamp, not name\.a"):
        repository.renew(["name.a"])


@pytest.mark.parametrize("step", ["publish", "retire", "renew"])
def test_one_list_of_all_names_is_read_and_parted(
    repository: Repository, keys: KeyRing, publish: Publish, step: str
) -> None:
    for name, number in (("a", 1), ("a", 2), ("b", 1)):
        publish(name, number)
    repository.retire("a", 1)
    _as_before(repository, keys)
    assert delegations_of(_signed(repository, "targets")) == {}
    live = [("a", 2), ("b", 1)]
    assert _live(repository) == live
    if step == "publish":
        assert publish("c") == 1
        live.append(("c", 1))
    elif step == "retire":
        repository.retire("b", 1)
        live.remove(("b", 1))
    else:
        assert set(repository.renew(["targets"])) == {"targets", "snapshot", "timestamp"}
    assert _signed(repository, "targets").targets == {}
    assert _live(repository) == live
    assert publish("b", 2) == 2
    assert publish("a", 3) == 3


def test_expiry_of_lists_is_that_of_targets(
    repository: Repository, keys: KeyRing, publish: Publish
) -> None:
    publish("a")
    publish("b")
    clock = [utc_now()]
    timed = Repository(repository.path, keys, now=lambda: clock[0])
    clock[0] += timedelta(days=80)
    publish("a", 2, timed)  # in the first half nothing else is signed
    assert _signed(timed, "targets").version == 3
    assert _signed(timed, "name.b").version == 1
    assert timed.expires()["targets"] < clock[0] + timedelta(days=101)
    clock[0] += timedelta(days=60)
    by_subject = {f.subject: f for f in examine(timed.path, now=lambda: clock[0])}
    assert by_subject["targets"].code == "expires-soon"
    assert "name.b" not in by_subject
    assert "renew --role targets" in by_subject["targets"].remedy
    assert set(timed.expiring()) == {"targets", "snapshot", "timestamp"}
    publish("a", 3, timed)  # and in the second half whatever the same keys sign
    assert _signed(timed, "name.b").version == 2
    assert timed.expires()["targets"] > clock[0] + timedelta(days=179)
    clock[0] += timedelta(days=150)
    keys.path("root").rename(keys.path("root").with_suffix(".away"))
    assert set(timed.renew(["targets"])) == {"targets", "snapshot", "timestamp"}
    assert timed.expires()["targets"] > clock[0] + timedelta(days=179)


def test_a_list_that_was_cut_off_supersedes_nothing(
    repository: Repository, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("a")
    real = module.write_atomically

    def cut(path: Path, data: bytes) -> None:
        if path.name == "timestamp.json":
            raise OSError("power")
        real(path, data)

    monkeypatch.setattr(module, "write_atomically", cut)
    with pytest.raises(OSError, match="power"):
        publish("a", 2)
    monkeypatch.undo()
    _age(repository)
    repository.renew()  # removes what is superseded
    assert _live(repository) == [("a", 1)]
    assert publish("a", 3) == 2
    assert _live(repository) == [("a", 1), ("a", 2)]


def test_lists_that_ended_go_with_what_they_alone_refer_to(
    circle: Circle, repository: Repository, keys: KeyRing, publish: Publish
) -> None:
    publish("a")
    publish("b")
    _by_targets_keys(circle, repository, keys, Change(renew=["targets"]))
    folder = repository.path / "metadata"
    assert (folder / "1.name.a.json").is_file()  # a device may just have been told of it
    _age(repository)
    repository.renew()
    assert not list(folder.glob("*.name.*.json"))
    assert _live(repository) == [("a", 1), ("b", 1)]


def _age(repository: Repository) -> None:
    old = (utc_now() - timedelta(days=2)).timestamp()
    for path in repository.path.rglob("*"):
        os.utime(path, (old, old))
