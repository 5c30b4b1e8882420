"""The control server and agents, each a process of its own, through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

COMMAND = [sys.executable, "-m", "prunecast.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Processes:
    """Starts processes and ends every one of them, whatever happens.

    Args:
        folder: where their output goes, a file each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._all: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for number in (signal.SIGCONT, signal.SIGTERM):  # who is stopped cannot end
            self.signal(self._all, number)
        deadline = time.monotonic() + 20
        for process in self._all.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, *arguments: object) -> None:
        """Start `prunecast` with arguments."""
        with open(self._folder / name, "wb") as log:
            self._all[name] = subprocess.Popen(
                [*COMMAND, *map(str, arguments)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=ENVIRONMENT,
            )

    def signal(self, names: Iterable[str], number: int) -> None:
        """Send a signal to those that still run."""
        for name in names:
            if self._all[name].poll() is None:
                self._all[name].send_signal(number)

    def end(self, name: str) -> int:
        """End one as an operator would; its exit code."""
        process = self._all.pop(name)
        process.terminate()
        return process.wait(30)

    def said(self, name: str) -> list[dict[str, Any]]:
        """What a process has printed so far, as JSON lines; other lines are left out."""
        lines = (self._folder / name).read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def ended(self) -> dict[str, int]:
        """Who has ended without being asked to, with the exit code."""
        return {n: c for n, p in self._all.items() if (c := p.poll()) is not None}

    def memory(self, name: str) -> int:
        """Resident bytes of a process."""
        fields = Path(f"/proc/{self._all[name].pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def cpu(self, name: str) -> float:
        """CPU seconds of a process."""
        fields = Path(f"/proc/{self._all[name].pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
