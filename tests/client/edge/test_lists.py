"""A list for each name: what a device fetches, and what it makes of a list that is not the one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata

from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.errors import TrustError
from prunecast.client.edge.updating.trust import TrustedListing
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.server.repository import KeyRing, Repository
from support.network import Network

Publish = Callable[..., ReleaseManifest]
Start = Callable[..., Agent]


class Device:
    """What follows one name; `check` tells the files and the bytes that a check of it fetches."""

    def __init__(self, repository: Repository, network: Network, folder: Path, name: str) -> None:
        self.folder, self.name, self.network = folder, name, network
        self.root = repository.trusted_root()

    def check(self) -> tuple[list[str], int, list[int]]:
        self.network.asked.clear()
        got: list[int] = []
        listing = TrustedListing(
            "http://r.invalid", self.folder, self.root, self.network, on_bytes=got.append
        )
        versions = listing.versions(self.name)
        asked = [path.removeprefix("metadata/") for path, _ in self.network.asked]
        return [name for name in asked if not name.endswith("root.json")], sum(got), versions


@pytest.fixture
def device(repository: Repository, network: Network, tmp_path: Path) -> Callable[[str], Device]:
    """A function: a new device that follows a name."""
    made: list[Device] = []

    def device(name: str) -> Device:
        made.append(Device(repository, network, tmp_path / f"device-{len(made)}", name))
        return made[-1]

    return device


def test_what_a_device_fetches_does_not_grow_with_releases_of_other_names(
    repository: Repository, publish: Publish, device: Callable[[str], Device]
) -> None:
    publish(1, "a")
    publish(1, "b")
    follows = device("a")
    files, first, versions = device("a").check()
    assert files == ["timestamp.json", "3.snapshot.json", "3.targets.json", "1.name.a.json"]
    assert versions == [1]
    follows.check()
    for number in range(2, 6):
        publish(number, "b")
        files, _, versions = follows.check()
        assert files == ["timestamp.json", f"{number + 2}.snapshot.json"]
        assert versions == [1]
    repository.retire("b", 1)
    files, got, versions = device("a").check()
    # to the byte: numbers of one digit, as before
    assert (files[-1], got, versions) == ("1.name.a.json", first, [1])


def test_an_update_costs_the_same_beside_any_number_of_releases(
    repository: Repository, publish: Publish, device: Callable[[str], Device]
) -> None:
    publish(1, "a")
    publish(1, "b")
    alone, beside = device("a"), device("a")
    alone.check()
    publish(2, "a")
    files, cost, _ = alone.check()
    assert files == ["timestamp.json", "4.snapshot.json", "2.name.a.json"]
    beside.check()
    for number in (2, 3, 4):
        publish(number, "b")
    repository.retire("a", 1)
    assert beside.check()[1] == cost - _entry(repository, "a")


def _entry(repository: Repository, name: str) -> int:
    """Bytes of one release in its list: what the list has lost by retiring one."""
    folder = repository.path / "metadata"
    sizes = [(folder / f"{n}.name.{name}.json").stat().st_size for n in (2, 3)]
    return sizes[0] - sizes[1]


def test_an_old_list_of_one_name_is_refused_and_others_go_on(
    publish: Publish, network: Network, device: Callable[[str], Device]
) -> None:
    """Who freezes one name would have to freeze the snapshot, and with it every name."""
    publish(1, "a")
    publish(1, "b")
    held, other = device("a"), device("b")
    held.check()
    publish(2, "a")
    publish(2, "b")
    old = (network.folder / "metadata" / "1.name.a.json").read_bytes()
    network.replaced["metadata/2.name.a.json"] = old
    for frozen in (held, device("a")):
        with pytest.raises(TrustError):
            frozen.check()
    assert other.check()[2] == [1, 2]
    network.replaced.clear()
    assert held.check()[2] == [1, 2]
    seen = {f"metadata/{p.name}": p.read_bytes() for p in (network.folder / "metadata").iterdir()}
    publish(3, "a")
    assert held.check()[2] == [1, 2, 3]
    network.replaced |= seen  # as it was a release ago, all of it
    with pytest.raises(TrustError, match="older"):
        held.check()


def test_a_list_of_another_name_is_refused_in_its_place(
    publish: Publish, network: Network, device: Callable[[str], Device]
) -> None:
    """The same keys signed it, with the same number; taking it would hide every release."""
    publish(1, "a")
    publish(1, "b")
    other = (network.folder / "metadata" / "1.name.b.json").read_bytes()
    network.replaced["metadata/1.name.a.json"] = other
    follows = device("a")
    with pytest.raises(TrustError):
        follows.check()
    network.replaced.clear()
    assert follows.check()[2] == [1]


def test_an_expired_list_of_one_name(
    repository: Repository,
    keys: KeyRing,
    publish: Publish,
    device: Callable[[str], Device],
) -> None:
    publish(1, "a")
    publish(1, "b")
    state, now = repository._load(), datetime.now(UTC)
    files = state.sign(["name.a"], keys.signers, repository._expiry, now - timedelta(days=200))
    files |= state.sign(["snapshot"], keys.signers, repository._expiry, now)
    repository._commit(files)
    follows = device("a")
    with pytest.raises(TrustError, match="expired"):
        follows.check()
    assert device("b").check()[2] == [1]
    repository.renew(["targets"])
    assert follows.check()[2] == [1]


def test_a_device_follows_a_rotation_and_refuses_the_old_key(
    repository: Repository,
    keys: KeyRing,
    publish: Publish,
    network: Network,
    start: Start,
    config: AgentConfig,
) -> None:
    publish(1)
    agent = start()
    assert agent.update_once().version == 1
    repository.rotate_key("targets")
    assert agent.update_once().outcome == "current"
    publish(2)
    assert agent.update_once().version == 2
    # whoever has the revoked key, and those of snapshot and timestamp, too
    stolen = KeyRing.create(config.state.parent / "stolen")
    stolen.path("targets").write_bytes((keys.folders[0] / "targets.pem.old").read_bytes())
    state = repository._load()
    forged = state.delegated["name.toy"]
    forged.signed.version += 1
    forged.sign(stolen.signers("targets")[0])
    files = state._listed("name.toy")
    files |= state.sign(["snapshot"], keys.signers, repository._expiry, datetime.now(UTC))
    network.replaced |= {f"metadata/{name}": data for name, data in files.items()}
    with pytest.raises(TrustError, match=r"name\.toy was signed by 0/1 keys"):
        agent.update_once()
    assert agent.model.version == 2


def test_names_that_a_device_may_choose_from(
    publish: Publish, network: Network, start: Start, config: AgentConfig
) -> None:
    from prunecast.client.edge.errors import NoRelease

    publish(1, "a.b")
    publish(1, "c")
    agent = Agent(replace(config, name="none"), fetcher=network)
    with agent, pytest.raises(NoRelease, match=r"it has: a\.b, c"):
        agent.update_once()
    state = Metadata.from_file(str(config.state / "metadata" / "targets.json"))
    assert state.signed.targets == {}
