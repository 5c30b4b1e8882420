"""Deltas of mostly zero models: under the mask, and the places that come back."""

import struct
import tracemalloc

import numpy as np
import pytest

from prunecast.compression.codec import Context, TensorSpec, encode
from prunecast.compression.versions import (
    BadPayload,
    LatticeTensor,
    PublishedModel,
    RawTensor,
    decode_model,
    encode_delta,
    frame,
)

SHAPE = (80, 100)


def sparse(seed, *, keep=0.1, step=0.5, counter=1):
    rng = np.random.default_rng(seed)
    q = rng.integers(5, 60, SHAPE) * rng.choice([-1, 1], SHAPE) * (rng.random(SHAPE) < keep)
    return PublishedModel(
        {
            "w": LatticeTensor(q, step),
            "full": LatticeTensor(rng.integers(1, 9, 300), step),
            "b": RawTensor(rng.normal(size=40).astype(np.float32)),
        },
        counter,
    )


def moved(held, *, back, dropped=0, step=None):
    """The held version with small changes under the mask, `back` places more and some fewer."""
    rng = np.random.default_rng(9)
    old = held["w"].q.astype(np.int32)
    new = (old + rng.integers(-1, 2, SHAPE)) * (old != 0)
    flat = new.reshape(-1)
    flat[rng.choice(np.flatnonzero(flat), dropped, replace=False)] = 0
    flat[rng.choice(np.flatnonzero(old.reshape(-1) == 0), back, replace=False)] = -7
    tensors = {**held.tensors, "w": LatticeTensor(new, step or held["w"].step)}
    return PublishedModel(tensors, held.counter + 1)


def flags_of(payload):
    return frame.unpack(payload, stream=None).layout


@pytest.mark.parametrize(
    ("back", "dropped", "step"),
    [(0, 0, None), (30, 30, None), (1, 0, None), (40, 0, 0.25), (40, 10, 1.0), (40, 10, 0.3)],
)
def test_changes_of_a_mask_are_exact(back, dropped, step):
    held = sparse(1)
    new = moved(held, back=back, dropped=dropped, step=step)
    payload = encode_delta(held, new)
    assert decode_model(payload, held=held).digest == new.digest
    predicted = step != 0.3  # no power of two apart
    assert bool(flags_of(payload)[:1] and flags_of(payload)[0] & 8) is predicted


def test_the_mask_costs_nothing_and_saves_bytes():
    held = sparse(1, keep=0.05)
    new = moved(held, back=0)
    kept = int(np.count_nonzero(held["w"].q))
    raw = len(encode_delta(held, held))
    # three equally likely changes of each kept weight take log2(3) bits
    assert len(encode_delta(held, new)) - raw < 1.1 * np.log2(3) * kept / 8 + 40


def test_a_dense_model_and_a_model_that_fills_up_have_no_mask():
    dense = sparse(1, keep=0.6)
    assert flags_of(encode_delta(dense, moved(dense, back=10))) == b""
    held, new = sparse(1), sparse(2, keep=0.5)
    payload = encode_delta(held, new)
    assert flags_of(payload) == b""
    assert decode_model(payload, held=held).digest == new.digest


def test_names_that_look_like_lists_of_places_do_no_harm():
    held = sparse(1)
    tensors = {**held.tensors, "w\0places": RawTensor(np.arange(3))}
    held = PublishedModel(tensors, 1)
    new = moved(held, back=20)
    assert decode_model(encode_delta(held, new), held=held).digest == new.digest


def forged(held, places, values, *, flags=b"\x08\0\0", count=None, mask=None):
    """A delta whose list of places is not what an encoder would write."""
    specs = {
        "w": TensorSpec(np.int32, SHAPE),
        "w\0places": TensorSpec(np.int32, (len(places),)),
        "w\0values": TensorSpec(np.int32, (len(places),)),
        "full": TensorSpec(np.int32, (300,)),
        "b": TensorSpec(np.float32, (40,)),
    }
    arrays = {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items()}
    arrays["w\0places"][:], arrays["w\0values"][:] = places, values
    arrays["b"] = held["b"].values
    known = {"w": held["w"].q, "full": held["full"].q, "b": held["b"].values}
    context = Context(layout=specs, mask={"w": held["w"].q != 0}, previous=known)
    count = len(places) if count is None else count
    layout = flags + struct.pack("<I", count)
    return frame.pack(
        frame.Kind.DELTA,
        b"",
        2,
        bytes(32),
        base=held.digest,
        layout=layout,
        body=encode(arrays, context=context),
    )


