"""What messages take on the wire: the ledger's estimate beside a relay that counts every byte.

    python benchmarks/wire.py [--sizes N ...] [--rounds N] [--seconds X] [--smoke] [--out FOLDER]

Two SuperNodes reach a real SuperLink on loopback by the relay, over HTTP and then over HTTP with
TLS. Payloads are noise of the sizes asked for, exact both ways. After a round that fetches the app,
rounds are counted: the bytes of the messages (the ledger), what the ledger estimates that the wire
takes, what Flower counts itself (`flwr list`, of the whole run), and what passed the relay, each
from the nodes and to them. What nodes ask and say while they wait is told apart, and stated by the
minute. Nodes train for ``--seconds`` (default: 6), longer than an idle connection lives, as they
do where training is more than a toy.

Writes wire.json and wire.md into docs/results: ten minutes or so. ``--smoke`` counts one round of
the smallest size, into runs/wire-smoke.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: the repository's folder is not where Python looks
    sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness.report import machine
from benchmarks.loopback.engine import Engine, relayed
from benchmarks.loopback.relay import HANDSHAKE, Exchange, Relay
from prunecast.common.files import write_atomically

__all__ = ["Quiet", "WireRow", "listen", "measure", "page", "split"]

NODES = 2
SIZES = (2_000, 200_000, 10_000_000)
_ROOT = Path(__file__).parent.parent
_APP = _ROOT / "benchmarks" / "loopback" / "sized"
_BYTES = 3.58  # of a payload for each float of noise
_SECONDS = 900
_NOTHING = 256  # bytes, of which an answer without a message has fewer
_MORE = (
    48  # bytes: a sign of life has fewer more than a question, and what names an object has more
)
_LISTEN = 35  # seconds: a node gives a sign of life every thirty


@dataclass(frozen=True)
class Quiet:
    """What nodes ask and say without a message.

    Attributes:
        limit: bytes that no such request reaches.
        up, down: bytes of one node in a minute.
    """

    limit: int
    up: float
    down: float


@dataclass(frozen=True)
class WireRow:
    """The counted rounds of one size; pairs of bytes are from the nodes, and to them.

    Attributes:
        tls: whether connections had TLS.
        size: of a payload, as it was asked for.
        messages: both ways together.
        ledger: bytes of messages.
        requests: by estimate.
        estimate: of the wire.
        relay: what passed for messages.
        relay_requests: how many passed.
        handshakes: of connections that were opened for messages.
        flower: what Flower counts of the whole run.
        ledger_of_run: bytes of all messages of the run.
    """

    tls: bool
    size: int
    messages: int
    ledger: tuple[int, int]
    requests: int
    estimate: tuple[int, int]
    relay: tuple[int, int]
    relay_requests: int
    handshakes: int
    flower: tuple[int, int]
    ledger_of_run: tuple[int, int]

    @property
    def off(self) -> tuple[float, float]:
        """The estimate beside the relay, less one."""
        up, down = (e / r - 1 for e, r in zip(self.estimate, self.relay, strict=True))
        return up, down


def listen(relay: Relay, seconds: float = _LISTEN) -> Quiet:
    """Count what connected nodes say when there is nothing to do."""
    before, started = len(relay.exchanges), time.monotonic()
    time.sleep(seconds)
    minutes = (time.monotonic() - started) / 60 * NODES
    heard = relay.exchanges[before:]
    return Quiet(
        # the usual one is a question; a node may still have been registering
        statistics.median_low(e.up for e in heard if e.target != HANDSHAKE) + _MORE,
        sum(e.up for e in heard) / minutes,
        sum(e.down for e in heard) / minutes,
    )


def split(exchanges: Sequence[Exchange], limit: int) -> tuple[list[Exchange], list[Exchange]]:
    """Those for messages, and the others; a handshake is for what its connection is used for first.

    Args:
        exchanges: in order.
        limit: of `Quiet`.
    """
    found: tuple[list[Exchange], list[Exchange]] = [], []
    for place, exchange in enumerate(exchanges):
        decides = exchange
        if exchange.target == HANDSHAKE:
            later = (e for e in exchanges[place + 1 :] if e.connection == exchange.connection)
            decides = next(later, exchange)
        idle = decides.up < limit and decides.down < _NOTHING
        found[idle].append(exchange)
    return found


def measure(
    engine: Engine,
    relay: Relay,
    quiet: Quiet,
    size: int,
    *,
    tls: bool,
    rounds: int = 4,
    seconds: float = 6.0,
) -> WireRow:
    """Train the app whose payloads have a size.

    Args:
        engine: with the SuperLink and `NODES` SuperNodes.
        relay: between them.
        quiet: what passes it in between.
        size: of each payload, in bytes, roughly.
        tls: whether connections have TLS.
        rounds: that are counted.
        seconds: that nodes train, and that the server waits between rounds.

    Raises:
        EngineProblem: Flower's processes failed.
    """
    from prunecast.server.federation import Ledger, Tally

    before = len(relay.exchanges)
    ledger = engine.folder / f"ledger-{size}.jsonl"
    config = {"floats": round(size / _BYTES), "num-server-rounds": rounds, "seconds": seconds}
    config |= {"ledger": str(ledger), "relay": relay.address}
    told = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    run = engine.run(_APP, "--run-config", told, seconds=_SECONDS)
    passed = relay.exchanges[before:]
    begin, end = ([e.target for e in passed].index(mark) for mark in ("/begin/", "/end/"))
    messages, _ = split(passed[begin + 1 : end], quiet.limit)
    tally = Tally(Ledger.read(ledger))
    counted, whole = tally.totals(rounds=range(2, rounds + 2)), tally.totals()
    wire = counted.wire()
    assert wire is not None
    kind, traffic = "tls" if tls else "http", run.details["network-traffic"]
    return WireRow(
        tls=tls,
        size=size,
        messages=counted.messages,
        ledger=(counted.bytes_up, counted.bytes_down),
        requests=wire["requests"],
        estimate=(wire[f"{kind}_up"], wire[f"{kind}_down"]),
        relay=(sum(e.up for e in messages), sum(e.down for e in messages)),
        relay_requests=sum(e.target != HANDSHAKE for e in messages),
        handshakes=sum(e.target == HANDSHAKE for e in messages),
        flower=(traffic["inbound-bytes"], traffic["outbound-bytes"]),
        ledger_of_run=(whole.bytes_up, whole.bytes_down),
    )


def page(document: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    about, (low, high) = document["machine"], document["load"]
    yield "# Bytes on the wire"
    yield ""
    yield f"`{document['command']}`; {about['cpu']}, {about['cores']} cores, load {low:.0f} to"
    yield f"{high:.0f}; {about['date']}, prunecast {about['prunecast']}. {NODES} SuperNodes,"
    yield f"{document['rounds']} counted rounds, {document['seconds']:g} seconds of training; bytes"
    yield "are those of all of them, *up* from the nodes and *down* to them. What is counted is in"
    yield "[What a message costs](../payloads.md#what-a-message-costs)."
    yield ""
    yield (
        "| | payload | messages up, down | estimate up, down | relay up, down | off | requests: "
        "estimate, relay | connections opened | whole run, messages | Flower's counter |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for row in document["rows"]:
        off = [e / r - 1 for e, r in zip(row["estimate"], row["relay"], strict=True)]
        yield (
            f"| {'TLS' if row['tls'] else 'HTTP'} | {row['size']:,} | {_pair(row['ledger'])} "
            f"| {_pair(row['estimate'])} | {_pair(row['relay'])} | {off[0]:+.1%}, {off[1]:+.1%} "
            f"| {row['requests']}, {row['relay_requests']} | {row['handshakes'] or '–'} "
            f"| {sum(row['ledger_of_run']):,} | {sum(row['flower']):,} |"
        )
    yield ""
    yield "A node that waits, bytes in a minute:"
    yield ""
    for kind, quiet in document["quiet"].items():
        yield f"- {kind}: {quiet['up']:,.0f} up, {quiet['down']:,.0f} down"


def _pair(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


def main(given: list[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if given is None else given
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", metavar="N", help="bytes of a payload")
    add("--rounds", type=int, metavar="N", help="that are counted")
    add("--seconds", type=float, default=6.0, metavar="X", help="that nodes train (default: 6)")
    add("--smoke", action="store_true", help="the smallest size, one round")
    add("--out", type=Path, metavar="FOLDER", help="(default: docs/results)")
    chosen = parser.parse_args(given)
    sizes = chosen.sizes or (SIZES[:1] if chosen.smoke else SIZES)
    rounds = chosen.rounds or (1 if chosen.smoke else 4)
    out = chosen.out or (Path("runs/wire-smoke") if chosen.smoke else _ROOT / "docs" / "results")
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    heard: dict[str, dict[str, float]] = {}
    for tls in (False, True):
        kind = "TLS" if tls else "HTTP"
        environment = {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
        with (
            tempfile.TemporaryDirectory() as folder,
            relayed(Path(folder), NODES, tls=tls, **environment) as (engine, relay),
        ):
            quiet = listen(relay)
            heard[kind] = {"up": quiet.up, "down": quiet.down}
            for size in sizes:
                row = measure(
                    engine, relay, quiet, size, tls=tls, rounds=rounds, seconds=chosen.seconds
                )
                print(
                    f"{kind} {size:,}: off {row.off[0]:+.1%} up, {row.off[1]:+.1%} down", flush=True
                )
                rows.append(vars(row))
    command = " ".join(["python benchmarks/wire.py", *given])
    document = {
        "machine": machine(),
        "command": command,
        "load": [load, os.getloadavg()[0]],
        "rounds": rounds,
        "seconds": chosen.seconds,
        "quiet": heard,
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "wire.json", (json.dumps(document, indent=1) + "\n").encode())
    text = "\n".join(page(document)) + "\n"
    write_atomically(out / "wire.md", text.encode())
    print(f"{text}\n{out / 'wire.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
