"""Where a payload's bytes go: every byte has a section, and every tensor its share."""

from __future__ import annotations

import numpy as np
import pytest

from prunecast.compression.versions import (
    BadPayload,
    BaseMissing,
    LatticeTensor,
    PublishedModel,
    QuantisedTensor,
    RawTensor,
    draw_like,
    encode_delta,
    encode_keyframe,
    encode_plain,
    encode_update,
    measure_payload,
)

SHAPE = (80, 100)
HEADER = 58  # bytes of a frame without a layout


def model(*, keep: float = 0.1, counter: int = 1) -> PublishedModel:
    rng = np.random.default_rng(1)
    q = rng.integers(5, 60, SHAPE) * rng.choice([-1, 1], SHAPE) * (rng.random(SHAPE) < keep)
    return PublishedModel(
        {
            "w": LatticeTensor(q, 0.5, keep < 1),
            "full": LatticeTensor(rng.integers(1, 9, 300), 0.5),
            "b": RawTensor(rng.normal(size=40).astype(np.float32)),
        },
        counter,
    )


def later(held: PublishedModel, back: int) -> PublishedModel:
    """A version in which `back` pruned places of "w" return, and "full" changes."""
    rng = np.random.default_rng(2)
    q = held["w"].q.astype(np.int32)
    q.reshape(-1)[rng.choice(np.flatnonzero(q.reshape(-1) == 0), back, replace=False)] = -7
    full = held["full"].q + rng.integers(-1, 2, 300).astype(np.int32)
    tensors = {
        "w": LatticeTensor(q, 0.5, True),
        "full": LatticeTensor(full, 0.5),
        "b": held["b"],
    }
    return PublishedModel(tensors, held.counter + 1)


def payloads() -> dict[str, tuple[bytes, PublishedModel | None, set[str]]]:
    held = model()
    drawn, seed = draw_like(model(keep=1), 3)
    arrays = {name: tensor.dense() for name, tensor in held.tensors.items()}
    rng = np.random.default_rng(4)
    z = (rng.integers(-2, 3, SHAPE) * (held["w"].q != 0)).astype(np.int32)
    update = {"w": QuantisedTensor(z, 0.1), "b": arrays["b"] + 1}
    every = set(held.tensors)
    return {
        "keyframe": (encode_keyframe(held), None, every),
        "seeded": (encode_keyframe(drawn, seed=seed), None, {"b"}),
        "delta": (encode_delta(model(keep=1), model(keep=1, counter=2)), model(keep=1), every),
        "under a mask": (encode_delta(held, later(held, 40)), held, every),
        "update": (encode_update(held, update), held, {"w", "b"}),
        "plain": (encode_plain(arrays), None, every),
    }


@pytest.mark.parametrize("name", payloads())
def test_every_byte_has_a_section_and_tensors_sum_to_the_rest(name: str) -> None:
    payload, held, tensors = payloads()[name]
    costs = measure_payload(payload, held=held)
    assert costs.nbytes == sum(costs.sections.values()) == len(payload)
    assert set(costs.tensors) == tensors
    assert costs.sections["frame"] >= HEADER
    assert costs.sections["seed"] == (8 + 8 * 2 if name == "seeded" else 0)
    assert costs.common >= costs.sections["frame"] + costs.sections["seed"]
    of_tensors = sum(cost.nbytes for cost in costs.tensors.values())
    assert costs.common + of_tensors == len(payload)


def test_places_that_come_back_are_their_tensors() -> None:
    held = model()
    few, many = (
        measure_payload(encode_delta(held, later(held, back)), held=held) for back in (0, 40)
    )
    assert many.tensors["w"].nbytes > few.tensors["w"].nbytes + 20
    assert abs(many.tensors["full"].nbytes - few.tensors["full"].nbytes) < 10
    assert many.nbytes - few.nbytes < many.tensors["w"].nbytes + 20


def test_what_it_builds_on_must_be_held() -> None:
    for name in ("under a mask", "update"):
        payload, _, _ = payloads()[name]
        with pytest.raises(BaseMissing):
            measure_payload(payload)


def test_every_truncation_is_refused() -> None:
    for payload, held, _ in payloads().values():
        for length in range(0, len(payload), 1 + len(payload) // 50):
            with pytest.raises(BadPayload):
                measure_payload(payload[:length], held=held)
