"""Deep gradient compression against the equations of Lin et al. 2018, in plain loops."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest

from prunecast.compression.schemes.layout import layout_of
from prunecast.compression.schemes.registry import inspect
from prunecast.compression.schemes.sparse import TopK


def gradients(step: int, size: int = 40) -> list[float]:
    return [float(x) for x in np.random.default_rng(100 + step).normal(size=size).astype("f4")]


def largest(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize("coding", ["paper", "prunecast"])
def test_accumulation_correction_and_masking(momentum: float, masking: bool, coding: str) -> None:
    """u = m u + g; v = v + u; send the largest of v; clear v, and u with masking (eq. 7)."""
    topk = TopK(density=0.1, momentum=momentum, factor_masking=masking, coding=coding)
    state = topk.init({"w": (40,)})
    u, v = [0.0] * 40, [0.0] * 40
    for step in range(10):
        g = gradients(step)
        payload, state = topk.encode({"w": np.float32(g)}, state, key=0)
        for i in range(40):
            u[i] = momentum * u[i] + g[i]
            v[i] = v[i] + u[i]
        sent = [0.0] * 40
        for i in largest(v, 4):
            sent[i], v[i] = v[i], 0.0
            if masking:
                u[i] = 0.0
        np.testing.assert_allclose(topk.decode(payload)["w"], sent, rtol=1e-5)
        np.testing.assert_allclose(state.buffers["residual"]["w"], v, rtol=1e-4, atol=1e-5)
        if momentum:
            np.testing.assert_allclose(state.buffers["velocity"]["w"], u, rtol=1e-4, atol=1e-5)
        else:
            assert set(state.buffers) == {"residual"}


def test_masking_changes_what_follows() -> None:
    payloads = []
    for masking in (True, False):
        topk = TopK(density=0.1, momentum=0.9, factor_masking=masking)
        state = topk.init({"w": (40,)})
        sent = []
        for step in range(10):
            payload, state = topk.encode({"w": np.float32(gradients(step))}, state, key=0)
            sent.append(payload)
        payloads.append(sent)
    assert payloads[0][0] == payloads[1][0]
    assert payloads[0] != payloads[1]


def test_momentum_correction_equals_dense_momentum_when_everything_is_sent() -> None:
    """Density 1 without masking: what is sent is u of equation 3, step by step."""
    topk = TopK(density=1.0, momentum=0.9, factor_masking=False)
    state = topk.init({"w": (40,)})
    u = np.zeros(40)
    for step in range(5):
        payload, state = topk.encode({"w": np.float32(gradients(step))}, state, key=0)
        u = 0.9 * u + gradients(step)
        np.testing.assert_allclose(topk.decode(payload)["w"], u, rtol=1e-4, atol=1e-5)


def test_without_accumulation_nothing_is_kept() -> None:
    topk = TopK(density=0.25, accumulate=False)
    state = topk.init({"w": (4,)})
    for _ in range(2):
        payload, state = topk.encode({"w": np.float32([1, 2, 3, -4])}, state, key=0)
        assert topk.decode(payload)["w"].tolist() == [0, 0, 0, -4]
    assert state.buffers == {}


def test_each_tensor_is_ranked_by_itself_or_all_together() -> None:
    tensors = {"a": np.float32([9, 8, 7, 6]), "b": np.float32([1, 2, 3, 4])}
    for scope, expected in (
        ("tensor", [9, 8, 0, 0, 0, 0, 3, 4]),
        ("payload", [9, 8, 7, 6] + [0] * 4),
    ):
        topk = TopK(density=0.5, scope=scope)
        payload, _ = topk.encode(tensors, topk.init(layout_of(tensors)), key=0)
        decoded = topk.decode(payload)
        assert [*decoded["a"].tolist(), *decoded["b"].tolist()] == expected


def test_clipping_is_local_over_all_tensors_and_before_the_sum() -> None:
    """Norm 5 of (3, 4); the threshold 4 of all is 4 / sqrt(4) = 2 of each of 4 nodes."""
    topk = TopK(density=1.0, clip=4.0, nodes=4)
    tensors = {"a": np.float32([3]), "b": np.float32([4])}
    payload, state = topk.encode(tensors, topk.init(layout_of(tensors)), key=0)
    decoded = topk.decode(payload)
    np.testing.assert_allclose([decoded["a"][0], decoded["b"][0]], [1.2, 1.6], rtol=1e-6)
    small = {"a": np.float32([0.3]), "b": np.float32([0.4])}
    payload, _ = topk.encode(small, state, key=0)
    assert topk.decode(payload)["a"][0] == np.float32(0.3)


def test_warm_up_is_the_papers() -> None:
    """75 %, 93.75 %, 98.4375 %, 99.6 %, 99.9 % sparsity (section 4.1)."""
    topk = TopK(density=0.001, warmup=5)
    sparsity = [100 * (1 - topk.density_at(step)) for step in range(7)]
    np.testing.assert_allclose(sparsity[:5], [75, 93.75, 98.4375, 99.6, 99.9], atol=0.2)
    assert sparsity[5:] == [sparsity[4]] * 2
    state = topk.init({"w": (1000,)})
    sent = []
    for step in range(6):
        payload, state = topk.encode({"w": np.float32(gradients(step, 1000))}, state, key=0)
        sent.append(np.count_nonzero(topk.decode(payload)["w"]))
    assert sent == [251, 63, 16, 4, 1, 1]


def body_by_hand(flat: list[float]) -> bytes:
    """16-bit run lengths of zeros, then 32-bit values (section 3.1)."""
    runs, values, run = b"", b"", 0
    entries = 0
    for x in flat:
        if x:
            runs, values, run = runs + struct.pack("<H", run), values + struct.pack("<f", x), 0
            entries += 1
            continue
        run += 1
        if run == 65535:
            runs, run = runs + struct.pack("<H", run), 0
            entries += 1
    last = max((i for i, x in enumerate(flat) if x), default=-1)
    # zeros after the last value need no runs
    surplus = (len(flat) - 1 - last) // 65535
    runs = runs[: len(runs) - 2 * surplus]
    return struct.pack("<Q", entries - surplus) + runs + values


@pytest.mark.parametrize(
    "positions", [[], [0], [3, 4, 9], [65534], [65535], [65536, 131072, 199999]]
)
def test_bytes_are_run_lengths_and_values(positions: list[int]) -> None:
    flat = np.zeros(200_000, np.float32)
    flat[positions] = np.arange(1, len(positions) + 1)
    topk = TopK(density=0.01)
    payload, _ = topk.encode({"w": flat}, topk.init({"w": (200_000,)}), key=0)
    body = payload[inspect(payload).head_bytes - 4 : -4]
    assert body == bytes([0, 32]) + body_by_hand(flat.tolist())
    assert np.array_equal(topk.decode(payload)["w"], flat)


@pytest.mark.parametrize("coding", ["paper", "prunecast"])
def test_values_of_8_bits(coding: str) -> None:
    tensors: dict[str, Any] = {"w": np.float32([12.7, 0.31, -6.37, 0.06, 0.01, 3])}
    topk = TopK(density=0.5, value_bits=8, coding=coding)
    payload, state = topk.encode(tensors, topk.init({"w": (6,)}), key=0)
    np.testing.assert_allclose(topk.decode(payload)["w"], [12.7, 0, -6.4, 0, 0, 3.0], atol=1e-5)
    assert math.isclose(state.buffers["residual"]["w"][2], 0.03, abs_tol=1e-5)  # rounding is kept
    assert math.isclose(state.buffers["residual"]["w"][1], 0.31, abs_tol=1e-6)
