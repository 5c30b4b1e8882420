"""The Flower mods, the node's store and the torch trainer."""

from prunecast.client.training.errors import ModError, StoreError
from prunecast.client.training.mod import compression_mod
from prunecast.client.training.scheme_mod import scheme_mod
from prunecast.compression.pruning import current_masks

__all__ = ["ModError", "StoreError", "compression_mod", "current_masks", "scheme_mod"]
