"""Both codecs side by side: the one in numpy is the reference of the one in torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from prunecast.compression import accelerated, codec
from prunecast.compression.accelerated import encoder
from prunecast.compression.codec import CodecError, Context, Limits

__all__ = ["assert_same_bytes", "assert_same_outcome", "tensors_of"]


def tensors_of(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The same values in torch."""
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def assert_same_bytes(arrays: Mapping[str, Any], context: Context | None, device: str) -> bytes:
    """Encode with both, which must agree, and decode with both; return the payload."""
    payload = codec.encode(arrays, context=context)
    tensors = {name: tensor.to(device) for name, tensor in tensors_of(arrays).items()}
    for most in (encoder._SMALL, 0):  # small fields are planned in numpy, unless none is small
        with mock.patch.object(encoder, "_SMALL", most):
            made = accelerated.encode(tensors, context=context, device=device)
        assert made == payload
    for name, tensor in tensors.items():  # which the encoder reads in place
        assert tensor.cpu().numpy().tobytes() == np.asarray(arrays[name]).tobytes()
    assert_same_outcome(payload, context, device)
    return payload


def assert_same_outcome(
    payload: bytes, context: Context | None, device: str, limits: Limits | None = None
) -> None:
    """Decode with both: the same tensors, or an error of the same class."""
    refused: CodecError | None = None
    try:
        expected = codec.decode(payload, context=context, limits=limits)
    except CodecError as error:
        refused = error
    if refused is not None:
        with pytest.raises(CodecError) as caught:
            accelerated.decode(payload, context=context, limits=limits, device=device)
        assert type(caught.value) is type(refused), (caught.value, refused)
        # Nothing may reach a GPU that it would stumble over: there, that is no exception.
        if refused.__cause__ is None:
            assert caught.value.__cause__ is None
        return
    decoded = accelerated.decode(payload, context=context, limits=limits, device=device)
    assert list(decoded) == list(expected)
    for name, array in expected.items():
        assert decoded[name].device.type == torch.device(device).type
        found = decoded[name].cpu().numpy()
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
