"""Inference without a pause while twenty releases are activated under it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from prunecast.client.edge import Agent
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository import Repository
from support.network import Network

SWAPS, THREADS, REQUESTS = 20, 4, 1000


def _outputs(model: PublishedModel, x: np.ndarray) -> np.ndarray:
    a = model.arrays()
    return np.maximum(x @ a["w1"].T + a["b1"], 0) @ a["w2"].T + a["b2"]


class Load:
    """Threads that ask, and note every answer: what was asked, which release, its outputs."""

    def __init__(self, agent: Agent, batches: list[np.ndarray]) -> None:
        self.failed: list[BaseException] = []
        self.answers: list[list[tuple[int, int, np.ndarray]]] = [[] for _ in range(THREADS)]
        self._agent, self._batches = agent, batches
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(THREADS)]

    def _ask(self, thread: int) -> None:
        rng = np.random.default_rng(thread)
        while not self._stop.wait(0.0005):  # leaves the processor to the update now and then
            which = int(rng.integers(len(self._batches)))
            try:
                got = self._agent.model.infer({"input": self._batches[which]})
            except BaseException as error:
                self.failed.append(error)
            else:
                self.answers[thread].append((which, got.version, got.outputs["output"]))

    def wait_for(self, version: int) -> None:
        """Until every thread was answered by this release."""
        deadline = time.monotonic() + 30
        while not all(a and a[-1][1] == version for a in self.answers) and not self.failed:
            assert time.monotonic() < deadline, f"release {version} does not answer"
            time.sleep(0.002)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=30)


def test_no_request_fails_and_no_answer_mixes_releases(
    start: Callable[..., Agent],
    publish: Callable[[int], ReleaseManifest],
    model: Callable[[int], PublishedModel],
    repository: Repository,
    network: Network,
) -> None:
    repository.window = 2
    batches = [
        np.random.default_rng(n).standard_normal((4, 12)).astype(np.float32) for n in range(5)
    ]
    expected = np.array(
        [[_outputs(model(n), x) for x in batches] for n in range(1, SWAPS + 2)]
    )  # release, batch, example, output
    states = []
    for number in range(1, SWAPS + 2):
        publish(number)
        states.append((network.folder / "metadata" / "timestamp.json").read_bytes())
    network.replaced["metadata/timestamp.json"] = states[0]
    agent = start()
    agent.update_once()
    with Load(agent, batches) as load:
        load.wait_for(1)
        for number in range(2, SWAPS + 2):
            network.replaced["metadata/timestamp.json"] = states[number - 1]
            assert agent.update_once().version == number
            load.wait_for(number)
        while sum(map(len, load.answers)) < REQUESTS:
            time.sleep(0.002)
    assert load.failed == []
    answers = [a for thread in load.answers for a in thread]
    assert len(answers) >= REQUESTS
    assert {version for _, version, _ in answers} == set(range(1, SWAPS + 2))
    for which, version, outputs in answers:
        distance = np.abs(expected[:, which] - outputs).max(axis=(1, 2))
        fits = np.flatnonzero(distance < 1e-5) + 1
        assert fits.tolist() == [version]  # exactly one release computes this, the one reported
    for thread in load.answers:  # each thread sees releases in order
        versions = [version for _, version, _ in thread]
        assert versions == sorted(versions)


def test_a_request_fails_only_by_its_own_fault(
    start: Callable[..., Agent], publish: Callable[[int], ReleaseManifest]
) -> None:
    """The load above would notice a failure: one that is provoked is noted."""
    publish(1)
    agent = start()
    agent.update_once()
    with Load(agent, [np.zeros((4, 3), np.float32)]) as load:
        deadline = time.monotonic() + 30
        while not load.failed:
            assert time.monotonic() < deadline
            time.sleep(0.002)
    assert "must be float32" in str(load.failed[0])
    with pytest.raises(ValueError, match="inputs"):
        agent.model.infer({})
