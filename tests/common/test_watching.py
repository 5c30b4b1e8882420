"""A watched command: what is known of it from outside, when it hangs, and what becomes of it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prunecast.common.liveness import (
    answers,
    cpu_seconds,
    descendants,
    main_thread_switches,
    seconds_since_received,
    status_of,
)
from prunecast.common.pulse import Limits, read_pulse
from prunecast.common.service_manager import ServiceManager
from prunecast.common.watching import HUNG, Target, Watch, target_of

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(204); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(*command: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, *command], **more)
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)


# -- what is known --------------------------------------------------------------------------------


def test_a_connection_tells_when_it_last_received_anything() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = server.getsockname()[1]
        program = (
            "import socket, sys\n"
            "served = socket.create_server(('127.0.0.1', 0))\n"
            f"ours = socket.create_connection(('127.0.0.1', {other}))\n"
            "theirs = socket.create_connection(served.getsockname())\n"  # both ends are its own
            "served.accept()\n"
            "print('there', flush=True)\n"
            "while data := ours.recv(99): print('got', flush=True)\n"
            "print('over', flush=True)\n"
            "ours.close(); theirs.close()\n"
            "print('closed', flush=True)\n"
            "sys.stdin.read()\n"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with running("-c", program, **pipes) as process:
            assert process.stdout is not None
            connection, _ = server.accept()
            assert process.stdout.readline() == b"there\n"
            before = seconds_since_received(process.pid)
            assert before is not None
            time.sleep(1.0)  # an age is what is measured
            aged = seconds_since_received(process.pid)
            assert aged is not None
            assert 1.0 <= aged < math.inf
            connection.send(b"x")
            assert process.stdout.readline() == b"got\n"
            fresh = seconds_since_received(process.pid)
            assert fresh is not None
            assert fresh < aged
            connection.close()
            assert process.stdout.readline() == b"over\n"
            assert process.stdout.readline() == b"closed\n"
            assert seconds_since_received(process.pid) == math.inf
    assert seconds_since_received(process.pid) is None  # it has ended


def test_a_process_that_is_stopped_does_not_move() -> None:
    program = "import time\nwhile True: time.sleep(0.01)"
    with running("-c", program) as process:
        first = until(lambda: main_thread_switches(process.pid))
        until(lambda: main_thread_switches(process.pid) > first)
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: "T" in Path(f"/proc/{process.pid}/stat").read_text().split()[2])
        still = main_thread_switches(process.pid)
        time.sleep(0.2)
        assert main_thread_switches(process.pid) == still
    assert main_thread_switches(process.pid) is None
    assert cpu_seconds(process.pid) is None


def test_descendants_are_found_over_sessions_and_without_those_that_ended() -> None:
    inner = "import time; time.sleep(600)  # inmost"
    program = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {inner!r}], start_new_session=True)\n"
        "subprocess.Popen(['true'])\n"
        "time.sleep(600)\n"
    )
    with running("-c", program) as process:
        try:
            below = until(lambda: (found := descendants(process.pid)) and len(found) == 1 and found)
            [(pid, line)] = below.items()
            assert line.endswith("# inmost")
            assert (cpu_seconds(pid) or 0) >= 0
        finally:
            for pid in descendants(process.pid):
                os.kill(pid, signal.SIGKILL)


def test_an_answer_is_an_answer_and_silence_is_none() -> None:
    where = port()
    with running("-c", SERVER, str(where)) as process:
        url = f"http://127.0.0.1:{where}/health"
        until(lambda: answers(url))
        assert status_of(url) == 204
        os.kill(process.pid, signal.SIGSTOP)
        assert not answers(url, seconds=0.2)
        os.kill(process.pid, signal.SIGCONT)
    assert not answers(url)
    for wrong in ("", "nonsense", "http://127.0.0.1:x/", "http://[", f"https://127.0.0.1:{where}/"):
        assert not answers(wrong)


@pytest.mark.parametrize(
    ("command", "target"),
    [
        (
            "flower-superlink --host 0.0.0.0 --port 9092 --ssl-ca-certfile /k/ca.crt",
            Target("https://127.0.0.1:9092/health", Path("/k/ca.crt")),
        ),
        ("/x/flower-superlink --insecure --host ::", Target("http://[::1]:8000/health")),
        (
            "flower-supernode --superlink=link:9092 --root-certificates /k/ca.crt --port 9095",
            Target(
                *("http://127.0.0.1:9095/health", None),
                *("https://link:9092/health", Path("/k/ca.crt")),
            ),
        ),
        (
            "flower-supernode --insecure",
            Target("http://127.0.0.1:9094/health", None, "http://127.0.0.1:8000/health"),
        ),
        ("prunecast serve repository", Target()),
    ],
)
def test_flowers_own_options_say_where_to_ask(command: str, target: Target) -> None:
    assert target_of(command.split()) == target


# -- what becomes of it ---------------------------------------------------------------------------


def watched(tmp_path: Path, *command: str, target: Target | None = None, **more: Any) -> Watch:
    more = {"interval": 0.1, "file": tmp_path / "pulse.json", "patience": 5.0, **more}
    return Watch([sys.executable, *command], target or Target(), **more)


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("pass", 0),
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", 128 + 9),
    ],
)
def test_the_exit_status_is_the_commands(tmp_path: Path, program: str, code: int) -> None:
    assert watched(tmp_path, "-c", program).run() == code
    assert not (tmp_path / "pulse.json").exists()


def test_a_pulse_that_cannot_be_written_is_said_once_and_changes_no_status(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    program = "import time; time.sleep(0.5); raise SystemExit(5)"
    assert watched(tmp_path, "-c", program, file=tmp_path / "file" / "pulse").run(said.append) == 5
    assert [one.partition(":")[0] for one in said] == ["no pulse", "healthy"]
    assert "cannot write" in said[0]


def test_a_command_that_hangs_is_ended_with_everything_below_it(tmp_path: Path) -> None:
    where = port()
    below = (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True)\n" + SERVER
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/n")
        manager.settimeout(60)
        watch = watched(
            *(tmp_path, "-c", below, str(where)),
            target=Target(f"http://127.0.0.1:{where}/"),
            limits=Limits(start=60, silence=1.0),
            manager=ServiceManager({"NOTIFY_SOCKET": f"{tmp_path}/n"}),
        )
        found, said = [], []
        thread = threading.Thread(target=lambda: found.append(watch.run(said.append)))
        thread.start()
        assert manager.recv(99) == b"WATCHDOG=1\nSTATUS=starting"
        while manager.recv(99) != b"READY=1":
            pass
        assert manager.recv(99) == b"WATCHDOG=1\nSTATUS=healthy"
        pid = read_pulse(tmp_path / "pulse.json")["pid"]
        [child] = until(lambda: list(descendants(pid)))
        os.kill(pid, signal.SIGSTOP)
        thread.join(60)
    assert found == [HUNG]
    assert said[-1].startswith("hung: it has not answered for")
    for one in (pid, child):
        until(lambda one=one: not Path(f"/proc/{one}").exists() or _zombie(one))


def _zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_ending_waits_for_a_client_app_that_runs(tmp_path: Path) -> None:
    """As a service manager ends it: the signal comes to the watch, which waits and passes it on."""
    node = tmp_path / "flower-supernode"
    node.write_text(
        f"#!{sys.executable}\n"
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "app = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()',\n"
        "                        'flwr-clientapp'], stdin=subprocess.PIPE)\n"
        "print('begun', flush=True)\n"
        "while not open(sys.argv[1]).read(): time.sleep(0.05)\n"
        "app.stdin.close(); app.wait(); print('done', flush=True)\n"
        "time.sleep(600)\n"
    )
    node.chmod(0o755)
    go = tmp_path / "go"
    go.write_text("")
    command = ["-m", "prunecast.cli", "federation", "watch", "--interval", "0.1", "--drain", "600"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with running(*command, "--", str(node), str(go), **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGTERM)
        for line in process.stderr:
            if b"drains" in line:
                break
        assert process.poll() is None
        go.write_text("go")
        assert process.stdout.readline() == b"done\n"
        assert process.wait(60) == 7


def test_a_certificate_is_read_again_where_the_command_does_that(tmp_path: Path) -> None:
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGHUP, lambda *_: print('again', flush=True))\n"
        "print('begun', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = ["-m", "prunecast.cli", "federation", "watch", "--", sys.executable, "-c", program]
    with running(*command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == b"again\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sock_diag is Linux's")
def test_a_kernel_that_tells_of_no_connections_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers with an error, as here of a family that it has no sockets of."""
    monkeypatch.setattr(socket, "AF_INET", socket.AF_APPLETALK)
    assert seconds_since_received(os.getpid()) is None
