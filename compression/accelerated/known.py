"""What a context knows of a tensor, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prunecast.compression.codec.modelling.fields import Field

from .arrays import upload

__all__ = ["Known", "KnownTensors"]


@dataclass(frozen=True)
class Known:
    """Mask and previous value of one tensor.

    Attributes:
        device: where the tensors are.
        selected: flat indices under the mask, int64; None without a mask.
        previous: previous elements at the coded positions, as signed integers of their own width
            in int64 (of floats: their bits); None without.
    """

    device: torch.device
    selected: torch.Tensor | None = None
    previous: torch.Tensor | None = None


class KnownTensors:
    """Brings masks and previous values to the device when they are first needed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[str, Known] = {}

    def of(self, f: Field) -> Known:
        """Return what is known of a field's tensor."""
        if f.name not in self._kept:
            selected = previous = None
            if f.mask is not None:
                selected = upload(f.mask.reshape(-1), self._device).nonzero().reshape(-1)
            if f.previous is not None:
                flat = f.previous.reshape(-1)
                previous = upload(flat.view(f"i{flat.dtype.itemsize}"), self._device)
                if selected is not None:
                    previous = previous.index_select(0, selected)
                previous = previous.to(torch.int64)
            self._kept[f.name] = Known(self._device, selected, previous)
        return self._kept[f.name]
