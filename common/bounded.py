"""A function of ours in a process of its own, for work that may never end or take all memory.

What runs inside a native library cannot be broken off from another thread: a process can be killed.
The child is a fresh interpreter, told which function to call by its name, so it inherits no locks,
threads or files. When memory runs out, the system ends it before its parent; when the parent ends,
an alarm ends it soon after.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prunecast.common.references import load_callable

__all__ = [
    "ChildError",
    "ChildFailed",
    "ChildKilled",
    "ChildTimeout",
    "call_bounded",
    "limit_data",
    "own_bytes",
]

_MAIN = "from prunecast.common.bounded import _serve; _serve()"
_POLL = 0.05  # seconds
_ALARM = 10  # seconds after its time, a child whose parent has gone ends itself
_MOST_ANSWER = 60_000  # bytes: less than a pipe holds, so that nobody needs to read meanwhile


class ChildError(RuntimeError):
    """Base of what `call_bounded` raises."""


class ChildTimeout(ChildError):
    """The function did not end in time."""


class ChildKilled(ChildError):
    """A signal ended the process.

    Attributes:
        signal: its number; SIGKILL comes from outside, most likely for want of memory.
    """

    def __init__(self, number: int) -> None:
        with suppress(ValueError):
            super().__init__(f"ended by {signal.Signals(number).name}")
        self.signal = number


class ChildFailed(ChildError):
    """The function raised an exception, or its process ended without an answer.

    Attributes:
        kind: name of the exception's class.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message or kind)
        self.kind = kind


def call_bounded(
    function: str,
    arguments: Mapping[str, Any],
    *,
    seconds: float,
    poll: Callable[[], None] = lambda: None,
) -> Any:
    """Call a function in a process of its own and wait for what it returns.

    Args:
        function: ``package.module:function``.
        arguments: by name; plain JSON values of less than 60 kB, and so is what comes back.
        seconds: after which the process is killed.
        poll: called all the time while waiting; what it raises ends the process.

    Raises:
        ChildTimeout: it did not end in time.
        ChildKilled: it crashed, or was killed by somebody else.
        ChildFailed: the function raised an exception.
    """
    told = json.dumps({"arguments": dict(arguments), "seconds": seconds}).encode()
    said, says = os.pipe()
    os.set_blocking(says, False)  # nobody reads meanwhile: what is too much is lost
    try:
        with subprocess.Popen(
            [sys.executable, "-P", "-c", _MAIN, function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=says,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        ) as child:
            answer, code = _wait(child, told, seconds, poll)
    finally:
        os.close(says)
        with os.fdopen(said, "rb") as file:
            last = file.read(_MOST_ANSWER).decode("utf-8", "replace").strip()
    if code < 0:
        raise ChildKilled(-code)
    return _result(answer, code, last)


def _wait(
    child: subprocess.Popen[bytes], told: bytes, seconds: float, poll: Callable[[], None]
) -> tuple[bytes, int]:
    """What a child answers, and its exit status; it is killed when something else happens."""
    deadline = time.monotonic() + seconds
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with suppress(BrokenPipeError), child.stdin:
            child.stdin.write(told)
        while True:
            try:
                code = child.wait(min(_POLL, max(0.0, deadline - time.monotonic())))
                return child.stdout.read(_MOST_ANSWER + 1), code
            except subprocess.TimeoutExpired:
                poll()
                if time.monotonic() >= deadline:
                    raise ChildTimeout(f"not done after {seconds:.0f} seconds") from None
    finally:
        child.kill()


def _result(answer: bytes, code: int, said: str) -> Any:
    try:
        document = json.loads(answer)
        if "result" in document:
            return document["result"]
        kind, message = str(document["error"]), str(document["message"])
    except (ValueError, KeyError, TypeError):
        last = f": {said.splitlines()[-1][:200]}" if said else ""
        kind, message = "NoAnswer", f"its process ended with {code} and without an answer{last}"
        if "cannot allocate memory" in said.lower():  # the C library ends a process so
            kind = MemoryError.__name__
    raise ChildFailed(kind, message)


def limit_data(more: int) -> None:
    """Let this process take at most so many bytes of memory beyond what it has by now.

    Counted is what Linux counts as data (`RLIMIT_DATA`), so neither files that are mapped nor
    address space that is only reserved. Elsewhere, nothing happens.
    """
    held = _status("VmData")
    if held is not None:
        import resource  # not on every system

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = held + more
        with suppress(OSError, ValueError):
            limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def own_bytes() -> int:
    """Bytes of memory that this process has filled itself, in RAM or swapped; 0: cannot be told."""
    return (_status("RssAnon") or 0) + (_status("VmSwap") or 0)


def _status(name: str) -> int | None:
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            field, _, value = line.partition(":")
            if field == name:
                return int(value.split()[0]) * 1024
    return None


def _serve() -> None:
    """What the child does."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    told = json.loads(sys.stdin.buffer.read())
    if hasattr(signal, "alarm"):
        signal.alarm(int(told["seconds"]) + _ALARM)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = {"result": load_callable(sys.argv[1])(**told["arguments"])}
    except BaseException as error:
        answer = {"error": type(error).__name__, "message": str(error)[:2000]}
    os.write(answers, json.dumps(answer).encode()[:_MOST_ANSWER])
    os._exit(0)  # without what a native library does at its end
