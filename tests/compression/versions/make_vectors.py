"""Makes the golden vectors of the frames; run by hand when a new major version is born.

    python tests/compression/versions/make_vectors.py

Tests only read what is committed. A vector is a payload and, where it needs one, the name of the
payload that makes its base; `expected.json` holds what must come out.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from prunecast.compression.codec import TensorSpec
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    QuantisedTensor,
    RawTensor,
    ReplyTensor,
    draw_like,
    encode_delta,
    encode_keyframe,
    encode_plain,
    encode_update,
)

FOLDER = Path(__file__).parent / "vectors"
STREAM = b"golden/arrays"


def version(counter: int, *, step: float, shift: int) -> PublishedModel:
    """A small model in integer arithmetic only, so that it is the same on every machine."""
    index = np.arange(24 * 16, dtype=np.int64)
    weight = ((index * 7919 + shift * 104729) % 41 - 20).reshape(24, 16)
    weight[np.abs(weight) < 12] = 0
    bias = (np.arange(24, dtype=np.int64) * 31 + shift) % 300 - 150
    statistics = ((np.arange(8) * 5 + shift) % 13).astype(np.float32) / np.float32(8)
    return PublishedModel(
        {
            "weight": LatticeTensor(weight, step, True),
            "bias": LatticeTensor(bias, 0.0078125),
            "norm.running_mean": RawTensor(statistics),
            "norm.num_batches_tracked": RawTensor(np.array(counter, np.int64)),
            "empty": RawTensor(np.zeros((0, 2), np.float64)),
        },
        counter,
    )


def main() -> None:
    """Write every vector and `expected.json`."""
    first = version(1, step=0.25, shift=0)
    second = version(9, step=0.125, shift=3)
    drawn, seed = draw_like(PublishedModel({"w": LatticeTensor(np.arange(-9, 9), 0.5)}, 1), 2026)
    z = (np.arange(24 * 16).reshape(24, 16) % 5 - 2) * second.masks()["weight"]
    update = {
        "weight": QuantisedTensor(z.astype(np.int32), 0.03125),
        "norm.running_mean": np.arange(8, dtype=np.float32),
    }
    tensors = {
        "text": ReplyTensor(None),
        "bias": ReplyTensor(TensorSpec(np.dtype("f8"), (24,)), "bias"),
        "gradient": ReplyTensor(TensorSpec(np.dtype("f4"), (24, 16)), "weight"),
        "norm.num_batches_tracked": ReplyTensor(
            TensorSpec(np.dtype("i2"), ()), "norm.num_batches_tracked"
        ),
        "logits": ReplyTensor(TensorSpec(np.dtype("f2"), (5, 3))),
        "silent": ReplyTensor(TensorSpec(np.dtype("f4"), (2, 2))),
    }
    reply = {
        "bias": QuantisedTensor(np.arange(24, dtype=np.int32) % 3 - 1, 0.5),
        "gradient": QuantisedTensor(
            (np.arange(24 * 16).reshape(24, 16) % 7 - 3).astype(np.int32), 0.0625, True
        ),
        "norm.num_batches_tracked": np.array(12, np.int16),
        "logits": np.arange(15).reshape(5, 3).astype(np.float16),
    }
    plain = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False])}
    payloads = {
        "keyframe": encode_keyframe(first, stream=STREAM),
        "delta": encode_delta(first, second, stream=STREAM),
        "seeded": encode_keyframe(drawn, stream=STREAM, seed=seed),
        "update": encode_update(second, update, stream=STREAM),
        "reply": encode_update(second, reply, stream=STREAM, tensors=tensors),
        "plain": encode_plain(plain, stream=STREAM),
    }
    FOLDER.mkdir(exist_ok=True)
    for name, payload in payloads.items():
        (FOLDER / f"{name}.bin").write_bytes(payload)
    expected = {
        "stream": STREAM.decode(),
        "keyframe": {"digest": first.digest.hex(), "counter": 1},
        "delta": {"digest": second.digest.hex(), "counter": 9, "base": "keyframe"},
        "seeded": {"digest": drawn.digest.hex(), "counter": 1, "q": drawn["w"].q.tolist()},
        "update": {
            "base": "delta",
            "weight_sum": int(z.sum()),
            "weight_nonzero": int((z != 0).sum()),
        },
        "reply": {
            "base": "delta",
            "tensors": list(tensors),
            "bias": (np.arange(24) % 3 * 0.5 - 0.5).tolist(),
            "gradient": ((np.arange(24 * 16) % 7 - 3) * 0.0625).tolist(),
            "norm.num_batches_tracked": 12,
            "logits": reply["logits"].tolist(),
            "silent": [[0, 0], [0, 0]],
        },
        "plain": {name: array.tolist() for name, array in plain.items()},
    }
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
