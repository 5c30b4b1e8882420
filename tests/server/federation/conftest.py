"""A federation on the in-process grid, wrapped by the compressed grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.clientapp import ClientApp

from prunecast.compression.flower import envelope
from prunecast.server.federation import CompressedGrid, Ledger, Policy
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID, make_app
from support.releases import graph, images, model

__all__ = ["graph", "images", "model"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So small a network trains no faster on several, and much slower where others compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages keep their records, for tests that look into them or change them on the way."""
    monkeypatch.setattr(envelope, "_MOST", -1)


@pytest.fixture
def federation(tmp_path: Path) -> Callable[..., Any]:
    """Build (compressed grid, wrapped grid, what clients saw)."""

    def build(
        policy: Policy | str = "balanced",
        *,
        nodes: int = 3,
        app: ClientApp | dict[int, ClientApp] | None = None,
        run_id: int = RUN_ID,
        **options: Any,
    ) -> tuple[CompressedGrid, InProcessGrid, list[tuple[int, str, dict[str, np.ndarray]]]]:
        seen: list[tuple[int, str, dict[str, np.ndarray]]] = []
        inner = InProcessGrid(app or make_app(tmp_path / "store", seen), nodes, run_id=run_id)
        options = {"ledger": Ledger(keep=10_000), "poll_interval": 0.01, **options}
        return CompressedGrid(inner, policy, **options), inner, seen

    return build
