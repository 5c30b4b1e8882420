"""The server: what a ServerApp imports. Each name is imported when it is first asked for.

The parts are `prunecast.server.federation`, `prunecast.server.repository`,
`prunecast.server.fleet` and `prunecast.server.control`.
"""

from typing import TYPE_CHECKING

from prunecast.common.lazy import face

if TYPE_CHECKING:
    from prunecast.server.federation.checkpoints import Checkpoint
    from prunecast.server.federation.deadlines import Deadlines
    from prunecast.server.federation.grid import CompressedGrid
    from prunecast.server.federation.ledger import Ledger
    from prunecast.server.federation.policy import Policy
    from prunecast.server.federation.run import Run
    from prunecast.server.federation.secure import SecureStrategy

__all__ = [
    "Checkpoint",
    "CompressedGrid",
    "Deadlines",
    "Ledger",
    "Policy",
    "Run",
    "SecureStrategy",
]

__getattr__, __dir__ = face(
    __name__,
    {
        "Checkpoint": "prunecast.server.federation.checkpoints",
        "CompressedGrid": "prunecast.server.federation.grid",
        "Deadlines": "prunecast.server.federation.deadlines",
        "Ledger": "prunecast.server.federation.ledger",
        "Policy": "prunecast.server.federation.policy",
        "Run": "prunecast.server.federation.run",
        "SecureStrategy": "prunecast.server.federation.secure",
    },
)
