"""What a fleet stands on is not withdrawn, whoever withdraws it."""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.versions import PublishedModel
from prunecast.server.fleet.audit import audit_text
from prunecast.server.fleet.errors import ReleaseUnknown
from prunecast.server.fleet.events import (
    Abort,
    AddGroup,
    PinDevice,
    PinGroup,
    Promote,
    RevokeDevice,
    StartRollout,
)
from prunecast.server.fleet.model import Release, RolloutPolicy, Status
from prunecast.server.fleet.reports import DeviceState
from prunecast.server.fleet.service import FleetService
from prunecast.server.repository import (
    FleetUnanswered,
    KeyRing,
    PublishedRelease,
    ReleaseInUse,
    Repository,
    RepositoryError,
    examine,
)
from prunecast.server.repository.fleets import forget_fleet, known_fleets, remember_fleet
from support.releases import publish_model

Model = Callable[[int], PublishedModel]
Publish = Callable[[int], PublishedRelease]


@pytest.fixture
def publish(
    repository: Repository, graph: ExportedGraph, model: Model, images: np.ndarray
) -> Publish:
    return lambda n: publish_model(repository, "toy", model(n), graph, selftest_inputs=images)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'fleet.db'}"


@pytest.fixture
def fleet(repository: Repository, publish: Publish, url: str) -> Iterator[FleetService]:
    """Releases 1 to 3; group lab stands on 1, and the repository knows of the fleet."""
    for number in (1, 2, 3):
        publish(number)

    def live() -> list[Release]:
        return [Release(e.name, e.version) for e in repository.releases()]

    FleetService.create(url, live).close()
    remember_fleet(repository.path, url)
    with FleetService(url, live, guard=repository.held) as service:
        service.operate(AddGroup(at=0, group="lab", release="toy", stable=1))
        service.enrol("cam", "lab", now=0, actor="ada")
        yield service


def live(repository: Repository) -> list[int]:
    return [entry.version for entry in repository.releases()]


def start(version: int, name: str = "r") -> StartRollout:
    policy = RolloutPolicy(automatic=False)
    return StartRollout(
        at=1, rollout=name, release=Release("toy", version), groups=("lab",), policy=policy
    )


def refused(repository: Repository, version: int) -> str:
    with pytest.raises(ReleaseInUse) as caught:
        repository.retire("toy", version)
    assert version in live(repository)
    return str(caught.value)


def test_every_way_to_stand_on_a_release_is_refused_with_its_remedy(
    repository: Repository, fleet: FleetService, url: str
) -> None:
    said = refused(repository, 1)
    assert f"group lab has it as its stable release (fleet {url})" in said
    assert "`prunecast fleet rollout start toy VERSION --group lab`" in said
    fleet.operate(start(2))
    said = refused(repository, 2)
    assert "rollout r brings it to devices" in said
    assert "`prunecast fleet abort r`" in said
    said = refused(repository, 1)
    assert "rollout r goes back to it in group lab" in said
    assert "wait until rollout r has completed" in said
    fleet.operate(PinDevice(at=2, device="cam", version=3))
    said = refused(repository, 3)
    assert "device cam is pinned to it" in said
    assert "unpin --device cam" in said
    fleet.operate(RevokeDevice(at=3, device="cam"))
    repository.retire("toy", 3)  # nobody will be told it any more
    fleet.operate(Abort(at=4, rollout="r"))
    fleet.operate(PinGroup(at=5, group="lab", version=2))
    said = refused(repository, 2)
    assert "group lab is pinned to it" in said
    assert "unpin --group lab" in said
    fleet.operate(PinGroup(at=6, group="lab", version=None))
    repository.retire("toy", 2)
    assert live(repository) == [1]


def test_the_window_passes_over_what_a_fleet_needs(
    repository: Repository, fleet: FleetService, publish: Publish, url: str
) -> None:
    repository.window = 2
    made = publish(4)
    assert (made.retired, list(made.kept)) == ((2,), [1])
    assert made.kept[1] == f"group lab has it as its stable release (fleet {url})"
    assert live(repository) == [1, 3, 4]
    fleet.operate(start(4))
    for stage in range(3):
        fleet.operate(Promote(at=stage + 2, rollout="r"))
    assert fleet.rollout("r").status is Status.COMPLETED


