import dataclasses

import numpy as np
import pytest

from prunecast.compression.versions import (
    BadPayload,
    DigestMismatch,
    InvalidModel,
    Kind,
    LatticeTensor,
    PublishedModel,
    RawTensor,
    VersionsError,
    decode_model,
    draw_like,
    encode_keyframe,
    inspect,
)
from prunecast.compression.versions.seeded import Draw, draw


def fresh(seed=0):
    rng = np.random.default_rng(seed)
    return PublishedModel(
        {
            "w": LatticeTensor(rng.integers(-8, 9, (300, 200)), 0.01),
            "bias": LatticeTensor(np.zeros(300, np.int32), 0.001),
            "norm": LatticeTensor(np.full(64, 5000), 0.0002),
            "mean": RawTensor(np.zeros(64, np.float32)),
        }
    )


def test_the_generator_is_splitmix64():
    # outputs of SplitMix64 from the state that SHA-256 gives for seed 0 and name "w", by the
    # published recurrence in plain integers
    import hashlib

    state = int.from_bytes(hashlib.sha256(b"\0" * 8 + b"w").digest()[:8], "little")
    expected = []
    for _ in range(20):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        z ^= z >> 31
        expected.append((((z >> 32) * 17) >> 32) - 8 + 3)
    assert draw((4, 5), Draw(3, 8), 0, "w").ravel().tolist() == expected


def test_a_drawn_model_travels_as_its_seed():
    model, seed = draw_like(fresh(), 42)
    payload = encode_keyframe(model, stream=b"s", seed=seed)
    assert inspect(payload).kind is Kind.SEEDED
    assert len(payload) < 400
    assert decode_model(payload, stream=b"s").digest == model.digest


def test_mean_and_spread_are_those_of_the_original():
    model, _ = draw_like(fresh(), 1)
    q = model["w"].q.astype(float)
    assert abs(q.mean()) < 0.1
    assert q.std() == pytest.approx(fresh()["w"].q.std(), rel=0.03)
    assert len(np.unique(q)) == 17
    assert not model["bias"].q.any()
    assert np.all(model["norm"].q == 5000)


def test_seeds_differ_and_repeat():
    digests = {draw_like(fresh(), seed)[0].digest for seed in (1, 2, 3, 2**64 - 1)}
    assert len(digests) == 4
    assert draw_like(fresh(), 1)[0].digest in digests


def test_a_large_tensor_is_drawn_in_blocks_like_in_one():
    whole = draw((3_000_000,), Draw(0, 100), 5, "w")
    assert abs(float(whole.mean())) < 0.2
    assert whole.min() == -100
    assert whole.max() == 100
    assert not np.array_equal(whole[: 1 << 20], whole[1 << 20 : 2 << 20])


def test_a_wrong_seed_is_noticed():
    model, seed = draw_like(fresh(), 42)
    forged = encode_keyframe(model, seed=dataclasses.replace(seed, seed=43))
    with pytest.raises(DigestMismatch):
        decode_model(forged)


def test_damage_is_refused():
    model, seed = draw_like(fresh(), 42)
    payload = encode_keyframe(model, seed=seed)
    for position in range(0, len(payload), 3):
        damaged = bytearray(payload)
        damaged[position] ^= 0x80
        with pytest.raises(VersionsError):
            decode_model(bytes(damaged))


def test_a_few_bytes_cannot_demand_gigabytes():
    from prunecast.compression.versions import frame, layout

    tensor = LatticeTensor(np.zeros((2, 2), np.int32), 1.0)
    heads = layout.pack_heads({"w": tensor}).replace(
        (2).to_bytes(8, "little") * 2, (2**20).to_bytes(8, "little") * 2
    )
    payload = frame.pack(Kind.SEEDED, b"", 0, b"\1" * 16, layout=heads, body=b"\0" * 16)
    with pytest.raises(BadPayload, match="limits"):
        decode_model(payload)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(InvalidModel, match="seed"):
        draw_like(fresh(), seed)


def test_a_pruned_model_is_not_fresh():
    pruned = PublishedModel({"w": LatticeTensor(np.eye(3, dtype=np.int32), 1.0, True)})
    with pytest.raises(InvalidModel, match="pruned"):
        draw_like(pruned, 0)
