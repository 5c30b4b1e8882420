"""The benchmark of slow links: its delay line, its links, its app in this process, and its page."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import slow_link
from benchmarks.loopback.delay import Line, due_at
from benchmarks.loopback.namespaces import not_allowed
from prunecast.simulations.runner.inprocess import InProcessGrid

ROOT = Path(__file__).parents[2]
APP = ROOT / "benchmarks" / "loopback" / "shaped"


def test_bytes_are_due_half_a_round_trip_later_and_a_connection_takes_a_whole_one() -> None:
    line, losses = Line(delay=0.1), random.Random(1)
    assert due_at(line, 5.0, 0.0, 1000, losses) == pytest.approx(5.1)
    assert due_at(line, 5.0, 5.2, 1000, losses) == pytest.approx(5.3)  # TCP's handshake
    lossy = Line(delay=0.1, loss=0.5)
    found = [due_at(lossy, 0.0, 0.0, 10 * 1448, losses) for _ in range(200)]
    # a round trip for each segment that is lost
    assert np.mean(found) == pytest.approx(0.1 + 10 * 0.5 * 0.2, rel=0.1)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The app's two sides, and its data: few digits, so that it takes a second."""
    monkeypatch.syspath_prepend(str(APP))
    monkeypatch.setenv("PRUNECAST_STORE", str(tmp_path / "store"))
    from shaped.client_app import app as client
    from shaped.server_app import federate

    rng = np.random.default_rng(0)
    for name, count in (("node0", 64), ("node1", 96), ("held-out", 50)):
        y = rng.integers(0, 10, count)
        x = rng.normal(y[:, None] / 10, 0.1, (count, 784)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", x=x.reshape(-1, 1, 28, 28), y=y)

    def run(arm: str, target: float = 2.0) -> list[dict[str, Any]]:
        config = {"folder": str(tmp_path), "arm": arm, "nodes": 2, "rounds": 2, "seed": 1}
        config["target"] = target
        grid = InProcessGrid(client, 2)
        for context in grid._contexts.values():
            context.run_config.update(config)
        found: list[dict[str, Any]] = federate(grid, config)
        noted = (tmp_path / f"{arm}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in noted[-len(found) :]] == found
        return found

    return run


def test_zstd_changes_bytes_and_nothing_that_is_learned(app: Any) -> None:
    dense, through = app("dense"), app("dense-zstd")
    assert [r["accuracy"] for r in through] == [r["accuracy"] for r in dense]
    assert 0.4 < through[-1]["messages_down"] / dense[-1]["messages_down"] < 0.97
    assert through[-1]["messages_up"] < dense[-1]["messages_up"]


def test_rounds_end_at_the_target(app: Any) -> None:
    (only,) = app("small", target=0.0)
    assert only["round"] == 1
    assert only["messages_down"] < 10_000  # begins with a seed
    assert only["wire"]["tls_up"] > only["messages_up"]


def noted(*rows: tuple[float, float, int]) -> list[dict[str, Any]]:
    return [
        {
            "round": number,
            "seconds": seconds,
            "accuracy": accuracy,
            "up": size,
            "down": size,
            "messages_up": size // 2,
            "messages_down": size // 2,
        }
        for number, (seconds, accuracy, size) in enumerate(rows, start=1)
    ]


def test_the_page_tells_seconds_and_bytes_to_the_target() -> None:
    plain = noted((30.0, 0.5, 2_000_000), (60.0, 0.9, 4_000_000))
    ours = noted((10.0, 0.4, 20_000), (20.0, 0.91, 40_000))
    never = noted((5.0, 0.7, 10_000))
    rows = [
        {"profile": "slow-4g", "arm": arm, "rounds": rounds}
        for arm, rounds in (("dense", plain), ("small", ours), ("tiny", never))
    ]
    about = {"cpu": "X", "cores": 2, "date": "today", "prunecast": "0.1.0"}
    document = {"machine": about, "command": "python x.py", "load": [1.0, 2.0], "target": 0.9}
    text = "\n".join(slow_link.page({**document, "tls": True, "loss": 0.0, "rows": rows}))
    assert "| slow-4g | dense | 2 | 60 | 31.3 | 1.0× | 4.00 | 4.00 | 1.0× | 4.00 MB |" in text
    assert "| slow-4g | small | 2 | 20 | 0.3 | 3.0× | 0.04 | 0.04 | 100.0× | 0.04 MB |" in text
    assert "| slow-4g | tiny | 1 | not reached (70.0% in 5 s) | | | 0.01 | 0.01 | | |" in text
    assert "1.6 Mbit/s down, 0.75 up, 150 ms round trip" in text


def test_where_namespaces_are_not_allowed_it_says_so_and_does_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slow_link, "inside", lambda: False)
    monkeypatch.setattr(slow_link, "not_allowed", lambda: "Operation not permitted")
    assert slow_link.main([]) == 0
    assert "skipped, network namespaces are not allowed here: Oper" in capsys.readouterr().out


_LINK = """
import subprocess, sys, time
from benchmarks.loopback import namespaces
if not namespaces.inside():
    namespaces.enter([sys.executable, "-c", sys.argv[1], sys.argv[1]])
fetch = (
    "import socket, sys; s = socket.create_connection((sys.argv[1], 5000)); n = 0\\n"
    "while data := s.recv(65536): n += len(data)\\n"
    "print(n)"
)
import socket
with namespaces.linked(1, up=1e6, down=2e6) as (end,):
    listener = socket.create_server(("0.0.0.0", 5000))
    node = subprocess.Popen([*end.enter, sys.executable, "-c", fetch, end.server])
    client, _ = listener.accept()
    began = time.monotonic()
    client.sendall(bytes(500_000))
    client.close()
    node.wait(60)
    print(time.monotonic() - began)
    [line] = [l for l in open("/proc/net/dev") if "link0:" in l]
    print(line.split()[9])
"""


@pytest.mark.engine
def test_a_link_shapes_the_rate_and_counts_every_header() -> None:
    if reason := not_allowed():
        pytest.skip(f"network namespaces are not allowed here: {reason}")
    command = [sys.executable, "-c", _LINK, _LINK]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=ROOT, check=True
    )
    size, seconds, counted = (float(word) for word in done.stdout.split())
    assert size == 500_000
    assert seconds > 0.9 * 8 * 500_000 / 2e6  # the link lets nothing through sooner
    packets = 500_000 / 1448
    assert counted > 500_000 + 60 * packets
