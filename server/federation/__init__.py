"""The Flower grid that compresses, the publisher of versions, the byte ledger."""

from prunecast.server.federation.errors import (
    CheckpointError,
    FederationError,
    NodesFailed,
    NodesMissing,
    NonFiniteModel,
    PolicyError,
    ReleaseRuleError,
)
from prunecast.server.federation.exchange.deadlines import Deadlines
from prunecast.server.federation.exchange.grid import CompressedGrid
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.presets import PRESETS
from prunecast.server.federation.releasing import AutomaticReleases, ReleaseRule
from prunecast.server.federation.reporting.events import read_events
from prunecast.server.federation.reporting.ledger import Entry, Ledger, Tally, Totals
from prunecast.server.federation.run import Run
from prunecast.server.federation.state.checkpoints import Checkpoint

__all__ = [
    "PRESETS",
    "AutomaticReleases",
    "Checkpoint",
    "CheckpointError",
    "CompressedGrid",
    "Deadlines",
    "Entry",
    "FederationError",
    "Ledger",
    "NodesFailed",
    "NodesMissing",
    "NonFiniteModel",
    "Policy",
    "PolicyError",
    "ReleaseRule",
    "ReleaseRuleError",
    "Run",
    "Tally",
    "Totals",
    "read_events",
]
