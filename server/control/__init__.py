"""The control server: brings the fleet's directives to agents over gRPC, and their reports back."""

from prunecast.server.control.errors import ControlError, Unbindable
from prunecast.server.control.limits import Limits
from prunecast.server.control.live import LiveReleases
from prunecast.server.control.server import ControlServer

__all__ = ["ControlError", "ControlServer", "Limits", "LiveReleases", "Unbindable"]