def test_places_that_cannot_come_back_are_refused():
    held = sparse(1)
    kept = int(np.flatnonzero(held["w"].q)[0])
    size = held["w"].q.size
    for places, values in (
        ([kept], [5]),  # kept already
        ([size], [5]),  # past the end
        ([3, -5], [5, 5]),  # backwards
        ([int(np.flatnonzero(held["w"].q == 0)[0])], [0]),  # back as zero
    ):
        with pytest.raises(BadPayload, match="come back"):
            decode_model(forged(held, places, values), held=held)


def test_masks_of_what_is_not_known_and_impossible_counts_are_refused():
    held = sparse(1)
    with pytest.raises(BadPayload, match="more places"):
        decode_model(forged(held, [0], [5], count=2**32 - 1), held=held)
    with pytest.raises(BadPayload, match="cannot make this change"):
        decode_model(forged(held, [0], [5], flags=b"\0\0\x08"), held=held)
    moved_away = b"\x09\0\0" + struct.pack("<f", 0.3)
    with pytest.raises(BadPayload, match="nothing that is known"):
        decode_model(forged(held, [0], [5], flags=moved_away), held=held)


def test_names_that_look_like_lists_of_places_are_refused_under_a_mask():
    held = sparse(1)
    empty = {
        f"w\0{what}": LatticeTensor(np.zeros(0, np.int8), 0.5) for what in ("places", "values")
    }
    named = PublishedModel({**held.tensors, **empty}, 1)
    specs = {name: TensorSpec(np.int32, tensor.shape) for name, tensor in named.tensors.items()}
    specs["b"] = TensorSpec(np.float32, (40,))
    known = {n: t.q if isinstance(t, LatticeTensor) else t.values for n, t in named.tensors.items()}
    arrays = {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items()}
    context = Context(layout=specs, mask={"w": held["w"].q != 0}, previous=known)
    payload = frame.pack(
        frame.Kind.DELTA,
        b"",
        2,
        bytes(32),
        base=named.digest,
        layout=b"\x08\0\0\0\0" + struct.pack("<I", 5),
        body=encode(arrays, context=context),
    )
    with pytest.raises(BadPayload, match="names of tensors"):
        decode_model(payload, held=named)


def test_a_payload_of_the_former_format_is_refused_and_says_why():
    payload = bytearray(encode_delta(sparse(1), sparse(1)))
    payload[3] = 1
    with pytest.raises(BadPayload, match="make it again"):
        decode_model(bytes(payload), held=sparse(1))
    payload[3] = 3
    with pytest.raises(BadPayload, match="update this side"):
        decode_model(bytes(payload), held=sparse(1))


@pytest.mark.parametrize("keep", [1.0, 0.1])
def test_applying_holds_no_wide_copy_of_the_model(keep):
    rng = np.random.default_rng(0)
    shape = (512, 288)
    held, new = {}, {}
    for i in range(16):
        q = rng.integers(1, 90, shape, np.int8) * (rng.random(shape) < keep)
        held[f"w{i}"] = LatticeTensor(q, 0.01)
        new[f"w{i}"] = LatticeTensor(q + rng.integers(0, 2, shape) * (q != 0), 0.01)
    base, model = PublishedModel(held), PublishedModel(new, 1)
    payload = encode_delta(base, model)
    tracemalloc.start()
    try:
        back = decode_model(payload, held=base)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert back.digest == model.digest
    # the model in int8, its mask, what the codec keeps of one group; int32 alone would be four
    assert peak < 3.9 * sum(tensor.q.size for tensor in held.values())
