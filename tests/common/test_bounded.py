"""Functions in a process of their own: what they return, and how they are ended."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from prunecast.common.bounded import (
    ChildError,
    ChildFailed,
    ChildKilled,
    ChildTimeout,
    bound_process,
    call_bounded,
    own_bytes,
)

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds the functions of this file under its plain name."""
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


def call(
    function: str, seconds: float = 60.0, memory: int | None = None, **arguments: object
) -> object:
    name = __name__.rpartition(".")[2]
    return call_bounded(f"{name}:{function}", arguments, seconds=seconds, memory=memory)


def add(a: int, b: int) -> list[int]:
    os.write(1, b"a library prints")
    return [a + b]


def fail() -> None:
    raise LookupError("nothing there")


def take(more: int, size: int) -> int:
    bound_process(memory=more)
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


def run(code: str) -> object:
    scope: dict[str, object] = {"bound_process": bound_process}
    exec(code, scope)
    return scope.get("found")


def test_what_the_function_returns_comes_back() -> None:
    assert call("add", a=2, b=3) == [5]


def test_a_function_that_closes_its_output_still_answers() -> None:
    assert call("run", code="print('a' * 100)\nimport os; os.close(1); found = 1") == 1


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


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
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


def test_what_lies_in_the_current_folder_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "types.py").write_text("raise SystemExit('a stranger ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert call("run", code="import types; found = types.__name__") == "types"


def test_memory_ends_it() -> None:
    with pytest.raises(ChildFailed) as caught:
        call("run", code="x = bytearray(8 << 30)", memory=64 * MEGABYTE)
    assert caught.value.kind == "MemoryError"
    assert call("run", code="found = len(bytearray(32 << 20))", memory=64 * MEGABYTE) == 32 << 20


def test_a_library_that_aborts_for_want_of_memory_is_no_crash() -> None:
    code = 'import os; os.write(2, b"what(): std::bad_alloc"); os.abort()'
    with pytest.raises(ChildFailed, match="bad_alloc") as caught:
        call("run", code=code)
    assert caught.value.kind == "MemoryError"


def test_widened_bounds_hold() -> None:
    code = "bound_process(memory=4 << 30, seconds=60)\n"
    code += "import mmap; mmap.mmap(-1, 2 << 30, mmap.MAP_PRIVATE); found = 1"
    assert call("run", code=code, memory=64 * MEGABYTE) == 1
    late = "import time\nbound_process(seconds=60)\ntime.sleep(3)\nfound = 2"
    assert call("run", code=late, seconds=2.0) == 2


def test_time_ends_it_in_native_code_too() -> None:
    with pytest.raises(ChildTimeout):
        call("run", code="sum(range(10**15))", seconds=1.0)


def test_a_timer_ends_it_where_its_parent_blocks_the_signal() -> None:
    old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        with pytest.raises(ChildTimeout):
            call("spin", seconds=1.0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(1)", "while True: pass"])
def test_what_a_killed_process_leaves_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = f"import os, tempfile\nopen(tempfile.mkdtemp() + '/x', 'w').write('x')\n{end}"
    with suppress(ChildError):
        call("run", code=code, seconds=2.0)
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_written_it_runs_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    assert call("add", a=2, b=3) == [5]


def test_no_core_is_written() -> None:
    code = "import resource; found = resource.getrlimit(resource.RLIMIT_CORE)[0]"
    assert call("run", code=code) == 0
