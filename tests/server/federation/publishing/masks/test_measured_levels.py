"""What automatic pruning makes of metrics that are not finite, and when it asks for statistics."""

from __future__ import annotations

import numpy as np
import pytest

from prunecast.server.federation import Policy
from prunecast.server.federation.publishing.masks.progress import Measurements
from prunecast.server.federation.publishing.publisher import Publisher

AUTOMATIC = {
    "pruning_schedule": "automatic", "pruning_tolerance": 0.01, "pruning_patience": 2,
    "pruning_min_size": 100,
}  # fmt: skip


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_level_of_which_no_metric_is_finite_has_failed(broken: float) -> None:
    """As a loss that overflows: it is gone back, and not waited for ever."""
    policy = Policy(**AUTOMATIC, pruning_metric="loss", pruning_begin=0, pruning_end=60)
    publisher = Publisher(policy, b"s", policy.pruning())
    rng = np.random.default_rng(0)
    weight, found = rng.normal(size=(40, 50)), []
    for _ in range(40):
        weight = weight + 0.01 * rng.normal(size=weight.shape)
        model = publisher.publish({"w": weight.astype(np.float32)}).model
        found.append(1 - float(np.mean(model.masks().get("w", True))))
        for value in (broken, 1.0 if found[-1] < 0.6 else broken):
            publisher.pruner.measured.add(value, 10, held_out=True)
    assert max(found) > 0.6
    assert 0.5 <= found[-1] < 0.6


def test_what_was_measured_and_is_not_finite_goes_on_after_a_resume() -> None:
    measured, again = Measurements(), Measurements()
    measured.add(float("nan"), 3, held_out=False)
    again.resume(measured.position)
    assert np.isnan(again.take() or 0)
    assert again.take() is None
    measured.add(0.5, 3, held_out=False)
    again.resume(measured.position)
    assert again.take() == 0.5


def test_nodes_are_asked_for_statistics_as_soon_as_a_level_may_rise() -> None:
    """Also where rounds say when that is, and not learning."""
    policy = Policy(**AUTOMATIC, pruning_criterion="fisher", pruning_begin=2, pruning_end=40)
    publisher = Publisher(policy, b"s", policy.pruning())
    rng = np.random.default_rng(0)
    asked = []
    for _ in range(6):
        publisher.publish({"w": rng.normal(size=(40, 50)).astype(np.float32)})
        asked.append(publisher.wanted)
        publisher.pruner.measured.add(0.9, held_out=True)
    assert asked == [(), *[("gradient",)] * 5]
