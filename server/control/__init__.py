"""The control server: brings the fleet's directives to agents over gRPC, and their reports back."""

from prunecast.server.control.errors import ControlError, Unbindable
from prunecast.server.control.quota import ControlLimits
from prunecast.server.control.repository import LiveReleases
from prunecast.server.control.server import ControlServer

__all__ = ["ControlError", "ControlLimits", "ControlServer", "LiveReleases", "Unbindable"]
