"""What a fleet's control server and the agents agree on: `fleet.proto`, its code, and times.

It lies here, because client and server never import each other. Stubs and handlers follow from the
descriptor of the service, so only the messages are generated code. What needs grpcio is imported
when it is asked for: an agent without a fleet has none.
"""

from typing import TYPE_CHECKING

from prunecast.common.lazy import face

if TYPE_CHECKING:
    from prunecast.common.fleet_protocol.calls import add_servicer, make_stub, messages

__all__ = [
    "CHUNK_BYTES",
    "CONFIRM_SECONDS",
    "SERVICE",
    "add_servicer",
    "make_stub",
    "messages",
]

SERVICE = "prunecast.fleet.v1.FleetControl"
"""Full name of the service, for health checks."""

CHUNK_BYTES = 512 * 1024
"""Bytes of a chunk of `Fetch`; agents accept any size up to 4 MiB."""

CONFIRM_SECONDS = 60.0
"""Seconds of service after which an agent confirms a release, unless it is told otherwise.

Until then the release may bring the process down, and what the device says of it is provisional;
so a stage of a rollout lasts longer by default."""

_HOME = "prunecast.common.fleet_protocol.calls"
__getattr__, __dir__ = face(
    __name__, {"add_servicer": _HOME, "make_stub": _HOME, "messages": _HOME}
)
