"""What a federation's messages take on the wire: a SuperLink, SuperNodes, and a relay that counts.

Bytes are those of TCP's content between SuperNodes and SuperLink, HTTP in the clear: TLS, TCP and
IP come on top.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.federation import scenario
from benchmarks.loopback.engine import relayed
from benchmarks.loopback.relay import Exchange

__all__ = ["NODES", "by_arm", "measure_wire", "sum_exchanges", "wire_table"]

NODES = 2
_ROOT = Path(__file__).parent.parent.parent
_APP = _ROOT / "benchmarks" / "loopback" / "wired"
_SECONDS = 900
# SuperNodes ask for messages every few seconds, whether there is one or not, and show that they
# are alive; everything else is done for a message.
_ASKING, _BEATING = "pull-messages", "send-node-heartbeat"
_NOTHING = 256  # bytes, of which an answer without a message has fewer


def measure_wire(
    kind: str, rounds: int, seed: int, arms: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Train on a real SuperLink and `NODES` SuperNodes on loopback, one arm after the other.

    Args:
        kind: of model, see `benchmarks.harness.federation.KINDS`.
        rounds: of each arm.
        seed: of the scenario.
        arms: by name.

    Returns:
        For every arm, by direction, ``ledger``: bytes of its messages as the ledger has them;
        ``messages``: bytes of the requests that carry them, and of their responses; ``polling``:
        of those that bring nothing; with the number of ``requests`` of both.

    Raises:
        EngineProblem: a process of Flower's failed.
    """
    from prunecast.server.federation import Ledger
    from prunecast.simulations.runner.prepared import prepare
    from prunecast.simulations.scenarios import scenario_from_mapping

    document = {**scenario(kind, rounds, seed, {}), "arms": arms, "clients": {"count": NODES}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "run").mkdir()
        (folder / "flower").mkdir()
        prepared = prepare(scenario_from_mapping(document), folder / "run")
        environment = {"WIRED_FOLDER": str(folder / "run"), "PYTHONPATH": str(_ROOT)}
        with relayed(folder, NODES, OMP_NUM_THREADS="1", **environment) as (engine, relay):
            (folder / "run" / "relay").write_text(relay.address)
            engine.run(_APP, seconds=_SECONDS)
            exchanges = list(relay.exchanges)
        found = []
        for name, of_arm in by_arm(exchanges).items():
            ledger = Counter[str]()
            for entry in Ledger.read(prepared.ledger(name)):
                ledger[entry.direction] += entry.payload_bytes
                ledger["messages"] += 1
            row = {"kind": kind, "preset": name, "rounds": rounds, "nodes": NODES}
            found.append({**row, "ledger": dict(ledger), **sum_exchanges(of_arm)})
        return found


def by_arm(exchanges: Sequence[Exchange]) -> dict[str, list[Exchange]]:
    """The exchanges between the requests that say where an arm begins and ends."""
    found: dict[str, list[Exchange]] = {}
    now: list[Exchange] | None = None
    for exchange in exchanges:
        mark, name = exchange.target.split("/")[1:3] if exchange.target.count("/") > 1 else ("", "")
        if mark in ("begin", "end"):
            now = found.setdefault(name, []) if mark == "begin" else None
        elif now is not None:
            now.append(exchange)
    return found


def sum_exchanges(exchanges: Sequence[Exchange]) -> dict[str, dict[str, int]]:
    """Requests and bytes in each direction: those for messages, and polling."""
    sums = {"messages": Counter[str](), "polling": Counter[str]()}
    for exchange in exchanges:
        name = exchange.target.rpartition("/")[2]
        idle = name == _BEATING or (name == _ASKING and exchange.down < _NOTHING)
        part = sums["polling" if idle else "messages"]
        part.update({"requests": 1, "down": exchange.down, "up": exchange.up})
    return {key: dict(part) for key, part in sums.items()}


def wire_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of Markdown."""
    yield (
        "| kind | preset | messages | ledger down | wire down | ledger up | wire up "
        "| requests | polling down, up |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        ledger, messages, polling = row["ledger"], row["messages"], row["polling"]
        numbers = (
            *(ledger["messages"], ledger["down"], messages["down"]),
            *(ledger["up"], messages["up"], messages["requests"]),
        )
        yield (
            f"| {row['kind']} | {row['preset']} | "
            + " | ".join(f"{number:,}" for number in numbers)
            + f" | {polling.get('down', 0):,}, {polling.get('up', 0):,} |"
        )
