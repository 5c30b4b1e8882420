"""A command that is ended when it hangs, so that whatever started it starts it again.

A SuperNode can be a process that is there, and answers at its own port, and does nothing any more:
its main loop has ended with an error while another thread goes on, or it waits for ever for a
ClientApp that computes nothing. Flower's own ``/health`` and its gRPC health service say that all
is well. So the command is watched from outside: whether it answers, whether its main thread moves,
whether it still exchanges anything with the SuperLink, and whether a ClientApp computes.

It is not at fault where nobody can reach the SuperLink; that is told, and the command left alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from prunecast.common.files import StorageError, write_atomically
from prunecast.common.liveness import (
    answers,
    cpu_seconds,
    descendants,
    main_thread_switches,
    seconds_since_received,
)
from prunecast.common.pulse import SCHEMA, Limits, Observation, Pulse
from prunecast.common.service_manager import ServiceManager

__all__ = ["HUNG", "Target", "Watch", "target_of"]

HUNG = 75
"""Exit status of a watch that has ended its command because it hung."""

_CLIENT_APP = "flwr-clientapp"
_AT_REST = 5.0  # seconds without a ClientApp after which a node counts as drained


@dataclass(frozen=True)
class Target:
    """Where a command can be asked.

    Attributes:
        health: URL that the command itself answers; "" for none.
        authority: by which that is verified; None for the system's.
        upstream: URL that its SuperLink answers; "" for none. With one, the command is a SuperNode,
            which exchanges something with it all the time.
        upstream_authority: by which that is verified.
    """

    health: str = ""
    authority: Path | None = None
    upstream: str = ""
    upstream_authority: Path | None = None


def target_of(command: Sequence[str]) -> Target:
    """Where one of Flower's commands can be asked, by its own options; nowhere for others.

    >>> target_of(["flower-supernode", "--insecure", "--superlink", "link:9092"]).upstream
    'http://link:9092/health'
    """
    options: dict[str, str] = {}
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            options[name] = value if equals else following
    name = Path(command[0]).name if command else ""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(h := options.get("--host", "127.0.0.1"), h)
    shown = f"[{host}]" if ":" in host else host
    insecure = "--insecure" in options

    def file(option: str) -> Path | None:
        return Path(options[option]) if option in options else None

    if name == "flower-superlink":
        scheme, authority = "http" if insecure else "https", file("--ssl-ca-certfile")
        return Target(f"{scheme}://{shown}:{options.get('--port', '8000')}/health", authority)
    if name == "flower-supernode":
        scheme, authority = "http", None
        if "--ssl-certfile" in options:
            scheme, authority = "https", file("--ssl-ca-certfile")
        link = options.get("--superlink", "127.0.0.1:8000")
        return Target(
            f"{scheme}://{shown}:{options.get('--port', '9094')}/health",
            authority,
            f"{'http' if insecure else 'https'}://{link}/health",
            file("--root-certificates"),
        )
    return Target()


class Watch:
    """Runs a command until it ends, hangs, or is to end.

    Args:
        command: the program and its arguments.
        target: where it can be asked.
        limits: how long what may last.
        interval: seconds between two looks.
        file: where the pulse is written after each look, for `read_pulse`; None for nowhere.
        drain: seconds that a ClientApp which runs may go on when the command is to end.
        patience: seconds that the command may take to end before it is killed.
        manager: told that it is ready, alive, and what is wrong.
    """

    def __init__(
        self,
        command: Sequence[str],
        target: Target,
        *,
        limits: Limits | None = None,
        interval: float = 5.0,
        file: Path | None = None,
        drain: float = 0.0,
        patience: float = 20.0,
        manager: ServiceManager | None = None,
    ) -> None:
        self._command, self._target = list(command), target
        self._limits, self._interval, self._file = limits or Limits(), interval, file
        self._drain, self._patience = drain, patience
        self._manager = manager or ServiceManager()
        self._asked = threading.Event()
        self._ready, self._written = False, True

    def run(self, say: Callable[[str], None] = print) -> int:
        """Start the command and stay until it is over; SIGTERM and SIGINT end it, SIGHUP it gets.

        Args:
            say: told what is wrong, once for each change.

        Returns:
            Its exit status, 128 + n where signal n ended it, or `HUNG`.
        """
        before = {}
        process: subprocess.Popen[bytes] | None = None

        def pass_on(number: int, frame: object) -> None:
            if process is not None and process.poll() is None:
                process.send_signal(number)

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, lambda *_: self._asked.set())
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, pass_on)
        try:
            # a session of its own: an interrupt of the terminal comes to us alone
            process = subprocess.Popen(self._command, start_new_session=True)
            try:
                return self._stay(process, say)
            finally:
                self._end(process)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._manager.tell(STOPPING=1)
            if self._file is not None:
                with suppress(OSError):  # the exit status is the command's all the same
                    self._file.unlink(missing_ok=True)

    def _stay(self, process: subprocess.Popen[bytes], say: Callable[[str], None]) -> int:
        pulse = Pulse(self._limits, time.monotonic())
        told: tuple[str, ...] = ()
        while process.poll() is None and not self._asked.is_set():
            state = pulse.take(time.monotonic(), self._look(process.pid))
            self._tell(process.pid, pulse, say)
            if told != (told := (state, *(p.partition(" for ")[0] for p in pulse.problems))):
                say(f"{state}" + "".join(f": {problem}" for problem in pulse.problems))
            if state == "hung":
                return HUNG
            self._wait(process, self._interval)
        if process.poll() is None and self._drain:
            say("drains: waits for the ClientApp that runs, if one does")
            self._until_at_rest(process)
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(self._patience)
        code = process.poll()
        return 128 + signal.SIGKILL if code is None else code if code >= 0 else 128 - code

    def _wait(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Until something happens; the end of the process is seen within a fifth of a second."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and process.poll() is None:
            if self._asked.wait(min(0.2, seconds)):
                return

    def _until_at_rest(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._drain
        rest = time.monotonic()
        while process.poll() is None and time.monotonic() < deadline:
            now = time.monotonic()
            if _client_app(descendants(process.pid)) is not None:
                rest = now
            elif now - rest >= _AT_REST:
                return
            self._manager.tell(WATCHDOG=1, STATUS="drains")
            time.sleep(0.5)

    def _look(self, pid: int) -> Observation:
        target, below = self._target, descendants(pid)
        if not target.upstream:
            return Observation(self._answers())
        app = _client_app(below)
        computed = None
        if app is not None:
            used = [cpu_seconds(one) for one in (app, *descendants(app))]
            computed = app, sum(one for one in used if one is not None)
        return Observation(
            self._answers(),
            main_thread_switches(pid),
            seconds_since_received(pid),
            computed,
            lambda: answers(target.upstream, authority=target.upstream_authority),
        )

    def _answers(self) -> bool | None:
        if not self._target.health:
            return None
        return answers(self._target.health, authority=self._target.authority)

    def _tell(self, pid: int, pulse: Pulse, say: Callable[[str], None]) -> None:
        state = "; ".join([pulse.state, *pulse.problems])
        if pulse.state == "healthy" and not self._ready:
            self._ready = True
            self._manager.tell(READY=1)
        if pulse.state != "hung":
            self._manager.tell(WATCHDOG=1, STATUS=state)
        if self._file is None:
            return
        wall, mono = time.time(), time.monotonic()

        def at(moment: float | None) -> float | None:
            return None if moment is None else round(wall - (mono - moment), 1)

        document = {
            "schema": SCHEMA,
            "at": wall,
            "interval": self._interval,
            "pid": pid,
            "command": Path(self._command[0]).name,
            "state": pulse.state,
            "problems": pulse.problems,
            "answered": at(pulse.answered),
            "exchanged": at(pulse.exchanged),
            "client_app": pulse.client_app,
            "limits": asdict(self._limits),
        }
        try:
            write_atomically(self._file, json.dumps(document).encode())
            self._written = True
        except StorageError as error:  # whoever reads it will find it stale
            if self._written:
                say(f"no pulse: {error}")
            self._written = False

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Leave nothing of it behind: a SuperNode's processes are sessions of their own."""
        left = [process.pid, *descendants(process.pid)] if process.poll() is None else []
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(self._patience)


def _client_app(below: Mapping[int, str]) -> int | None:
    return next((pid for pid, line in below.items() if _CLIENT_APP in line), None)
