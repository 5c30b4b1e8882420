"""Nodes in trouble on Flower's deployment engine: SuperLink, SuperNodes with keys, TLS.

One run, and one trouble in each of its rounds. Whoever answers holds the published version, bit for
bit; nobody else's round suffers; and the ledger says what it cost.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.loopback.engine import Engine, EngineProblem, descendants, wait_for
from prunecast.server.federation import Entry, Ledger
from prunecast.server.federation.operating.credentials import make_credentials

pytestmark = pytest.mark.engine

APP = Path(__file__).parent / "faulty"
NODES, LATER = 3, 3  # at first; the partition of the one that joins
SLOW, NAN, KILLED, BACK, JOINS, BARE, LAST = range(2, 9)  # as in faulty/task.py
RESTART_SECONDS = 10  # as RestartSec of a unit
SECONDS = 2400.0  # for all of it, on a machine that does much else


@dataclass(frozen=True)
class History:
    """What a run left.

    Attributes:
        rounds: what its server noted, from round 1 on.
        entries: of the ledger, by partition.
        log: of the run.
    """

    rounds: list[dict[str, Any]]
    entries: dict[int, list[Entry]]
    log: str

    def of(self, partition: int, direction: str, kind: str = "train") -> list[Entry]:
        """Messages of a type to or from a node."""
        mine = self.entries[partition]
        return [e for e in mine if e.direction == direction and e.message_type == kind]

    def kinds(self, partition: int, direction: str) -> list[str]:
        """What became of them."""
        return [e.kind for e in self.of(partition, direction)]

    def answered(self, number: int) -> set[int]:
        """Partitions whose reply of a round counts."""
        return {int(partition) for partition in self.rounds[number - 1]["received"]}


@pytest.fixture(scope="module")
def history(
    start_engine: Callable[..., Any], free_port: Callable[[], int], tmp_path_factory: Any
) -> History:
    """A run with all of these troubles."""
    folder = tmp_path_factory.mktemp("faults")
    output = folder / "output"
    output.mkdir()
    make_credentials(folder, nodes=NODES + 1)
    with start_engine(folder) as engine, ThreadPoolExecutor(1) as pool:
        port = free_port()
        engine.start(
            "superlink",
            *("flower-superlink", "--host", "127.0.0.1", "--port", str(port)),
            *("--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt"),
            *("--ssl-keyfile", "server.key", "--enable-supernode-auth"),
            port=port,
        )
        (folder / "flower").mkdir(exist_ok=True)
        (folder / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "ours"\n\n[superlink.ours]\naddress = "127.0.0.1:{port}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )

        def start(partition: int, name: str = "") -> None:
            runtime = free_port()
            engine.start(
                name or f"supernode{partition}",
                *("flower-supernode", "--superlink", f"127.0.0.1:{port}"),
                *("--root-certificates", "ca.crt"),
                *("--auth-supernode-private-key", f"nodes/node-{partition + 1}"),
                *("--host", "127.0.0.1", "--port", str(runtime)),
                "--node-config",
                f'partition-id={partition} prunecast-store="{folder}/s{partition}"',
                port=runtime,
            )

        for partition in range(NODES + 1):
            engine.flwr("supernode", "register", f"nodes/node-{partition + 1}.pub")
        for partition in range(NODES):
            start(partition)
        run = pool.submit(engine.run, APP, "--run-config", f'output="{output}"', seconds=SECONDS)

        def reached(name: str) -> bool:
            if run.done():
                run.result()
            return (output / name).exists()

        wait_for(lambda: reached("training"), SECONDS, "a node to train")
        wait_for(lambda: reached(f"ended-{KILLED}"), SECONDS, "the round to go on without it")
        kill(engine, "supernode1")
        restart(engine, lambda name: start(1, name))
        (output / "restarted").touch()
        wait_for(lambda: reached("join"), SECONDS, "a node to be wanted")
        start(LATER)
        log = run.result(SECONDS).log
    told = json.loads((output / "rounds.json").read_text())
    partitions = {node: int(partition) for partition, node in told["nodes"].items()}
    entries: dict[int, list[Entry]] = {partition: [] for partition in partitions.values()}
    for entry in Ledger.read(output / "ledger.jsonl"):
        entries[partitions[entry.node]].append(entry)
    return History(told["rounds"], entries, log)


def kill(engine: Engine, name: str) -> None:
    """End a process and all that it started, in the middle of what they do."""
    process = engine.processes.pop(name)
    for pid in [process.pid, *descendants(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):  # what lost its parent before
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def restart(engine: Engine, start: Callable[[str], None]) -> None:
    """As a unit of systemd does: the SuperLink takes a node back once it has missed its heartbeats.

    Until then, for a minute, a SuperNode with the same key ends by itself.
    """
    deadline = time.monotonic() + SECONDS
    for number in itertools.count(1):
        name = f"supernode1-again-{number}"
        with suppress(EngineProblem):
            start(name)
            wait_for(partial(_settled, engine, name), SECONDS, "a SuperNode to be taken or to end")
            if engine.processes[name].poll() is None:
                return
        assert time.monotonic() < deadline, "the SuperNode is not taken back"
        kill(engine, name)
        time.sleep(RESTART_SECONDS)


def _settled(engine: Engine, name: str) -> bool:
    ended = engine.processes[name].poll() is not None
    return ended or "SuperNode ID:" in (engine.folder / f"{name}.log").read_text()


def test_whoever_answers_holds_the_published_version(history: History) -> None:
    for number, told in enumerate(history.rounds, start=1):
        assert told["received"], number
        assert set(told["received"].values()) == {told["published"]}, number


def test_the_trouble_of_a_node_is_its_own(history: History) -> None:
    """The node without any has one message and one reply in every round, and one keyframe."""
    assert history.kinds(0, "down") == ["keyframe", *["delta"] * (LAST - 1)]
    assert history.kinds(0, "up") == ["update"] * LAST
    everybody = {0, 1, 2}
    assert history.answered(1) == everybody
    assert history.answered(BACK) == everybody
    assert history.answered(LAST) == everybody | {LATER}


def test_a_reply_that_comes_after_its_round_costs_itself(history: History) -> None:
    assert history.answered(SLOW) == {0, 2}
    late = [e for e in history.of(1, "up") if e.kind == "late"]
    assert len(late) == 1
    usual = history.of(0, "up")[SLOW - 1].payload_bytes
    assert 0.9 * usual < late[0].payload_bytes < 1.1 * usual
    # what it says it holds is what the next message builds on
    assert "base-missing" not in history.kinds(1, "up")[: SLOW + 1]
    assert 1 in history.answered(NAN)


def test_nan_costs_the_message_that_says_so(history: History) -> None:
    assert history.answered(NAN) == {0, 1}
    (failed,) = [e for e in history.of(2, "up") if e.kind == "error"]
    assert "NaN" in failed.reason
    assert failed.payload_bytes < 1000
    assert history.kinds(2, "down") == ["keyframe", *["delta"] * (LAST - 1)]
    assert history.answered(KILLED) == {0, 2}


def test_a_killed_node_is_not_waited_for_and_comes_back_by_a_delta(history: History) -> None:
    """Its reply is lost with its process; what it held is on disk, though nobody knows of it."""
    assert history.kinds(1, "down").count("keyframe") == 1
    assert history.answered(KILLED) == {0, 2}
    assert 1 in history.answered(BACK)
    # it had kept the version of the round that it was killed in, and what it is sent builds on
    # that, unless Flower has told by then that it missed its heartbeats: then it says so itself
    missing = [e for e in history.of(1, "up") if e.kind == "base-missing"]
    assert len(missing) <= 1
    assert all(e.payload_bytes < 1000 for e in missing)
    again = history.of(1, "down")
    assert len(again) == LAST + len(missing)
    keyframe = again[0].payload_bytes
    assert sum(e.payload_bytes for e in again[1:]) < 0.5 * keyframe * LAST


def test_a_node_that_joins_costs_one_keyframe(history: History) -> None:
    assert [told["asked"] for told in history.rounds] == [3] * (JOINS - 1) + [4] * 3
    assert history.answered(JOINS) == {0, 1, 2, LATER}
    assert history.kinds(LATER, "down")[0] == "keyframe"
    assert history.kinds(LATER, "down").count("keyframe") == 1


def test_a_client_without_the_mod_is_refused_alone(history: History) -> None:
    assert history.answered(BARE) == {0, 1, 2}
    (error,) = history.rounds[BARE - 1]["errors"]
    assert "answered without Prunecast's mod" in error
    assert history.kinds(LATER, "up") == ["update", "error", "update"]
    assert history.of(LATER, "up")[1].payload_bytes < 1000
