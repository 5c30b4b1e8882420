"""Values to lattice integers and back (the codec's ``quantise`` and ``dequantise``, in torch)."""

from __future__ import annotations

import numpy as np
import torch

from prunecast.compression.codec.errors import QuantiseError
from prunecast.compression.codec.quantisation import lattice

from .arrays import TORCH_DTYPES

__all__ = ["dequantise", "quantise"]

_NUMPY = {dtype: np.dtype(name) for name, dtype in TORCH_DTYPES.items()}


def quantise(
    values: torch.Tensor, step: float, *, dead_zone: float = 0.5, name: str = ""
) -> torch.Tensor:
    """Return what the codec's ``quantise`` returns, an int32 tensor on the device of ``values``.

    Args:
        values: floating-point tensor of any shape (float16, float32 or float64).
        step: lattice step, in the unit of ``values``; finite and above zero.
        dead_zone: fraction of a step, in (0, 1], below which a magnitude is rounded down.
        name: what the tensor is called in an error message.

    Raises:
        NonFiniteError: ``values`` holds NaN or an infinity.
        QuantiseError: ``step`` or ``dead_zone`` is out of range, ``values`` is not
            floating-point, or a result does not fit in int32.

    >>> quantise(torch.tensor([-0.26, 0.24, 0.9]), 0.5).tolist()
    [-1, 0, 2]
    """
    values = values.detach()
    ends = np.zeros(0, _numpy_dtype(values, "quantise takes float16, float32 or float64"))
    if values.numel() and values.is_floating_point():
        least, most = torch.aminmax(values)
        ends = np.array([least.item(), most.item()], ends.dtype)
    lattice.quantise(ends, step, dead_zone=dead_zone, name=name)  # checks all arguments
    # By a number on the host, CUDA would multiply with the reciprocal: another last bit.
    divisor = torch.tensor(step, dtype=torch.float64, device=values.device)
    wide = values.to(torch.float64).abs().div_(divisor).add_(1 - dead_zone)
    result = wide.floor_().to(torch.int32)
    return torch.where(values < 0, -result, result)


def dequantise(q: torch.Tensor, step: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return what the codec's ``dequantise`` returns, on the device of ``q``.

    Args:
        q: integer tensor of any shape.
        step: lattice step; finite and above zero.
        dtype: float16, float32 or float64.

    Raises:
        QuantiseError: ``q`` is not integer, or ``step`` or ``dtype`` is out of range.

    >>> dequantise(torch.tensor([-2, 0, 3]), 0.5).tolist()
    [-1.0, 0.0, 1.5]
    """
    lattice.dequantise(np.zeros(0, _numpy_dtype(q, "dequantise takes integers")), step)
    if not dtype.is_floating_point or dtype not in _NUMPY:
        raise QuantiseError(f"dequantise gives float16, float32 or float64, not {dtype}")
    factor = torch.tensor(step, dtype=torch.float32, device=q.device)
    dense = (q.to(torch.float32) * factor).to(dtype)  # one IEEE multiplication, two roundings
    # Adding zero turns -0.0 (a negative product that underflowed) into +0.0.
    return dense + 0.0


def _numpy_dtype(tensor: torch.Tensor, takes: str) -> np.dtype[np.generic]:
    if tensor.dtype not in _NUMPY:
        raise QuantiseError(f"a tensor has dtype {tensor.dtype}; {takes}")
    return _NUMPY[tensor.dtype]
