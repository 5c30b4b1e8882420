"""How far a model recovered, of whichever losses were measured."""

from __future__ import annotations

import pytest

from prunecast.server.federation.recovery import Recoveries


@pytest.mark.parametrize(
    ("before", "after", "ratio"),
    [
        ({"eval-loss": 0.4}, {"eval-loss": 0.5}, 0.8),
        # nodes evaluate, and so does the server
        ({"eval-loss": 0.4, "loss": 0.3}, {"eval-loss": 0.5, "loss": 0.6}, 0.5),
        ({"eval-loss": 0.4, "test-loss": 0.3}, {"eval-loss": 0.5, "test-loss": 0.6}, None),
        ({"loss": 0.4}, {"loss": 0.0}, None),
        ({"accuracy": 0.4}, {"accuracy": 0.5}, None),
    ],
)
def test_the_ratio_is_of_the_loss_that_is_meant(
    before: dict[str, float], after: dict[str, float], ratio: float | None
) -> None:
    found = Recoveries("accuracy")
    found.note(1, before, pruned=False)
    found.note(2, after, pruned=True)
    (one,) = found.all()
    assert one.get("recovery_ratio") == (None if ratio is None else pytest.approx(ratio))
