"""The agent under control of a fleet: directives in, reports out, over gRPC and TLS.

Needs what the agent needs, grpcio and protobuf.
"""

from prunecast.client.edge.control.channel import ControlChannel, ControlFetcher, ControlSettings
from prunecast.client.edge.control.controller import Controller

__all__ = ["ControlChannel", "ControlFetcher", "ControlSettings", "Controller"]
