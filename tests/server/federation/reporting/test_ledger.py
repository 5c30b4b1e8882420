"""The ledger: sums that agree with its file, which keeps every run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunecast.common.files import StorageError
from prunecast.server.federation import Entry, FederationError, Ledger, Tally, Totals
from prunecast.server.federation.reporting.wire import Pauses
from prunecast.server.federation.wrapper import GridWrapper
from prunecast.simulations.runner.inprocess import InProcessGrid


def entry(number: int, direction: Any = "up", **changes: Any) -> Entry:
    kind = "update" if direction == "up" else "delta"
    values = {"kind": kind, "payload_bytes": 10, "dense_bytes": 100, **changes}
    return Entry(number, 7, direction, message_type="train", **values)


def fill(ledger: Ledger) -> list[Entry]:
    added = []
    for number in (1, 2, 3):
        added += [ledger.add(entry(number, "down")), ledger.add(entry(number, encode_ms=2.0))]
        if number < 3:
            ledger.flush()
    return added


def test_sums_agree_with_the_entries_flushed_or_not(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    added = fill(ledger)
    added[-1].kind, added[-1].decode_ms = "error", 0.5  # known later
    expected = Totals(6, 30, 30, 300, 300, 6.0, 0.5)
    assert ledger.totals() == Tally(added).totals() == expected
    assert (expected.payload_bytes, expected.dense_bytes) == (60, 600)
    assert ledger.totals(rounds=range(2), direction="down") == Totals(1, 0, 10, 0, 100)
    assert ledger.totals(rounds=range(3, 4), kind="error").messages == 1
    ledger.close()
    assert ledger.totals() == expected
    assert list(Ledger.read(tmp_path / "ledger.jsonl")) == added
    tally = Tally(Ledger.read(tmp_path / "ledger.jsonl"))
    assert tally.totals() == expected
    assert tally.kinds("up") == ["update", "error"]


def test_wire_bytes_are_estimated_from_objects_as_a_relay_counted_them() -> None:
    # docs/payloads.md: objects, bytes of the message, wire of both ways together
    measured = [("down", 8, 1130, 12_460), ("down", 3, 353, 5_970)]
    measured += [("up", 8, 1198, 12_430), ("up", 3, 403, 5_440)]
    for direction, objects, size, wire in measured:
        known = Tally([entry(1, direction, payload_bytes=size, objects=objects)]).totals()
        assert (known.wire_down or 0) + (known.wire_up or 0) == pytest.approx(wire, abs=20)
    before = Tally([entry(1, "down"), entry(1, "up")]).totals()
    assert (before.wire_down, before.wire_up) == (None, None)  # objects were not counted
    assert (before.wire_tls_down, before.wire_tls_up, before.wire()) == (None, None, None)


@pytest.mark.parametrize(
    ("direction", "objects", "size", "up", "down"),
    [  # four messages each, as a relay counted them between two SuperNodes and a SuperLink
        ("down", 3, 4 * 2367, 18_453, 13_618),
        ("up", 3, 4 * 2433, 26_525, 3_320),
        ("down", 7, 791_870, 33_342, 799_212),
        ("up", 7, 792_134, 825_603, 6_260),
        ("down", 8, 40_058_944, 37_144, 40_068_000),
        ("up", 8, 40_074_279, 40_110_959, 7_044),
    ],
)
def test_a_message_costs_bytes_both_ways(
    direction: Any, objects: int, size: int, up: int, down: int
) -> None:
    parts = [entry(1, direction, payload_bytes=size // 4, objects=objects) for _ in range(4)]
    known = Tally(parts).totals()
    assert known.wire_up == pytest.approx(up, rel=0.05)
    assert known.wire_down == pytest.approx(down, rel=0.05)
    assert known.requests == 4 * (objects + (2 if direction == "down" else 1))
    assert known.wire() == {
        "requests": known.requests,
        "http_up": known.wire_up,
        "http_down": known.wire_down,
        "tls_up": known.wire_tls_up,
        "tls_down": known.wire_tls_down,
    }


def test_tls_opens_connections_for_nodes_that_were_busy_or_waited() -> None:
    def tls(direction: Any, seconds: float) -> tuple[int, int]:
        known = Tally([entry(1, direction, objects=3, seconds=seconds)]).totals()
        return known.tls_up, known.tls_down

    quick_down, quick_up = tls("down", 1.0), tls("up", 2.0)
    assert quick_down == (5 * 44, 5 * 44)  # two records of 22 bytes each way, for each request
    assert quick_up == (4 * 44, 4 * 44)
    handshake = (597, 1216)
    assert tls("down", 10.0) == tuple(np.add(quick_down, handshake))
    # two, but where a sign of life, every thirty seconds, has kept one open for five
    assert tls("up", 30.0) == tuple(np.add(quick_up, np.rint(np.multiply(handshake, 11 / 6))))
    # in a simulation nothing is timed: nodes are taken to be busy
    assert (tls("down", 0.0), tls("up", 0.0)) == (tls("down", 10.0), tls("up", 30.0))
    assert quick_up < tls("up", 6.0) < tls("up", 30.0)  # it may have polled late
    large = Tally([entry(1, "down", payload_bytes=1 << 24, objects=8, seconds=1.0)]).totals()
    assert large.tls_down == 10 * 44 + 22 * 1024  # a record for every 16 KiB
    assert large.tls_up == 10 * 44


def test_pauses_are_those_of_a_superlink() -> None:
    class HttpGrid:
        pass

    HttpGrid.__module__ = "flwr.superlink.grid.http_grid"
    pauses = Pauses(GridWrapper(HttpGrid()))  # type: ignore[arg-type]
    assert pauses.since(1) == 0.0
    assert pauses.since(2) == 0.0
    assert pauses.since(1) > 0.0
    simulated = Pauses(GridWrapper(InProcessGrid({}, 1)))  # type: ignore[arg-type]
    assert (simulated.since(1), simulated.since(1)) == (0.0, 0.0)


def test_a_later_run_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for name in ("first", "second"):
        ledger = Ledger(path, name=name, seed=3)
        ledger.add(entry(1, kind=name))
        ledger.close()
    assert [e.kind for e in Ledger.read(path)] == ["second"]
    assert [e.kind for e in Ledger.read(path, "first")] == ["first"]
    assert [e.kind for e in Ledger.read(path, ledger.run)] == ["second"]
    header = json.loads(path.read_text().splitlines()[0])
    assert (header["schema"], header["name"], header["seed"]) == (1, "first", 3)
    with pytest.raises(StorageError, match="no run 'third'"):
        Ledger.read(path, "third")


def test_entries_are_kept_only_where_asked_for_and_bounded() -> None:
    ledger = Ledger(keep=2)
    added = fill(ledger)
    assert ledger.entries == added[-2:]
    with pytest.raises(FederationError, match=r"Ledger\.read\(path\).*Ledger\(keep=1000\)"):
        _ = Ledger().entries


def test_unknown_fields_are_dropped_and_missing_ones_told(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.add(entry(1))
    ledger.close()
    text = path.read_text()
    path.write_text(text.replace('"round"', '"colour": "blue", "round"'))
    assert list(Ledger.read(path)) == [entry(1)]
    path.write_text(text.replace('"round"', '"colour"'))
    with pytest.raises(StorageError, match="damaged"):
        list(Ledger.read(path))
    path.write_text(text.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(StorageError, match="update Prunecast"):
        Ledger.read(path)


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(StorageError, match="a file of its own"):
        Ledger(tmp_path / "ledger.jsonl")
    ledger.close()
    Ledger(tmp_path / "ledger.jsonl").close()


def test_a_full_disk_is_reported_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add(entry(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        ledger.flush()
    assert "The ledger lacks 1 messages" in caplog.text
    ledger.add(entry(2))
    ledger.close()
    assert ledger.totals().messages == 2
    assert [e.round for e in Ledger.read(tmp_path / "ledger.jsonl")] == [2]
