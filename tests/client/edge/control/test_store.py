"""What the agent keeps of its fleet: bounded, atomic, and never two answers for one."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tuf.api.exceptions import DownloadError

from prunecast.client.edge import Agent, AgentConfig, EdgeModel
from prunecast.client.edge.config import Order, UpdateResult
from prunecast.client.edge.control import (
    ControlChannel,
    ControlFetcher,
    Controller,
    ControlSettings,
)
from prunecast.client.edge.control.channel import Backoff
from prunecast.client.edge.control.store import (
    ControlStore,
    StoredAnswer,
    StoredDirective,
    StoredReport,
)
from prunecast.client.edge.errors import ControlProblem, StateError
from prunecast.client.edge.records import State
from prunecast.client.edge.state import StateFolder


@pytest.fixture
def open_store(tmp_path: Path) -> Callable[[], ControlStore]:
    numbers = itertools.count()
    return lambda: ControlStore(StateFolder(tmp_path), lambda: f"id{next(numbers):06}")


def test_it_outlives_the_process(open_store: Callable[[], ControlStore]) -> None:
    store = open_store()
    store.welcome("cam", "print")
    directive = StoredDirective(3, "toy", 2, True, "r2")
    assert store.accept(directive)
    assert not store.accept(directive)
    answer = StoredAnswer(3, 2, "confirmed", "fine")
    store.queue(StoredReport("0.1.0", 2, answer=answer, error="hot", figures={"a": 1.0}, made=5.0))
    again = open_store()
    assert (again.directive, again.device, again.first()) == (directive, "cam", store.first())
    assert not again.is_due(answer)
    assert (again.name_for("print"), again.name_for("other")) == ("cam", "")
    waiting = again.first()
    assert waiting is not None
    again.done(waiting.id)
    assert open_store().first() is None


def test_an_answer_is_due_once_and_a_failure_once_more(
    open_store: Callable[[], ControlStore],
) -> None:
    store = open_store()
    good, bad = StoredAnswer(1, 2, "confirmed"), StoredAnswer(1, 2, "crash loop")
    active = StoredAnswer(1, 2, "activated")
    assert store.is_due(active)
    store.queue(StoredReport("", 2, answer=active))
    assert not store.is_due(active)
    assert store.is_due(bad)
    assert store.is_due(good)
    store.queue(StoredReport("", 2, answer=good))
    assert not store.is_due(good)
    assert not store.is_due(active)
    assert store.is_due(bad)
    store.queue(StoredReport("", 1, answer=bad))
    assert not store.is_due(bad)
    assert not store.is_due(good)
    assert store.is_due(StoredAnswer(2, 2, "confirmed"))


def test_the_queue_is_bounded_and_says_last_how_the_device_is(
    tmp_path: Path,
) -> None:
    numbers = itertools.count()
    store = ControlStore(StateFolder(tmp_path), lambda: f"id{next(numbers):06}", most=8)
    for number in range(12):
        store.queue(StoredReport("", None, answer=StoredAnswer(number, 1, "confirmed")))
        store.queue(StoredReport("", None, error=f"problem {number}"))
    assert len(store) == 8
    kept, answers = [], 0
    while (report := store.first()) is not None:
        kept.append(report.id)
        answers += report.answer is not None
        last = report
        store.done(report.id)
    assert (answers, last.error) == (7, "problem 11")
    assert len(set(kept)) == 8


def test_what_belongs_to_another_device_is_dropped(
    open_store: Callable[[], ControlStore],
) -> None:
    store = open_store()
    store.welcome("cam", "a")
    store.accept(StoredDirective(1, "toy", 1))
    store.queue(StoredReport("", 1, answer=StoredAnswer(1, 1, "confirmed")))
    store.welcome("cam", "b")  # its token was renewed
    assert (len(store), store.directive) == (1, StoredDirective(1, "toy", 1))
    store.welcome("other", "c")
    assert (len(store), store.directive, store.device) == (0, None, "other")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": 1}', b'{"schema": 2}'])
def test_a_damaged_file_is_none(
    open_store: Callable[[], ControlStore], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "control.json").write_bytes(content)
    store = open_store()
    assert (store.directive, store.first()) == (None, None)
    store.accept(StoredDirective(1))
    assert json.loads((tmp_path / "control.json").read_bytes())["directive"]["serial"] == 1


def test_a_disk_that_refuses_is_named_and_the_directive_holds(
    open_store: Callable[[], ControlStore], tmp_path: Path
) -> None:
    store = open_store()
    (tmp_path / "control.json").mkdir()
    with pytest.raises(StateError):
        store.accept(StoredDirective(1, "toy", 1))
    assert store.directive == StoredDirective(1, "toy", 1)


def test_settings_are_checked(tmp_path: Path) -> None:
    token = tmp_path / "token"
    for address in ("", "host", "host:0", "host:99999", "a b:1", "http://host:1"):
        with pytest.raises(ControlProblem, match="HOST:PORT"):
            ControlSettings(address, token_file=token)
    for pair in ({}, {"token_file": token, "certificate": (token, token)}):
        with pytest.raises(ControlProblem, match="either a token or a certificate"):
            ControlSettings("host:1", **pair)
    settings = ControlSettings("[::1]:8444", token_file=token)
    with pytest.raises(ControlProblem, match="cannot read"):
        settings.token()
    token.write_text("short\n")
    with pytest.raises(ControlProblem, match="holds no device token"):
        settings.token()
    token.write_text("a" * 43 + "\n")
    assert settings.token() == "a" * 43
    print_ = settings.fingerprint()
    token.write_text("b" * 43)
    assert settings.fingerprint() != print_


def test_waits_are_spread_grow_and_end() -> None:
    backoff = Backoff(1.0, 60.0, random.Random(3))
    waits = [backoff.next() for _ in range(200)]
    assert waits[0] <= 1
    assert max(waits) <= 60
    assert sum(waits[10:]) / 190 == pytest.approx(30, abs=4)
    assert 30 <= backoff.long() <= 60
    backoff.reset()
    assert backoff.next() <= 1


def test_directives_of_another_release_are_not_answered(tmp_path: Path) -> None:
    class At3(EdgeModel):
        version = 3  # type: ignore[assignment]

    class Held(Agent):
        def __init__(self) -> None:
            self.config = AgentConfig(tmp_path, "https://nowhere/", "digits", b"")
            self.model = At3()
            self._kept = SimpleNamespace(state=State("digits"))  # type: ignore[assignment]

    settings = ControlSettings("fleet.example:1", token_file=tmp_path / "token")
    controller = Controller(Held(), ControlChannel(settings), wake=threading.Event())
    result = UpdateResult("current", 3)
    controller.store.accept(StoredDirective(1, "digits", 3))
    assert controller._answer(result) is not None
    controller.store.accept(StoredDirective(2, "letters", 3))
    assert controller._answer(result) is None
    assert controller.order() == Order()


def test_a_server_that_sends_nothing_is_a_failed_download(tmp_path: Path) -> None:
    class Silent(ControlChannel):
        def call(self, method: str, request: object, timeout: float | None = None) -> Any:
            class Call(list[Any]):
                def cancel(self) -> None: ...

            return Call()

    settings = ControlSettings("fleet.example:1", token_file=tmp_path / "token")
    with pytest.raises(DownloadError, match="sent nothing"):
        ControlFetcher(Silent(settings)).open(f"{settings.url}blobs/0")