def test_a_fleet_that_does_not_answer_loses_nothing(
    repository: Repository, fleet: FleetService, publish: Publish, url: str, tmp_path: Path
) -> None:
    (tmp_path / "fleet.db").rename(tmp_path / "moved.db")
    with pytest.raises(FleetUnanswered, match=r"holds no fleet.*fleets REPOSITORY --forget"):
        repository.retire("toy", 3)
    repository.window = 1
    made = publish(4)
    assert made.retired == ()
    assert list(made.kept) == [1, 2, 3]
    assert "cannot be asked" in made.kept[2]
    assert "fleet-unanswered" in {f.code for f in examine(repository.path)}
    repository.retire("toy", 3, force=True)
    forget_fleet(repository.path, url)
    repository.retire("toy", 2)
    assert live(repository) == [1, 4]
    (repository.path / ".fleets.json").write_text("{")
    with pytest.raises(FleetUnanswered, match="nobody knows which fleets"):
        repository.retire("toy", 1)


def test_urls_are_kept_without_passwords_and_for_the_owner_alone(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    remember_fleet(repository.path, "sqlite:///fleet.db")
    remember_fleet(repository.path, "postgresql://fleet:hunter2@db/fleet?password=hunter2")
    assert known_fleets(repository.path) == (
        "postgresql+psycopg://fleet@db/fleet",
        f"sqlite:///{tmp_path / 'fleet.db'}",
    )
    path = repository.path / ".fleets.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "hunter2" not in path.read_text()
    forget_fleet(repository.path, "postgresql://fleet:other@db/fleet")
    assert known_fleets(repository.path) == (f"sqlite:///{tmp_path / 'fleet.db'}",)
    with pytest.raises(RepositoryError, match="is none of the fleets of"):
        forget_fleet(repository.path, "sqlite:///other.db")


def test_a_given_fleet_is_asked_beside_those_that_are_remembered(
    repository: Repository, fleet: FleetService, url: str, tmp_path: Path
) -> None:
    forget_fleet(repository.path, url)
    keys = KeyRing(tmp_path / "keys")
    with pytest.raises(ReleaseInUse, match="group lab has it"):
        Repository(repository.path, keys, fleets=[url]).retire("toy", 1)
    Repository(repository.path, keys).retire("toy", 1)
    assert {f.code for f in examine(repository.path)}.isdisjoint({"fleet-on-retired"})
    found = [f for f in examine(repository.path, fleets=[url]) if f.code == "fleet-on-retired"]
    (finding,) = found
    assert finding.severity == "problem"
    assert finding.subject == f"group lab (fleet {url})"
    assert "has it as its stable release: toy 1, which is retired" in finding.what


def test_an_abort_that_cannot_roll_back_says_so(
    repository: Repository, fleet: FleetService
) -> None:
    fleet.operate(start(2))
    token = fleet.renew_token("cam", now=1, actor="ada")
    assert fleet.poll(token, DeviceState(1), 2).release == Release("toy", 2)
    repository.retire("toy", 1, force=True)
    (warning,) = fleet.operate(Abort(at=3, rollout="r", reason="blurred"))
    lost = "group lab cannot go back: toy 1, its stable release, is retired"
    assert lost in warning
    assert "keep what they run" in warning
    assert fleet.rollout("r").reason == f"blurred; {lost}"
    (entry,) = fleet.audit(subject="r", limit=1)
    assert audit_text(entry) == f"blurred; {lost}"
    assert entry.fields["no_way_back"] == {"lab": 1}
    # standing on what is retired: the next rollout says beforehand that it is a one-way street
    (warning,) = fleet.operate(start(3, "again"))
    assert warning.startswith(lost)


def test_a_release_is_retired_or_rolled_out_but_not_both(
    repository: Repository, fleet: FleetService
) -> None:
    """Each side looks and acts under the repository's lock, so one of them is refused."""
    asked, entered, go_on = threading.Event(), threading.Event(), threading.Event()
    uses = repository._fleets.require_unused

    def slow(*given: Any) -> tuple[str, ...]:
        found = uses(*given)
        asked.set()
        assert go_on.wait(30)
        return found

    def guard() -> AbstractContextManager[None]:
        entered.set()
        return repository.held()

    repository._fleets.require_unused = slow  # type: ignore[method-assign]
    fleet._guard = guard
    with ThreadPoolExecutor(2) as pool:
        retiring = pool.submit(repository.retire, "toy", 2)
        assert asked.wait(30)  # nobody uses 2, says the fleet
        starting = pool.submit(fleet.operate, start(2))
        assert entered.wait(30)  # and waits for the lock: its look at the live ones comes later
        go_on.set()
        retiring.result(30)
        with pytest.raises(ReleaseUnknown, match="no live release toy 2"):
            starting.result(30)
    assert live(repository) == [1, 3]
    repository.patience = timedelta(0)
    with repository.held(), pytest.raises(RepositoryError, match="another process"):
        fleet.operate(start(3))
