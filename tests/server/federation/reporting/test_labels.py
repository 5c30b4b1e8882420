"""Labels of what Prometheus reads."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from prunecast.server.federation.reporting.metrics import RunMetrics


def test_long_names_that_begin_alike_are_told_apart() -> None:
    """Two samples of one name and labels make Prometheus refuse all of them."""
    metrics, long = RunMetrics(), "accuracy of the validation examples " * 4
    finished = {"event": "round-finished", "time": "2026-01-01T00:00:00+00:00", "round": 1}
    finished |= {"dense_bytes_down": 0, "dense_bytes_up": 0, "seconds": 1.0}
    metrics({**finished, "metrics": {f"{long}{end}": float(end) for end in range(3)}})
    families = text_string_to_metric_families(metrics.text().decode())
    (found,) = (family.samples for family in families if family.name == "prunecast_run_metric")
    assert sorted(sample.value for sample in found) == [0.0, 1.0, 2.0]
    names = {sample.labels["metric"] for sample in found}
    assert len(names) == 3
    assert max(map(len, names)) <= 100
