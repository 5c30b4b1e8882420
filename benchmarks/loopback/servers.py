"""The servers that are compared, as processes, and the CPU time that they have taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .nginx import nginx, program

__all__ = ["Server", "cpu_seconds", "servers", "tree_ticks"]

_TICKS = os.sysconf("SC_CLK_TCK")  # per second


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, and its first process."""

    port: int
    pid: int
    tls: bool


Start = Callable[[Path, Path], AbstractContextManager[Server]]


def servers(tls: tuple[Path, Path] | None) -> tuple[dict[str, Start], dict[str, str]]:
    """Servers by name, each as a function of repository and scratch folder; and those absent."""

    @contextmanager
    def ours(repository: Path, scratch: Path) -> Iterator[Server]:
        options = ["--certificate", str(tls[0]), "--key", str(tls[1])] if tls else []
        command = [sys.executable, "-m", "prunecast.cli", "serve", str(repository)]
        process = subprocess.Popen(
            [*command, "--port", "0", "--json", *options], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("prunecast serve did not start")
            yield Server(json.loads(line)["port"], process.pid, tls is not None)
        finally:
            process.terminate()
            process.wait(timeout=60)

    @contextmanager
    def theirs(repository: Path, scratch: Path) -> Iterator[Server]:
        certificate, key = tls or (None, None)
        options = {"certificate": certificate, "key": key, "log": False}
        with nginx(repository, scratch, **options) as running:  # type: ignore[arg-type]
            yield Server(running.port, running.pid, tls is not None)

    suffix = " TLS" if tls else ""
    found: dict[str, Start] = {f"prunecast serve{suffix}": ours}
    if program() is None:
        return found, {"nginx": "apt-get install nginx-light"}
    return found | {f"nginx{suffix}": theirs}, {}


def cpu_seconds(pid: int) -> float:
    """CPU seconds, user and system, of a process, its threads and all its descendants.

    Descendants that have ended count as far as their parents waited for them.
    """
    stats = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stats[int(entry.name)] = (entry / "stat").read_text()
            except OSError:  # it ended meanwhile
                continue
    return tree_ticks(stats, pid) / _TICKS


def tree_ticks(stats: Mapping[int, str], pid: int) -> int:
    """Clock ticks of a process and its descendants, from their lines in ``/proc/<pid>/stat``.

    >>> line = "{} (a ) b) S {} 0 0 0 0 0 0 0 0 0 {} {} {} {} 20 0"
    >>> stats = {1: line.format(1, 0, 9, 9, 9, 9), 2: line.format(2, 1, 5, 2, 1, 1)}
    >>> tree_ticks(stats | {3: line.format(3, 2, 10, 0, 0, 0)}, 2)
    19
    """
    # the name in parentheses may itself hold spaces and parentheses
    fields = {number: line.rpartition(")")[2].split() for number, line in stats.items()}
    wanted, grown = {pid}, True
    while grown:
        children = {n for n, row in fields.items() if int(row[1]) in wanted}
        grown = not children <= wanted
        wanted |= children
    return sum(sum(map(int, fields[n][11:15])) for n in wanted)
