"""The agent under control of a fleet: directives in, reports out, over gRPC and TLS.

Needs what the agent needs, grpcio and protobuf.
"""

from prunecast.client.edge.control.controller import Controller
from prunecast.client.edge.control.fetcher import ControlFetcher
from prunecast.client.edge.control.line import Line
from prunecast.client.edge.control.settings import ControlSettings

__all__ = ["ControlFetcher", "ControlSettings", "Controller", "Line"]
