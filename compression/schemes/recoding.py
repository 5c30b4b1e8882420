"""``coding="prunecast"``: a scheme's arrays as one payload of `prunecast.compression.codec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import CodecError, Context, Limits, TensorSpec, decode, encode
from prunecast.compression.codec import LimitExceeded as CodecLimitExceeded

from .errors import LimitExceeded, MalformedPayload
from .layout import Layout

__all__ = ["coded", "decoded"]


def coded(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays as a payload of the codec, their names, dtypes and shapes left out."""
    plain = {str(i): array for i, array in enumerate(arrays.values())}
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in plain.items()}
    return encode(plain, context=Context(layout=specs))


def decoded(data: bytes, layout: Layout, dtype: str, limits: Limits) -> dict[str, NDArray[Any]]:
    """Inverse of `coded`, for arrays of one dtype.

    Raises:
        MalformedPayload: the codec refuses the bytes.
        LimitExceeded: a limit of the codec is passed.
    """
    specs = {str(i): TensorSpec(np.dtype(dtype), shape) for i, shape in enumerate(layout.values())}
    try:
        arrays = decode(data, context=Context(layout=specs), limits=limits)
    except CodecLimitExceeded as error:
        raise LimitExceeded(str(error)) from error
    except CodecError as error:
        raise MalformedPayload(f"the codec cannot read the body: {error}") from error
    return dict(zip(layout, arrays.values(), strict=True))
