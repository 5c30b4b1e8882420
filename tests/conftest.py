"""What holds for every test: threads, signals, and which files are begun first."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

# Before anything imports NumPy or torch. Tests run in several processes that start further ones:
# more threads than cores wait for each other, and those of OpenMP compute while they wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a test writes need not outlive the machine: tests of power cuts say themselves what a disk
# has kept. It takes milliseconds for every file, and every worker waits for those of all.
os.fsync = lambda descriptor: None

# They wait for what Flower takes its time for, such as to miss a node.
LONGEST = (
    *("test_resume.py", "test_faults.py", "test_deploy_documentation.py"),
    *("test_store_faults.py", "test_wire.py"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that wait for other processes longest: others compute meanwhile."""
    waiting = {item.path for item in items if item.get_closest_marker("engine")}
    place = {name: number for number, name in enumerate(LONGEST)}

    def key(item: pytest.Item) -> tuple[bool, int]:
        return item.path not in waiting, place.get(item.path.name, len(place))

    items.sort(key=key)


@pytest.fixture
def signals_end() -> Iterator[None]:
    """Under nohup, commands would inherit that they ignore SIGHUP; in the background, SIGINT."""
    handlers = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def two_machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two machines with one processor and one pretended GPU each.

    Ray writes down its newest cluster below its folder, and whatever starts without an address
    joins that one: with the common folder, the simulations of other tests, which would die with it.
    """
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # short: sockets lie in it
        monkeypatch.setenv("RAY_TMPDIR", folder)
        machine = {"num_cpus": 1, "num_gpus": 1}
        cluster = Cluster(
            initialize_head=True, head_node_args={**machine, "include_dashboard": False}
        )
        try:
            cluster.add_node(**machine)
            yield cluster
        finally:
            cluster.shutdown()
