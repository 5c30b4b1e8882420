"""What the service manager hears, and the unit that it is given."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.client.edge.inference import is_answering
from prunecast.common.service_manager import ServiceManager

UNIT = Path(__file__).parents[3] / "deploy" / "systemd" / "prunecast-edge@.service"


@pytest.fixture
def socket_file(tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/n")
        manager.settimeout(20)
        yield f"{tmp_path}/n", manager


def test_the_manager_hears_of_begin_life_and_end(socket_file: tuple[str, socket.socket]) -> None:
    path, manager = socket_file
    told = ServiceManager({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "20000"})
    assert told.watchdog_seconds == 0.02
    with told.watching(lambda: True):
        assert manager.recv(99) == b"READY=1"
        assert manager.recv(99) == b"WATCHDOG=1"
    while (last := manager.recv(99)) == b"WATCHDOG=1":
        pass
    assert last == b"STOPPING=1"


def test_the_watchdog_starves_when_nothing_answers(
    socket_file: tuple[str, socket.socket],
) -> None:
    path, manager = socket_file
    asked = threading.Event()

    def dead() -> bool:
        asked.set()
        return False

    with ServiceManager({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "4000"}).watching(dead):
        assert asked.wait(20)
    assert [manager.recv(99), manager.recv(99)] == [b"READY=1", b"STOPPING=1"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"NOTIFY_SOCKET": "/nonexistent"},
        {"NOTIFY_SOCKET": "@nobody-listens"},
        {"WATCHDOG_USEC": "x"},
        {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"},
    ],
)
def test_without_a_manager_nothing_happens(environment: dict[str, str]) -> None:
    manager = ServiceManager(environment)
    assert manager.watchdog_seconds == 0
    with manager.watching(lambda: True):
        manager.tell(STATUS="here")


def test_an_endpoint_that_hangs_does_not_answer(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hanging:
        hanging.bind(f"{tmp_path}/s")
        hanging.listen()
        begun = time.monotonic()
        assert not is_answering(f"unix:{tmp_path}/s", 0.05)
        assert time.monotonic() - begun < 10
    assert not is_answering(f"unix:{tmp_path}/s", 1.0)
    assert not is_answering("http://127.0.0.1:9", 1.0)


def test_the_unit_calls_options_that_exist() -> None:
    text = UNIT.read_text().replace("\\\n", " ")
    command = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert command
    words = command[1].split()
    assert words[1:3] == ["edge", "run"]
    shown = CliRunner().invoke(app, ["edge", "run", "--help"], env={"COLUMNS": "200"}).output
    for option in (word for word in words if word.startswith("--")):
        assert option in shown


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_the_unit_is_valid_and_confined(tmp_path: Path) -> None:
    unit = tmp_path / "prunecast-edge@digits.service"
    unit.write_text(UNIT.read_text().replace("/opt/prunecast/bin/prunecast", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
    )
    complaints = [line for line in done.stderr.splitlines() if "prunecast-edge" in line]
    assert complaints == []
    security = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "SYSTEMD_COLORS": "0"},
    )
    assert security.returncode == 0, security.stdout
