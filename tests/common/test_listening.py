"""Places for connections, and a log that strangers cannot fill."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable, Iterator

import pytest

from prunecast.common.listening import Admission, Place, SparingLog, Standing, allow_descriptors


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Room:
    """An admission, and the names of those who had to make room."""

    def __init__(self, most: int, per_client: int) -> None:
        self.clock, self.ended = Clock(), list[str]()
        self.places = Admission(most, per_client, patience=1.0, clock=self.clock)

    def enter(self, client: str, name: str = "") -> Place | None:
        return self.places.enter(client, lambda: self.ended.append(name))

    def stands(self, client: str, name: str, standing: Standing) -> Place:
        place = self.enter(client, name)
        assert place is not None
        self.places.move(place, standing)
        return place


def test_an_address_has_its_share_and_its_oldest_stranger_makes_room() -> None:
    room = Room(10, 2)
    assert room.enter("a", "first")
    room.clock.now = 0.5
    assert room.enter("a", "second")
    assert room.enter("a") is None  # both are young
    assert room.enter("b")
    room.clock.now = 1.0
    assert room.enter("a")
    assert (room.ended, len(room.places)) == (["first"], 3)
    assert room.enter("a") is None


def test_who_is_served_or_known_is_not_ended() -> None:
    room = Room(3, 2)
    room.stands("a", "served", Standing.BUSY)
    room.stands("a", "known", Standing.KNOWN)
    assert room.enter("a", "silent")  # who is known is not of its address any more
    room.clock.now = 10.0
    assert room.enter("a")
    assert room.ended == ["silent"]
    room = Room(2, 2)
    room.stands("a", "served", Standing.BUSY)
    room.stands("a", "known", Standing.KNOWN)
    room.clock.now = 10.0
    assert room.enter("b") is None
    assert room.ended == []


def test_a_full_server_takes_from_the_address_that_holds_most() -> None:
    room = Room(5, 5)
    room.stands("a", "idle", Standing.IDLE)
    for name in ("old", "young", "youngest"):
        room.enter("a", name)
    room.enter("b", "other")
    assert room.enter("a") is None  # it is itself that address, and nobody has waited long
    assert room.enter("c")
    assert room.enter("d")
    assert room.ended == ["old", "young"]  # strangers first, the oldest of them
    assert room.enter("e")  # of two
    assert room.enter("f") is None  # all hold as much as the newcomer would
    room.clock.now = 1.0
    assert room.enter("f")
    assert room.ended == ["old", "young", "youngest", "other"]


def test_idle_ones_go_after_strangers() -> None:
    room = Room(4, 4)
    for name in ("first", "second", "third"):
        room.stands("a", name, Standing.IDLE)
    room.enter("b", "stranger")
    assert room.enter("c", "newcomer")
    assert room.ended == ["first"]
    assert room.enter("c") is None
    room.clock.now = 1.0
    for client in "cd":
        assert room.enter(client)
    assert room.ended == ["first", "stranger", "newcomer"]


@pytest.mark.parametrize("per_client", [2, 9], ids=["its share", "all places"])
def test_who_has_begun_has_longer_than_who_is_silent(per_client: int) -> None:
    room = Room(2, per_client)
    room.stands("a", "begun", Standing.BEGUN)
    room.clock.now = 9.0
    assert room.enter("a", "silent")
    assert room.enter("a") is None
    room.clock.now = 9.5
    assert room.enter("a") is None
    room.clock.now = 10.0
    assert room.enter("a", "newcomer")
    assert room.enter("a", "last")
    assert room.enter("a") is None
    assert room.ended == ["silent", "begun"]


@pytest.mark.parametrize("per_client", [3, 9], ids=["its share", "all places"])
def test_a_flood_of_strangers_ends_no_idle_client(per_client: int) -> None:
    room = Room(3, per_client)
    room.stands("a", "client", Standing.IDLE)
    room.clock.now = 10.0  # it has waited for long, and the strangers have not
    assert room.enter("a", "stranger")
    assert room.enter("a", "stranger")
    assert room.enter("a") is None
    room.clock.now = 11.0
    assert room.enter("a")
    assert room.ended == ["stranger"]


def test_places_are_given_back_once() -> None:
    room = Room(2, 2)
    first = room.stands("a", "x", Standing.KNOWN)
    second = room.enter("a")
    assert second is not None
    for place in (first, first, second, second):
        room.places.leave(place)
    room.places.move(first, Standing.IDLE)
    assert len(room.places) == 0
    assert room.enter("a")
    assert room.enter("a")
    assert room.ended == []


def test_many_addresses_are_forgotten_again() -> None:
    room = Room(2, 2)
    for number in range(1000):
        if place := room.enter(f"10.0.0.{number}"):
            room.places.leave(place)
    assert not room.places._held
    assert not any(room.places._waiting.values())


def test_a_flood_writes_a_few_lines_and_then_how_many_there_were(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    log = SparingLog(logging.getLogger("listening"), lines=2, interval=60.0, clock=clock)
    for number in range(1000):
        log.warning("refused", "%s is refused", number)
    log.warning("other", "something else")
    clock.now = 61.0
    log.warning("refused", "%s is refused", "later")
    log.close()
    assert [record.getMessage() for record in caplog.records] == [
        "0 is refused",
        "1 is refused",
        "something else",
        "998 more like that (refused) in 61 seconds",
        "later is refused",
    ]


@pytest.fixture
def soft() -> Iterator[Callable[[int], None]]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda count: resource.setrlimit(resource.RLIMIT_NOFILE, (count, limits[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_soft_limit_of_files_becomes_the_hard_one(soft: Callable[[int], None]) -> None:
    soft(256)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert allow_descriptors() == hard
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
