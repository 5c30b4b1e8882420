"""A rollout to real agents on loopback: canary, stages, silent devices, a bad release, back down.

    python benchmarks/rollout.py [--agents N] [--silent N] [--deadline SECONDS] [--limit SECONDS]
                                 [--seed N] [--json FILE]

Every agent is `prunecast edge run` in a process of its own with its own state folder and token;
the control server is `prunecast fleet serve`. Everything travels over gRPC and TLS. In turn:

    start      all agents come to release 1, the stable one
    rollout    release 2 in stages of 5, 25 and 100 %, while some agents are stopped (SIGSTOP)
    return     the stopped ones go on and catch up
    bad        release 3, whose self-test fails on every device, is stopped at the canary
    restart    the server is replaced by another process
    down       the group is pinned to release 1

Printed: JSON. Seconds are by the wall clock and depend on what else the machine does; every wait
has a deadline, and the exit code is 1 if anything came out otherwise than it should.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loopback.certificates import loopback_certificate
from rollouts.processes import Processes
from rollouts.repository import NAME, make_repository

from prunecast.server.control import LiveReleases
from prunecast.server.fleet.audit import AuditKind
from prunecast.server.fleet.events import AddGroup, PinGroup, StartRollout
from prunecast.server.fleet.model import Outcome, Release, RolloutPolicy, Status
from prunecast.server.fleet.service import FleetService
from prunecast.server.fleet.step import assign

STAGES = (5.0, 25.0, 100.0)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--agents", type=int, default=50, help="processes (default: 50)")
    add("--silent", type=int, default=3, help="of them stopped in the rollout (default: 3)")
    add("--deadline", type=float, default=10.0, help="after which they are silent (default: 10)")
    add("--limit", type=float, default=600.0, help="seconds that a step may take (default: 600)")
    add("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser.parse_args()


class Lab:
    """A fleet and its processes in a temporary folder."""

    def __init__(self, folder: Path, processes: Processes, given: argparse.Namespace) -> None:
        self.folder, self.processes, self.given = folder, processes, given
        self.repository = make_repository(folder, given.seed)
        self.root = folder / "root.json"
        self.root.write_bytes(self.repository.trusted_root())
        self.certificate, self.key = loopback_certificate(folder)
        self.url = f"sqlite:///{folder / 'fleet.db'}"
        live = LiveReleases(self.repository.path)
        self.fleet = FleetService.create(self.url, live, repository=self.repository.path)
        self.fleet.operate(AddGroup(at=time.time(), group="field", release=NAME, stable=1))
        self.names = [f"device-{number:03}" for number in range(given.agents)]
        self.port = 0

    def serve(self, name: str) -> None:
        """Start a control server; the first one chooses the port."""
        self.processes.start(
            name,
            *("fleet", "serve", "--database", self.url, "--port", self.port, "--json"),
            *("--certificate", self.certificate, "--key", self.key),
        )
        self.wait(lambda: self.processes.said(name), f"{name} listens")
        self.port = int(self.processes.said(name)[0]["port"])

    def start_agents(self) -> None:
        """Enrol the devices and start their agents."""
        for name in self.names:
            token = self.folder / f"{name}.token"
            token.write_text(self.fleet.enrol(name, "field", now=time.time(), actor="benchmark"))
            self.processes.start(
                name,
                *("edge", "run", "--state", self.folder / name, "--name", NAME, "--json"),
                *("--root", self.root, "--threads", 1, "--control", f"127.0.0.1:{self.port}"),
                *("--control-token", token, "--control-ca", self.certificate),
                *("--confirm-after", 0),  # minutes of service would only be waited for
            )

    def wait(self, condition: Callable[[], object], what: str) -> float:
        """Seconds until a condition holds.

        Raises:
            TimeoutError: it did not in time, or a process has died.
        """
        begun = time.monotonic()
        while not condition():
            if dead := self.processes.ended():
                raise TimeoutError(f"{what}: ended with their exit codes: {dead}")
            if time.monotonic() - begun > self.given.limit:
                raise TimeoutError(f"not within {self.given.limit:g} seconds: {what}")
            time.sleep(0.1)
        return time.monotonic() - begun

    def running(self) -> Counter[int]:
        """How many devices run which version, by their reports."""
        return Counter(d.running or 0 for d in self.fleet.devices())

    def answered(self, version: int, names: list[str]) -> bool:
        """Whether devices have reported success with a version."""
        found = {d.id: d for d in self.fleet.devices()}
        return all(
            found[n].running == version and found[n].told.outcome is Outcome.CONFIRMED
            for n in names
        )

    def roll_out(self, name: str, version: int, **policy: Any) -> None:
        """Start a rollout in the usual stages."""
        rates = {"report_deadline": self.given.deadline, "timeout": self.given.limit}
        self.fleet.operate(
            StartRollout(
                at=time.time(),
                rollout=name,
                release=Release(NAME, version),
                groups=("field",),
                stages=STAGES,
                policy=RolloutPolicy(min_reports=1, soak=0, **{**rates, **policy}),
            )
        )

    def stages(self, name: str) -> list[float]:
        """Seconds from the start of a rollout to the end of each of its stages."""
        begun = next(e.at for e in self.audit(name) if e.kind is AuditKind.ROLLOUT_STARTED)
        ends = (AuditKind.ROLLOUT_PROMOTED, AuditKind.ROLLOUT_COMPLETED)
        return [round(e.at - begun, 2) for e in self.audit(name) if e.kind in ends]

    def audit(self, subject: str) -> list[Any]:
        """What happened to something."""
        return self.fleet.audit(subject=subject, limit=1000)


def silent_ones(names: list[str], count: int) -> list[str]:
    """Devices from different stages, at most one of them a canary."""
    stage_of = assign("to-2", names, STAGES)
    by_stage = [[n for n in names if stage_of[n] == stage] for stage in range(len(STAGES))]
    chosen = [members[0] for members in by_stage if len(members) > 1][:count]
    rest = [n for n in reversed(by_stage[-1]) if n not in chosen]
    return [*chosen, *rest][:count]


def run(lab: Lab) -> dict[str, Any]:
    """All steps; what came out."""
    lab.serve("server")
    begun = time.monotonic()
    lab.start_agents()
    lab.wait(lambda: lab.answered(1, lab.names), "all agents run release 1")
    found: dict[str, Any] = {
        "agents": len(lab.names),
        "cores": len(os.sched_getaffinity(0)),
        "start": {"seconds": round(time.monotonic() - begun, 2)},
    }
    memory = sorted(lab.processes.memory(name) for name in lab.names)
    found["agent_megabytes"] = round(memory[len(memory) // 2] / 1e6, 1)

    silent = silent_ones(lab.names, lab.given.silent)
    live = [name for name in lab.names if name not in silent]
    lab.processes.signal(silent, signal.SIGSTOP)
    lab.roll_out("to-2", 2)
    lab.wait(lambda: not lab.fleet.rollout("to-2").status.active, "release 2 is rolled out")
    rollout, devices = lab.fleet.rollout("to-2"), lab.fleet.devices(rollout="to-2")
    progress = Counter(str(d.part.progress) for d in devices if d.part)
    found["rollout"] = {
        "status": str(rollout.status),
        "devices_by_stage": list(rollout.cohorts),
        "seconds_to_end_of_stage": lab.stages("to-2"),
        "stopped": len(silent),
        "report_deadline": lab.given.deadline,
        "progress": dict(progress),
        "versions": lab.running(),
    }
    lab.processes.signal(silent, signal.SIGCONT)
    seconds = lab.wait(lambda: lab.answered(2, lab.names), "the silent ones catch up")
    found["return"] = {"seconds": round(seconds, 2), "versions": lab.running()}

    lab.roll_out("to-3", 3, roll_back_on_error=True)
    seconds = lab.wait(
        lambda: not lab.fleet.rollout("to-3").status.active and lab.answered(2, lab.names),
        "release 3 is stopped",
    )
    rollout, devices = lab.fleet.rollout("to-3"), lab.fleet.devices(rollout="to-3")
    found["bad"] = {
        "status": str(rollout.status),
        "told": rollout.told,
        "failed": sum(3 in d.refused for d in devices),
        "seconds": round(seconds, 2),
        "versions": lab.running(),
    }
    found["server"] = {
        "cpu_seconds": round(lab.processes.cpu("server"), 2),
        "megabytes": round(lab.processes.memory("server") / 1e6, 1),
    }
    begun = time.monotonic()
    code = lab.processes.end("server")
    found["restart"] = {"exit_code": code, "seconds_to_end": round(time.monotonic() - begun, 2)}
    lab.serve("another server")
    lab.fleet.operate(PinGroup(at=time.time(), group="field", version=1))
    seconds = lab.wait(lambda: lab.answered(1, lab.names), "all go down to release 1")
    found["down"] = {"seconds": round(seconds, 2), "versions": lab.running()}
    found["as_expected"] = all(
        (
            found["rollout"]["status"] == Status.COMPLETED,
            progress["confirmed"] == len(live),
            progress["silent"] == len(silent),
            found["bad"]["status"] == Status.ABORTED,
            # a told device that hears of the end before its self-test reports nothing
            0 < found["bad"]["failed"] <= found["bad"]["told"] <= rollout.cohorts[0],
            found["bad"]["versions"] == {2: len(lab.names)},
            code == 0,
            found["down"]["versions"] == {1: len(lab.names)},
        )
    )
    return found


def main() -> int:
    """Run the benchmark."""
    given = arguments()
    with (
        tempfile.TemporaryDirectory(prefix="rollout-") as name,
        Processes(Path(name) / "logs") as processes,
    ):
        found = run(Lab(Path(name), processes, given))
    text = json.dumps(found, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")
    return 0 if found["as_expected"] else 1


if __name__ == "__main__":
    sys.exit(main())
