"""Who chooses the channels that go, and what a strategy keeps of those that stay."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from prunecast.compression.pruning.plan import Shares
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.server.federation.shrinking import choosing
from prunecast.server.federation.shrinking.strategies import narrow_strategy


def test_a_choice_that_takes_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told, texts = threading.Event(), []

    def log(_: int, text: str, *values: Any) -> None:
        texts.append(text % values)
        told.set()

    def choose(*_: Any) -> ChannelPlan:
        assert told.wait(30)
        return ChannelPlan({}, share=0.5)

    monkeypatch.setattr(choosing, "_PATIENCE", 0.001)
    monkeypatch.setattr(choosing, "log", log)
    assert choosing.chosen(choose, {}, Shares(0.5), None).share == 0.5
    (text,) = texts
    assert text.startswith("Channels are still being chosen after 0.001 s")


WIDE = {"w": np.arange(6, dtype=np.float32).reshape(3, 2), "b": np.ones(2, np.float32)}
KEPT = ChannelPlan({"w": (np.array([True, False, True]), None)})
Arrays = dict[str, NDArray[np.float32]]


@pytest.mark.parametrize(
    ("keep", "first"),
    [
        (lambda arrays: tuple(arrays.values()), lambda kept: kept[0]),
        (lambda arrays: {n: Array(a) for n, a in arrays.items()}, lambda kept: kept["w"].numpy()),
        (
            lambda arrays: {n: torch.tensor(a, dtype=torch.float64) for n, a in arrays.items()},
            lambda kept: kept["w"].numpy(),
        ),
        (lambda arrays: {7: dict(arrays), 9: dict(arrays), "c": 0.5}, lambda kept: kept[9]["w"]),
        (lambda arrays: [0, ArrayRecord({n: Array(a) for n, a in arrays.items()})],
         lambda kept: kept[1]["w"].numpy()),
    ],
    ids=["in a tuple", "as Flower's", "as torch's", "by node", "records in a list"],
)  # fmt: skip
def test_arrays_of_the_model_are_found_however_a_strategy_keeps_them(
    keep: Callable[[Arrays], Any], first: Callable[[Any], Any]
) -> None:
    strategy = SimpleNamespace(state=keep(WIDE), round=3, names=["w", "b"])
    narrow_strategy(strategy, KEPT, {name: array.shape for name, array in WIDE.items()})
    assert type(strategy.state) is type(keep(WIDE))
    assert len(strategy.state) == len(keep(WIDE))
    assert first(strategy.state).tolist() == [[0, 1], [4, 5]]
    assert first(strategy.state).dtype == first(keep(WIDE)).dtype
    assert (strategy.round, strategy.names) == (3, ["w", "b"])
