"""Named policies: the knobs in which each differs from the defaults."""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]

PRESETS: dict[str, dict[str, Any]] = {
    # plain Flower, measured
    "dense": {"down": "dense", "up": "dense"},
    "lossless": {"down_step": 0.0, "up_step": 0.0},
    # twice the bytes of balanced, for tasks that cannot spare its half point or two
    "fine": {"down_step": 0.1, "up_step": 0.8},
    "balanced": {},  # every knob's default
    # ranked over the whole model: layers that matter little give more
    "small": {"sparsity": 0.8, "pruning_scope": "global"},
    # costs accuracy
    "tiny": {
        "sparsity": 0.95,
        "pruning_scope": "global",
        "down_step": 0.5,
        "up_step": 4.0,
        "up_floor": 3.0,
    },
}
