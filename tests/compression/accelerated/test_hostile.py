"""Whatever the bytes: the tensors or the error that the codec in numpy gives."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import oracle
from fuzz.grammar import generate
from fuzz.oracle import CONTEXTS, Mode
from prunecast.compression import accelerated
from prunecast.compression.accelerated import decoder
from prunecast.compression.codec import Context, LimitExceeded, Limits, MalformedPayload, encode
from prunecast.compression.codec.container.head import write_specs
from prunecast.compression.codec.container.wire import seal
from prunecast.compression.codec.context import TensorSpec
from prunecast.compression.codec.encoder import encode_body
from prunecast.compression.codec.engine import Engine
from prunecast.compression.codec.entropy.adaptive import AdaptiveEncoder
from prunecast.compression.codec.modelling.fields import fields_of
from support.accelerated import assert_same_outcome
from support.codec_cases import cases, forced
from support.devices import on_every_device

TIGHT = Limits(
    elements=1 << 18, decoded_bytes=1 << 20, levels=1 << 12, serial_symbols=1 << 15, steps=1 << 13
)


def reseal(payload: bytes) -> bytes:
    return payload[:-4] + zlib.crc32(payload[:-4]).to_bytes(4, "little")


def samples() -> list[tuple[bytes, Context]]:
    """Payloads of every kind, also with lane segments and neighbour contexts forced upon them."""
    found = []
    for tensors, context in cases().values():
        for lanes, depth in ((False, None), (True, None), (True, 2)):
            with forced(lanes=lanes, depth=depth):
                found.append((encode(tensors, context=context), context))
    return found


SAMPLES = samples()


@on_every_device
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutated_payloads(device: str, data: st.DataObject) -> None:
    payload, context = data.draw(st.sampled_from(SAMPLES))
    mutated = bytearray(payload)
    near = st.integers(6, max(6, min(len(payload) - 5, 300)))
    anywhere = st.integers(6, len(payload) - 5)
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(near | anywhere)] = data.draw(st.integers(0, 255))
    assert_same_outcome(reseal(bytes(mutated)), context, device, TIGHT)


@on_every_device
def test_the_fuzzers_corpus(device: str) -> None:
    inputs = sorted((Path(oracle.__file__).parent / "corpus").iterdir())
    assert len(inputs) > 100
    for path in inputs:
        data = path.read_bytes()
        mode = Mode.of(data[0])
        assert_same_outcome(data[1:], CONTEXTS[mode.context], device, mode.limits)


@on_every_device
def test_payloads_made_by_the_fuzzers_grammar(device: str) -> None:
    for seed in range(800):
        context = CONTEXTS[seed % len(CONTEXTS)]
        limits = oracle.TIGHT if seed % 3 else None
        assert_same_outcome(generate(random.Random(seed), context), context, device, limits)


@on_every_device
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=64))
def test_arbitrary_bytes(device: str, data: bytes) -> None:
    assert_same_outcome(data, None, device)
    assert_same_outcome(seal(Context(), data, b""), None, device, TIGHT)


@on_every_device
@pytest.mark.parametrize("index", range(0, len(SAMPLES), 4))
def test_every_truncation_is_refused(device: str, index: int) -> None:
    payload, context = SAMPLES[index]
    for cut in {*range(min(len(payload), 40)), *range(0, len(payload), 997), len(payload) - 1}:
        assert_same_outcome(payload[:cut], context, device)


@on_every_device
@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("payload_bytes", 20),
        ("tensors", 1),
        ("name_bytes", 3),
        ("dimensions", 1),
        ("elements", 1000),
        ("decoded_bytes", 1000),
        ("levels", 10),
        ("lanes", 1),
        ("segments", 1),
        ("steps", 100),
    ],
)
def test_each_limit_is_named(device: str, limit: str, value: int) -> None:
    rng = np.random.default_rng(1)
    w = rng.laplace(size=(200, 300)) * np.exp(rng.normal(size=(200, 1)) * 2)
    payload = encode({"first": np.rint(w * 5).astype(np.int32), "second": np.ones(5, np.int8)})
    with pytest.raises(LimitExceeded, match=limit):
        accelerated.decode(payload, limits=Limits(**{limit: value}), device=device)


@on_every_device
def test_serial_symbols_limit(device: str) -> None:
    payload = encode({"w": np.arange(100)})
    with pytest.raises(LimitExceeded, match="serial_symbols"):
        accelerated.decode(payload, limits=Limits(serial_symbols=50), device=device)


@on_every_device
def test_the_first_of_several_errors_is_raised(device: str) -> None:
    """Groups are decoded together, yet the error is that of the first one, as in numpy."""
    rng = np.random.default_rng(2)
    tensors = {f"t{i}": np.rint(rng.laplace(size=(300, 600)) * 4).astype("i4") for i in range(3)}
    payload = bytearray(encode(tensors))
    limits = Limits(steps=400)  # enough for the first tensor alone
    with pytest.raises(LimitExceeded):
        accelerated.decode(bytes(payload), limits=limits, device=device)
    assert_same_outcome(bytes(payload), None, device, limits)
    payload[len(payload) // 6] ^= 255  # in the first tensor's segment
    with pytest.raises(MalformedPayload):
        accelerated.decode(reseal(bytes(payload)), limits=limits, device=device)
    assert_same_outcome(reseal(bytes(payload)), None, device, limits)


@on_every_device
@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i4", "i8"])
def test_values_beyond_the_width(device: str, dtype: str, lanes: bool) -> None:
    """Payloads of a sender that puts more into a field than its dtype holds."""
    specs = {"v": TensorSpec(np.dtype(dtype), (300,)), "w": TensorSpec(np.dtype("i8"), (300,))}
    rng = np.random.default_rng(5)
    for top in (1, 2, 200, 2**16, 2**31 - 1):
        coder = AdaptiveEncoder()
        write_specs(coder, specs)
        values = rng.integers(-top, top, 300, dtype=np.int32, endpoint=True)
        if dtype == "i8":
            values = values.astype(np.int64)
        fields = [f for group in fields_of(specs, Context()).values() for f in group]
        with forced(lanes=lanes):
            rest, _ = encode_body(coder, fields, [values, values.astype(np.int64) << 31], Engine())
        assert_same_outcome(seal(Context(), coder.finish(), rest), None, device)


def test_memory_that_is_not_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with forced(lanes=True):
        payload = encode({"w": np.arange(-9000, 9000).reshape(90, 200) // 100})
    monkeypatch.setattr(decoder, "read_segments", fail)
    with pytest.raises(LimitExceeded, match="memory"):
        accelerated.decode(payload, device="cpu")
