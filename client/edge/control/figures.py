"""Telemetry as the fleet takes it: numbers by name."""

from __future__ import annotations

import math

from prunecast.client.edge.telemetry import TelemetrySnapshot

__all__ = ["figures_of"]


def figures_of(found: TelemetrySnapshot) -> dict[str, float]:
    """Figures of the agent and of the release that is active; only finite ones."""
    made: dict[str, float | None] = {
        "starts": found.starts,
        "uptime_seconds": found.uptime_seconds,
        "resident_bytes": found.resident_bytes,
    }
    for release in found.releases:
        if release.version == found.active:
            made |= {
                "inferences_answered": release.answered,
                "inferences_refused": release.refused,
                "inferences_failed": release.failed,
                "served_seconds": release.served_seconds,
                "selftest_difference": release.difference,
                "latency_p50_seconds": release.latency(0.5),
                "latency_p99_seconds": release.latency(0.99),
            }
    return {k: float(v) for k, v in made.items() if v is not None and math.isfinite(v)}
