"""The messages between a fleet's control server and the agents: `fleet.proto` and its code.

What both sides must agree on lies here, because client and server never import each other.
"""

from collections.abc import Callable
from typing import Any

from prunecast.common.fleet_protocol import fleet_pb2 as messages
from prunecast.common.fleet_protocol import fleet_pb2_grpc
from prunecast.common.fleet_protocol.fleet_pb2_grpc import FleetControlServicer

__all__ = [
    "CHUNK_BYTES",
    "SERVICE",
    "FleetControlServicer",
    "add_servicer",
    "make_stub",
    "messages",
]

SERVICE = "prunecast.fleet.v1.FleetControl"
"""Full name of the service, for health checks."""

CHUNK_BYTES = 512 * 1024
"""Bytes of a chunk of `Fetch`; agents accept any size up to 4 MiB."""

# the generated functions have no types
add_servicer: Callable[[FleetControlServicer, Any], None]
add_servicer = fleet_pb2_grpc.add_FleetControlServicer_to_server
make_stub: Callable[[Any], Any] = fleet_pb2_grpc.FleetControlStub
