"""What a device tells about itself: inferences, latencies, self-tests, memory; by release."""

from prunecast.client.edge.telemetry.figures import (
    LatencyHistogram,
    ReleaseFigures,
    TelemetrySnapshot,
)
from prunecast.client.edge.telemetry.recorder import Telemetry, read_telemetry

__all__ = ["LatencyHistogram", "ReleaseFigures", "Telemetry", "TelemetrySnapshot", "read_telemetry"]
