"""Real Flower engines, started for the tests, in a Flower home of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.loopback.engine import Engine, engine_in, unused_port

HERE = Path(__file__).parent
collect_ignore = ["faulty", "lasting", "tiny"]


@pytest.fixture(scope="session")
def tiny_app() -> Path:
    """The app most engine tests run."""
    return HERE / "tiny"


@pytest.fixture(scope="session")
def start_engine() -> Callable[..., contextlib.AbstractContextManager[Engine]]:
    """`engine_in`, for test modules."""
    return engine_in


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """`unused_port`, for test modules."""
    return unused_port


@pytest.fixture(scope="session")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The SuperLink that `flwr run` otherwise leaves running as a daemon, on a port of its own."""
    folder = tmp_path_factory.mktemp("simulation")
    port = unused_port()
    with engine_in(folder, FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=str(port)) as engine:
        engine.start(
            "superlink",
            *("flower-superlink", "--insecure", "--simulation"),
            *("--host", "127.0.0.1", "--port", str(port)),
            port=port,
        )
        yield engine
