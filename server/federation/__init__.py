"""The Flower grid that compresses, the publisher of versions, the byte ledger."""

from prunecast.server.federation.checkpoints import Checkpoint
from prunecast.server.federation.deadlines import Deadlines
from prunecast.server.federation.errors import (
    CheckpointError,
    FederationError,
    NodesFailed,
    NodesMissing,
    NonFiniteModel,
    PolicyError,
    ReleaseRuleError,
)
from prunecast.server.federation.events import read_events
from prunecast.server.federation.grid import CompressedGrid
from prunecast.server.federation.ledger import Entry, Ledger, Tally, Totals
from prunecast.server.federation.policy import PRESETS, Policy
from prunecast.server.federation.releasing import AutomaticReleases, ReleaseRule
from prunecast.server.federation.run import Run

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
