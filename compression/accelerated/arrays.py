"""Between numpy and torch: dtypes, and the way to the device and back.

Tensors are handled as flat int64. An integer of up to 32 bits, signed or not, is its own value
there. A 64-bit one is its two's complement: torch has no arithmetic on uint64, and additions,
left shifts and bitwise operations are the same for both; right shifts and comparisons are not,
and :mod:`.integers` has them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prunecast.compression.codec.context import DTYPE_CODES, TensorSpec
from prunecast.compression.codec.errors import UnsupportedDtype

__all__ = ["SIGNED", "TORCH_DTYPES", "download", "elements", "spec_of", "upload"]

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_CODES}
"""numpy's name of every dtype that has a coding, to torch's dtype."""
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
SIGNED: dict[int, torch.dtype] = {
    8: torch.int8,
    16: torch.int16,
    32: torch.int32,
    64: torch.int64,
}
"""The signed integer dtype of each width."""


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """Return the spec of ``tensor``; UnsupportedDtype when it has no coding."""
    if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
        raise UnsupportedDtype(
            f"tensor {name!r} is {tensor.dtype}, {tensor.layout}; the codec takes dense tensors of "
            "bool, int8 to int64, uint8 to uint64 and float16 to float64: convert it first"
        )
    return TensorSpec(np.dtype(_NAMES[tensor.dtype]), tuple(tensor.shape))


def elements(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the elements on the device, row-major, as signed integers of their own width.

    It may share the tensor's memory: never write into it.
    """
    bits = tensor.detach().resolve_neg().view(SIGNED[8 * tensor.element_size()])
    return bits.to(device).reshape(-1)


def upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return a numpy array on the device. On the CPU it may share memory: never write into it."""
    # torch warns of arrays that may not be written to, and takes no byte order but the machine's.
    array = np.require(array, array.dtype.newbyteorder("="), ("C", "W"))
    return torch.from_numpy(array).to(device)


def download(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a tensor as a numpy array."""
    return np.asarray(tensor.cpu().numpy())
