"""Functions in a process of their own: what they return, and how they are ended."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from prunecast.common.bounded import (
    ChildFailed,
    ChildKilled,
    ChildTimeout,
    call_bounded,
    limit_data,
    own_bytes,
)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds the functions of this file under its plain name."""
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


def call(function: str, seconds: float = 60.0, **arguments: object) -> object:
    name = __name__.rpartition(".")[2]
    return call_bounded(f"{name}:{function}", arguments, seconds=seconds)


def add(a: int, b: int) -> list[int]:
    os.write(1, b"a library prints")
    return [a + b]


def fail() -> None:
    raise LookupError("nothing there")


def take(more: int, size: int) -> int:
    limit_data(more)
    before = own_bytes()
    held = bytearray(size)
    held[::4096] = b"x" * len(held[::4096])
    return own_bytes() - before


def end(number: int) -> None:
    os.kill(os.getpid(), number)


def leave(says: str = "") -> None:
    os.write(2, says.encode())
    os._exit(3)


def prattle() -> int:
    lost = 0
    for _ in range(1000):
        try:
            os.write(2, bytes(4096))
        except BlockingIOError:
            lost += 1
    return lost


def spin() -> None:
    while True:
        pass


def test_what_the_function_returns_comes_back() -> None:
    assert call("add", a=2, b=3) == [5]


def test_an_exception_comes_back_by_name() -> None:
    with pytest.raises(ChildFailed, match="nothing there") as caught:
        call("fail")
    assert caught.value.kind == "LookupError"


def test_without_an_answer_it_has_failed() -> None:
    with pytest.raises(ChildFailed, match="ended with 3 and without an answer") as caught:
        call("leave")
    assert caught.value.kind == "NoAnswer"


def test_what_it_says_last_is_told_and_does_not_hold_it() -> None:
    with pytest.raises(ChildFailed, match="without an answer: no such library") as caught:
        call("leave", says="first\nno such library\n")
    assert caught.value.kind == "NoAnswer"
    with pytest.raises(ChildFailed) as caught:
        call("leave", says="cannot allocate memory for thread-local data: ABORT\n")
    assert caught.value.kind == "MemoryError"
    assert call("prattle") > 900  # type: ignore[operator]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_ends_the_child_alone(number: signal.Signals) -> None:
    with pytest.raises(ChildKilled, match=number.name) as caught:
        call("end", number=int(number))
    assert caught.value.signal == number


def test_it_is_killed_when_its_time_is_over() -> None:
    with pytest.raises(ChildTimeout, match="not done after 3 seconds"):
        call("spin", seconds=3.0)


def test_whoever_waits_can_end_it() -> None:
    name = __name__.rpartition(".")[2]

    def poll() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_bounded(f"{name}:spin", {}, seconds=600.0, poll=poll)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit data")
def test_memory_is_limited_beyond_what_is_held() -> None:
    size = 64 << 20
    assert call("take", more=2 * size, size=size) >= size  # type: ignore[operator]
    with pytest.raises(ChildFailed) as caught:
        call("take", more=size // 2, size=size)
    assert caught.value.kind == "MemoryError"
