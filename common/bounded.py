"""A function of ours in a process of its own, for work that may never end or take all memory.

What runs inside a native library cannot be broken off from another thread: a process can be killed.
The child is a fresh interpreter, told which function to call by its name, so it inherits no locks,
threads or files. It imports what is installed and nothing that lies in the current folder, beside a
model perhaps. A timer of its own ends it, also when its parent has gone; when memory runs out, the
system ends it before its parent. What it leaves in its temporary folder, its parent removes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prunecast.common.references import load_callable

__all__ = [
    "ChildError",
    "ChildFailed",
    "ChildKilled",
    "ChildTimeout",
    "bound_process",
    "call_bounded",
    "is_out_of_memory",
    "own_bytes",
    "thread_bytes",
]

_MAIN = "from prunecast.common.bounded import _serve; _serve()"
_POLL = 0.05  # seconds
_THREAD = 1 << 24  # bytes
_PIPE = 1 << 16  # bytes that a pipe holds
_MOST_ANSWER = 60_000  # bytes: less than a pipe holds, so that nobody needs to read meanwhile
_MOST_MESSAGE = 4000  # characters, of twelve bytes in JSON at most


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
        kind: name of the exception's class; ``MemoryError``, too, where a library ended the
            process for want of memory, and ``NoAnswer`` where nothing says why.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message or kind)
        self.kind = kind


def call_bounded(
    function: str,
    arguments: Mapping[str, Any],
    *,
    seconds: float,
    memory: int | None = None,
    poll: Callable[[], None] = lambda: None,
) -> Any:
    """Call a function in a process of its own and wait for what it returns.

    The function may widen its bounds by `bound_process` where it learns that more is due.

    Args:
        function: ``package.module:function``.
        arguments: by name; plain JSON values of less than 60 kB, and so is what comes back.
        seconds: after which the process ends.
        memory: bytes that it may take beyond what importing the function took; None for no limit.
        poll: called all the time while waiting; what it raises ends the process.

    Raises:
        ChildTimeout: it did not end in time.
        ChildKilled: it crashed, or was killed by somebody else.
        ChildFailed: the function raised an exception, or was out of memory.
        OSError: the process cannot be started.
    """
    told = {"arguments": dict(arguments), "seconds": seconds, "memory": memory}
    said, says = os.pipe()
    os.set_blocking(says, False)  # what is too much between two polls is lost
    os.set_blocking(said, False)
    try:
        with (
            _temporary_folder() as environment,
            subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN, function],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=says,
                env=environment,
            ) as child,
        ):
            answer, code, last = _wait(child, json.dumps(told).encode(), said, poll)
    finally:
        os.close(says)
        os.close(said)
    if code == -signal.SIGALRM:
        raise ChildTimeout(f"not done after {seconds:.0f} seconds")
    if code and is_out_of_memory(last):  # the C library ends a process so
        raise ChildFailed(MemoryError.__name__, last.splitlines()[-1][:200])
    if code < 0:
        raise ChildKilled(-code)
    return _result(answer, code, last)


@contextmanager
def _temporary_folder() -> Iterator[dict[str, str]]:
    """The environment of a child whose temporary files go with it."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OPENBLAS_NUM_THREADS": "1",  # its buffers for every CPU would count
    }
    try:
        made = tempfile.TemporaryDirectory()
    except OSError:  # on a device whose disk is full, nothing but what needs files must fail
        yield environment
        return
    with made as folder:
        yield {**environment, "TMPDIR": folder}


def _wait(
    child: subprocess.Popen[bytes], told: bytes, said: int, poll: Callable[[], None]
) -> tuple[bytes, int, str]:
    """What a child answers, its exit status, and the end of what it said; killed if `poll` raises.

    Its own timer ends it, so that it can be widened.
    """
    assert child.stdin is not None
    assert child.stdout is not None
    last = b""
    try:
        with suppress(BrokenPipeError), child.stdin:
            child.stdin.write(told)
        while True:
            try:
                code = child.wait(_POLL)
                break
            except subprocess.TimeoutExpired:
                last = _heard(said, last)
                poll()
        answer = child.stdout.read(_MOST_ANSWER + 1)
        return answer, code, _heard(said, last).decode("utf-8", "replace").strip()
    finally:
        child.kill()


def _heard(said: int, last: bytes) -> bytes:
    """The end of what a child has said by now: one read, so that nobody can hold us with it."""
    with suppress(BlockingIOError):
        last += os.read(said, _PIPE)
    return last[-_PIPE:]


def _result(answer: bytes, code: int, said: str) -> Any:
    try:
        document = json.loads(answer)
        if "result" in document:
            return document["result"]
        kind, message = str(document["error"]), str(document["message"])
    except (ValueError, KeyError, TypeError):
        last = f": {said.splitlines()[-1][:200]}" if said else ""
        kind, message = "NoAnswer", f"its process ended with {code} and without an answer{last}"
    raise ChildFailed(kind, message)


def is_out_of_memory(text: str) -> bool:
    """Whether what a native library says means that it could not allocate.

    >>> is_out_of_memory("[E] 6 : RUNTIME_EXCEPTION : std::bad_alloc"), is_out_of_memory("no file")
    (True, False)
    """
    folded = text.lower()
    return any(
        words in folded
        for words in ("bad_alloc", "bad allocation", "allocate memory", "needs more memory")
    )


def bound_process(*, memory: int | None = None, seconds: float | None = None) -> None:
    """Bound this process from now on; an earlier bound of the same kind is void.

    Args:
        memory: bytes that it may take beyond what it has by now. Counted is what Linux counts as
            data (`RLIMIT_DATA`), so neither files that are mapped nor address space that is only
            reserved. Elsewhere, nothing happens.
        seconds: from now, after which SIGALRM ends it, whatever it computes.
    """
    if seconds is not None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        signal.setitimer(signal.ITIMER_REAL, seconds)
    held = _status("VmData")
    if memory is not None and held is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = held + memory
        with suppress(OSError, ValueError):
            limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def thread_bytes() -> int:
    """Bytes that a runtime's threads take on this machine: stacks, and shares of its arenas."""
    return _THREAD * (os.cpu_count() or 1)


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
    bound_process(seconds=told["seconds"])
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        function = load_callable(sys.argv[1])
        bound_process(memory=told["memory"])
        answer = {"result": function(**told["arguments"])}
    except BaseException as error:
        message = str(error)[:_MOST_MESSAGE]
        answer = {"error": type(error).__name__, "message": message}
    os.write(answers, json.dumps(answer).encode()[:_MOST_ANSWER])
    os._exit(0)  # without what a native library does at its end
