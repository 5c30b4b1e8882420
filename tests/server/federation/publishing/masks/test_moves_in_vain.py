"""Drop and grow that a schedule leaves no round for is said."""

from __future__ import annotations

from typing import Any

import pytest

from prunecast.server.federation import Policy
from prunecast.server.federation.policy import _say_once


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"pruning_end": 14}, True),
        ({"pruning_end": 14, "pruning_schedule": "linear"}, True),
        ({"pruning_end": 14, "pruning_schedule": "one-shot"}, False),
        ({"pruning_end": 14, "pruning_schedule": "static"}, False),
        ({"pruning_end": 14, "pruning_schedule": "iterative"}, False),
        ({"pruning_end": 14, "pruning_masks": "held"}, False),
        ({"pruning_end": 14, "pruning_schedule": "automatic"}, False),
        ({}, False),
    ],
)
def test_weights_that_cannot_move_are_told_of(
    knobs: dict[str, Any], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _say_once.cache_clear()
    policy = Policy(**{"sparsity": 0.8, "pruning_masks": "feddst", **knobs})
    policy.pruning(31)
    policy.check_rounds(31)
    assert ("will move no weights" in caplog.text) is said
    if said:  # and indeed there is none
        schedule = policy.pruning(31).schedule
        assert all(schedule(n) < schedule(n + 1) for n in range(2, policy.moving_until(31)))
