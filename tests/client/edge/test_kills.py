"""SIGKILL at random moments, again and again, to a real agent that follows a real server.

``PRUNECAST_KILLS`` says how often (default 40); the figures are printed (``pytest -s``).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest

import support
from prunecast.client.edge import open_model
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository import Repository
from prunecast.server.repository.serving import ReleaseServer

pytestmark = pytest.mark.engine

KILLS = int(os.environ.get("PRUNECAST_KILLS", "40"))
SEED = 20
MODELS = 12  # versions of the weights, used in turn
HOST = Path(next(iter(support.__path__))) / "agent_host.py"


class Host:
    """Forks lives of an agent, see `support.agent_host`."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self._process = subprocess.Popen(
            [sys.executable, str(HOST)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._next()["event"] == "ready"

    def live(self, *, die_at: int | None = None, delay: float | None = None) -> list[dict]:
        """One life: it dies at a call to the file system, after a delay in seconds, or in peace."""
        assert self._process.stdin
        order = {**self._order, "die_at": die_at, "delay": delay}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        events = [self._next()]
        while events[-1]["event"] != "ended":
            events.append(self._next())
        return events

    def _next(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._lines.get(timeout=300))
        return found

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=300)


@pytest.fixture
def host(repository: Repository, images: np.ndarray, tmp_path: Path) -> Iterator[Callable]:
    np.save(tmp_path / "images.npy", images)
    hosts: list[Host] = []

    def host(url: str) -> Host:
        order = {
            "url": url,
            "state": str(tmp_path / "state"),
            "root": str(repository.path / "metadata" / "1.root.json"),
            "inputs": str(tmp_path / "images.npy"),
        }
        hosts.append(Host(order))
        return hosts[-1]

    yield host
    for one in hosts:
        one.close()


class Releases:
    """Publishes models in turn and knows what each release answers."""

    def __init__(self, publish: Callable[[int], ReleaseManifest], model, images: np.ndarray):
        self._publish, self._repository_bytes = publish, 0
        self._answers = [_answer(model(n), images) for n in range(1, MODELS + 1)]
        for one, other in zip(self._answers, self._answers[1:], strict=False):
            assert np.abs(one - other).max() > 1e-2  # mixing two releases would be seen
        self.manifests: dict[int, ReleaseManifest] = {}

    def publish(self) -> None:
        made = self._publish(1 + len(self.manifests) % MODELS)
        self.manifests[made.version] = made

    def check(self, version: int, answer: object) -> None:
        """The answer is exactly that of this release."""
        assert version in self.manifests
        want = self._answers[(version - 1) % MODELS]
        assert np.abs(np.asarray(answer) - want).max() < 1e-5

    def most_disk(self, repository: Path) -> int:
        """Two slots, the downloads of one release, two generations of metadata, 4 KiB of notes."""
        made = self.manifests.values()
        small = max(sum(r.length for r in m.files.values()) + len(m.to_bytes()) for m in made)
        weights = max(m.weights.length for m in made)
        payload = max(m.keyframe.length for m in made)
        newest: dict[str, int] = {}
        for path in sorted((repository / "metadata").glob("*.json"), key=_number):
            newest[path.name.split(".")[-2]] = path.stat().st_size
        slot = small + weights + payload + 64  # an own frame around the model
        return 2 * slot + small + 2 * payload + 2 * sum(newest.values()) + 4096


def _number(path: Path) -> int:
    first = path.name.partition(".")[0]
    return int(first) if first.isdigit() else 0


def _answer(model: PublishedModel, x: np.ndarray) -> np.ndarray:
    a = model.arrays()
    return np.maximum(x @ a["w1"].T + a["b1"], 0) @ a["w2"].T + a["b2"]


def test_killed_at_random_moments(
    repository: Repository,
    publish: Callable[[int], ReleaseManifest],
    model: Callable[[int], PublishedModel],
    images: np.ndarray,
    host: Callable[[str], Host],
    tmp_path: Path,
) -> None:
    rng = random.Random(SEED)
    state = tmp_path / "state"
    repository.window = 3
    releases = Releases(publish, model, images)
    releases.publish()
    figures: Counter[str] = Counter()
    begun, largest, active = time.monotonic(), 0.0, 0
    with ReleaseServer(repository.path) as server:
        lives = host(server.url)
        first = lives.live()  # in peace: it tells how long a life lasts
        calls, lasted, active = first[-2]["calls"], first[-1]["seconds"], 1
        assert calls > 50
        while figures["kills"] < KILLS:
            if active == len(releases.manifests):
                releases.publish()
            if rng.random() < 0.5:
                events = lives.live(die_at=rng.randrange(1, calls))
            else:
                # most of a life is the trial: some must get beyond it
                events = lives.live(delay=rng.uniform(0, 1.5 * lasted))
            figures["lives"] += 1
            end = events[-1]
            assert end["code"] in (-signal.SIGKILL, 0), events
            figures["kills"] += end["code"] != 0
            for event in events:
                if event["event"] == "serves" and event["version"] is not None:
                    releases.check(event["version"], event["answer"])
                assert event["event"] not in ("failed",), event
                figures[event["event"]] += 1
            # what an application finds while no agent runs
            served = open_model(state, threads=1).infer({"input": images})
            releases.check(served.version, served.outputs["output"])
            figures["went back"] += served.version < active
            figures["activated"] += served.version > active
            active = served.version
            used = sum(p.lstat().st_size for p in state.rglob("*") if p.is_file())
            allowed = releases.most_disk(repository.path)
            largest = max(largest, used / allowed)
            assert used <= allowed, sorted(map(str, state.rglob("*")))
        releases.publish()
        last = lives.live()
        assert last[-3]["event"] == "updated", last
        assert last[-3]["version"] == len(releases.manifests)
    figures["seconds"] = round(time.monotonic() - begun)
    shown = f"{dict(figures)}; disk: at most {largest:.0%} of the bound of {allowed} bytes"
    print("\n" + shown)  # noqa: T201
    assert figures["activated"] >= KILLS / 20
    assert figures["went back"] <= KILLS / 20  # three deaths in a row before it could be confirmed
