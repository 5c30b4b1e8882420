"""The Flower mod, the node's store and the torch trainer."""

from prunecast.client.training.mod import compression_mod
from prunecast.client.training.store import ModError, StoreError
from prunecast.compression.pruning.masks import (
    contribute_statistics,
    current_masks,
    current_teacher,
    wanted_statistics,
)
from prunecast.compression.pruning.structure.channels import current_channels

__all__ = [
    "ModError",
    "StoreError",
    "compression_mod",
    "contribute_statistics",
    "current_channels",
    "current_masks",
    "current_teacher",
    "wanted_statistics",
]
