"""The server: what a ServerApp imports. Each name is imported when it is first asked for.

The parts are `prunecast.server.federation`, `prunecast.server.repository`,
`prunecast.server.fleet` and `prunecast.server.control`.
"""

from typing import TYPE_CHECKING

from prunecast.common.lazy import face

if TYPE_CHECKING:
    from prunecast.server.federation.exchange.deadlines import Deadlines, staleness_weight
    from prunecast.server.federation.exchange.grid import CompressedGrid
    from prunecast.server.federation.policy import Policy
    from prunecast.server.federation.publishing.widths import leading_slices
    from prunecast.server.federation.reporting.ledger import Ledger
    from prunecast.server.federation.reporting.metrics import MetricsServer, RunMetrics
    from prunecast.server.federation.run import Run
    from prunecast.server.federation.secure import SecureStrategy
    from prunecast.server.federation.shrinking.choosing import module_chooser
    from prunecast.server.federation.state.checkpoints import Checkpoint

__all__ = [
    "Checkpoint",
    "CompressedGrid",
    "Deadlines",
    "Ledger",
    "MetricsServer",
    "Policy",
    "Run",
    "RunMetrics",
    "SecureStrategy",
    "leading_slices",
    "module_chooser",
    "staleness_weight",
]

__getattr__, __dir__ = face(
    __name__,
    {
        "Checkpoint": "prunecast.server.federation.state.checkpoints",
        "CompressedGrid": "prunecast.server.federation.exchange.grid",
        "Deadlines": "prunecast.server.federation.exchange.deadlines",
        "Ledger": "prunecast.server.federation.reporting.ledger",
        "Policy": "prunecast.server.federation.policy",
        "Run": "prunecast.server.federation.run",
        "SecureStrategy": "prunecast.server.federation.secure",
        "MetricsServer": "prunecast.server.federation.reporting.metrics",
        "RunMetrics": "prunecast.server.federation.reporting.metrics",
        "leading_slices": "prunecast.server.federation.publishing.widths",
        "module_chooser": "prunecast.server.federation.shrinking.choosing",
        "staleness_weight": "prunecast.server.federation.exchange.deadlines",
    },
)
