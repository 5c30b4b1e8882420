"""The client: what a ClientApp imports. Each name is imported when it is first asked for.

The parts are `prunecast.client.training` and, on devices, `prunecast.client.edge`.
"""

from typing import TYPE_CHECKING

from prunecast.common.lazy import face

if TYPE_CHECKING:
    from prunecast.client.training.mod import compression_mod
    from prunecast.client.training.secure import shared_mask_mod
    from prunecast.compression.pruning.masks import current_masks
    from prunecast.compression.pruning.structure.channels import current_channels
    from prunecast.compression.pruning.training.holding import hold_masks
    from prunecast.compression.pruning.training.modules import prune_module
    from prunecast.compression.pruning.training.recalibrating import recalibrate

__all__ = [
    "compression_mod",
    "current_channels",
    "current_masks",
    "hold_masks",
    "prune_module",
    "recalibrate",
    "shared_mask_mod",
]

__getattr__, __dir__ = face(
    __name__,
    {
        "compression_mod": "prunecast.client.training.mod",
        "current_channels": "prunecast.compression.pruning.structure.channels",
        "current_masks": "prunecast.compression.pruning.masks",
        "hold_masks": "prunecast.compression.pruning.training.holding",
        "prune_module": "prunecast.compression.pruning.training.modules",
        "recalibrate": "prunecast.compression.pruning.training.recalibrating",
        "shared_mask_mod": "prunecast.client.training.secure",
    },
)
