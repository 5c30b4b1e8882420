"""A PostgreSQL cluster of one's own, and processes that poll a fleet at the same time."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunecast.server.fleet.model import Outcome, Release
from prunecast.server.fleet.reports import DeviceReport, DeviceState, DirectiveAnswer
from prunecast.server.fleet.service import FleetService

RELEASES = tuple(Release("digits", version) for version in range(1, 6))


def releases() -> tuple[Release, ...]:
    return RELEASES


def open_service(url: str) -> FleetService:
    return FleetService(url, releases)


def report(service: FleetService, token: str, *, now: float, **answer: Any) -> bool:
    """Report the outcome of a directive and nothing else; whether it counted."""
    return service.receive(token, DeviceReport(answer=DirectiveAnswer(**answer)), now).counted


def find_postgres() -> Path | None:
    """The folder with initdb, postgres and pg_ctl."""
    on_path = shutil.which("pg_ctl")
    found = [Path(on_path).resolve().parent] if on_path else []
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    names = ("initdb", "postgres", "pg_ctl")
    return next((f for f in found if all((f / n).is_file() for n in names)), None)


@contextmanager
def postgres(binaries: Path) -> Iterator[str]:
    """A cluster in a temporary folder, reached by a Unix socket there; yields its URL.

    The server refuses to run as root, so root becomes an unprivileged user for it.
    """
    user = None
    if os.geteuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in names else "nobody"
    folder = Path(tempfile.mkdtemp(prefix="fleet-pg-"))  # short: a socket's path has 107 bytes
    if user:
        shutil.chown(folder, user)

    def call(*command: str) -> None:
        done = subprocess.run(
            [str(binaries / command[0]), *command[1:]],
            cwd=folder, user=user, timeout=600,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()

    data = str(folder / "data")
    try:
        call("initdb", "-D", data, "-A", "trust", "-U", "fleet", "--no-sync", "-E", "UTF8")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        call("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql://fleet@/postgres?host={folder}"
        finally:
            call("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def poll_all(url: str, tokens: Mapping[str, str], version: int, at: float, fail: bool) -> list[str]:
    """In a process of its own: poll every device and report at once; who was told `version`."""
    told = []
    with open_service(url) as service:
        for name, token in tokens.items():
            directive = service.poll(token, DeviceState(1), at)
            if directive.release == Release("digits", version):
                told.append(name)
                report(
                    service,
                    token,
                    serial=directive.serial,
                    version=version,
                    outcome=Outcome.CRASH_LOOP if fail else Outcome.CONFIRMED,
                    now=at,
                )
    return told


def tallied(service: FleetService, rollout: str) -> dict[str, Any]:
    """A rollout's counters, and the same counted from its devices."""
    found, devices = service.rollout(rollout), service.devices(rollout=rollout)
    parts = [d.part for d in devices if d.part]
    return {
        "told": (found.told, sum(p.told_at is not None for p in parts)),
        "settled": (found.settled, sum(p.progress.settled for p in parts)),
    }
