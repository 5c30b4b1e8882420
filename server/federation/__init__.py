"""The Flower grid that compresses, the publisher of versions, the byte ledger."""

from prunecast.server.federation.checkpoints import Checkpoint
from prunecast.server.federation.errors import (
    CheckpointError,
    FederationError,
    NonFiniteModel,
    PolicyError,
)
from prunecast.server.federation.grid import CompressedGrid
from prunecast.server.federation.ledger import Entry, Ledger, Totals, serialised_bytes
from prunecast.server.federation.metering import MeteringGrid
from prunecast.server.federation.policy import PRESETS, Policy
from prunecast.server.federation.scheme_grid import SchemeGrid

__all__ = [
    "PRESETS",
    "Checkpoint",
    "CheckpointError",
    "CompressedGrid",
    "Entry",
    "FederationError",
    "Ledger",
    "MeteringGrid",
    "NonFiniteModel",
    "Policy",
    "PolicyError",
    "SchemeGrid",
    "Totals",
    "serialised_bytes",
]
