"""The benchmark of lists: its rows, and that a list for each name does not grow with the others."""

from __future__ import annotations

from benchmarks.names import EVENTS, measure


def test_an_update_beside_other_names() -> None:
    alone, beside, more = (measure(n, r, parted=True) for n, r in ((2, 2), (6, 2), (6, 8)))
    assert list(alone) == list(EVENTS)
    # a line of snapshot for each name, and nothing for their releases
    line = len('"name.model-000.json":{"hashes":{"sha256":""},"version":2},') + 64
    assert abs(beside["another name"] - alone["another name"] - 4 * line) < 8  # digits of numbers
    assert abs(beside["another name"] - more["another name"]) < 8
    together = [measure(6, releases, parted=False)["another name"] for releases in (2, 8)]
    assert together[1] - together[0] > 6 * 6 * 100  # in one list every release costs everybody
