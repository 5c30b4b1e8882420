"""The ledger: sums that agree with its file, which keeps every run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from prunecast.common.files import StorageError
from prunecast.server.federation import Entry, FederationError, Ledger, Tally, Totals


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
    # docs/payloads.md: objects, envelope, what Flower's counter and HTTP add, wire
    measured = [("down", 8, 1130, 12_460), ("down", 3, 353, 5_970)]
    measured += [("up", 8, 1198, 12_430), ("up", 3, 403, 5_440)]
    for direction, objects, size, wire in measured:
        known = Tally([entry(1, direction, payload_bytes=size, objects=objects)]).totals()
        found = known.wire_down if direction == "down" else known.wire_up
        assert found == pytest.approx(wire, abs=20)
        assert (known.wire_up if direction == "down" else known.wire_down) == 0
    before = Tally([entry(1, "down"), entry(1, "up")]).totals()
    assert (before.wire_down, before.wire_up) == (None, None)  # objects were not counted


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
