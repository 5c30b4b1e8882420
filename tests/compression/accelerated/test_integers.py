"""Unsigned 64-bit arithmetic on int64 tensors, and the packing of raw bits, against Python's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunecast.compression.accelerated import integers, rawbits
from prunecast.compression.codec import MalformedPayload
from prunecast.compression.codec.entropy.rawbits import pack_bits, unpack_bits
from prunecast.compression.codec.entropy.tokens import bit_length_minus_one
from support.devices import on_every_device

UINT64 = st.integers(0, 2**64 - 1) | st.integers(0, 64).map(lambda k: min(2**k, 2**64 - 1))


def as_tensor(values: list[int], device: str) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.uint64).view(np.int64)).to(device)


def as_integers(tensor: torch.Tensor) -> list[int]:
    found: list[int] = tensor.cpu().numpy().view(np.uint64).tolist()
    return found


@on_every_device
@settings(deadline=None)
@given(values=st.lists(st.tuples(UINT64, st.integers(0, 63)), min_size=1, max_size=20))
def test_right_shifts_let_zeros_in(device: str, values: list[tuple[int, int]]) -> None:
    x = as_tensor([v for v, _ in values], device)
    counts = torch.tensor([s for _, s in values], device=device)
    assert as_integers(integers.shifted_right(x, counts)) == [v >> s for v, s in values]
    for s in (0, 1, 22, 32, 63):
        assert as_integers(integers.shifted_right(x, s)) == [v >> s for v, _ in values]


@on_every_device
@settings(deadline=None)
@given(values=st.lists(UINT64, min_size=1, max_size=20))
def test_exponent_largest_and_zigzag(device: str, values: list[int]) -> None:
    x = as_tensor(values, device)
    assert integers.unsigned_max(x) == max(values)
    signed = integers.signed(x)
    assert signed.tolist() == [-(v >> 1) - 1 if v & 1 else v >> 1 for v in values]
    assert as_integers(integers.zigzag(signed)) == values
    some = [v for v in values if v]
    exact = [v.bit_length() - 1 for v in some]
    assert integers.exponent(as_tensor(some, device)).tolist() == exact
    assert bit_length_minus_one(np.array(some, np.uint64)).tolist() == exact


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@given(values=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_wrapping_is_numpys(width: int, values: list[int]) -> None:
    expected = np.array(values).astype(f"i{width // 8}").tolist()
    assert integers.wrapped(torch.tensor(values), width).tolist() == expected


@on_every_device
@settings(deadline=None)
@given(fields=st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 63)), max_size=40))
def test_bits_are_packed_as_the_codec_packs_them(
    device: str, fields: list[tuple[int, int]]
) -> None:
    widths = np.array([w for _, w in fields], np.int64)
    values = np.array([v & (1 << w) - 1 for v, w in fields], np.uint64)
    packed = rawbits.pack(
        torch.from_numpy(values.view(np.int64)).to(device), torch.from_numpy(widths).to(device)
    )
    assert packed == pack_bits(values, widths)
    read = rawbits.unpack(packed, torch.from_numpy(widths).to(device))
    assert as_integers(read) == values.tolist() == unpack_bits(packed, widths).tolist()
    with pytest.raises(MalformedPayload):
        rawbits.unpack(packed + b"\0", torch.from_numpy(widths).to(device))
