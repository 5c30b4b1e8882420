"""The committed vectors: what decodes to exactly these values, and what must be refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import prunecast.compression.codec as codec
from prunecast.compression.codec import Context, TensorSpec, decode, errors
from support.hostile import Plan, hostile

FOLDER = Path(__file__).parent / "vectors"
GOLDEN = sorted(p.stem for p in FOLDER.glob("*.bin"))
HOSTILE = hostile()
MUST_FAIL = sorted(p.stem for p in (FOLDER / "must_fail").glob("*.bin"))


def test_the_vectors_are_there() -> None:
    assert len(GOLDEN) >= 10
    assert len(MUST_FAIL) >= 80


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def part(arrays: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    return {k.partition(":")[2]: v for k, v in arrays.items() if k.startswith(kind + ":")}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    payload = (FOLDER / f"{name}.bin").read_bytes()
    arrays = load(FOLDER / f"{name}.npz")
    tensors = part(arrays, "tensor")
    layout = {k: TensorSpec(v.dtype, v.shape) for k, v in tensors.items()}
    context = Context(
        layout=layout if arrays["layout"] else None,
        mask=part(arrays, "mask") or None,
        previous=part(arrays, "previous") or None,
    )
    decoded = decode(payload, context=context)
    assert list(decoded) == list(tensors)
    for key, value in tensors.items():
        assert decoded[key].dtype == value.dtype
        assert decoded[key].shape == value.shape
        assert decoded[key].tobytes() == value.tobytes()


@pytest.mark.parametrize("name", MUST_FAIL)
def test_must_fail(name: str) -> None:
    payload = (FOLDER / "must_fail" / f"{name}.bin").read_bytes()
    expected = getattr(codec, name.partition("--")[0])
    known = FOLDER / "must_fail" / f"{name}.npz"
    arrays = load(known) if known.exists() else {}
    layout = {k: TensorSpec(v.dtype, v.shape) for k, v in part(arrays, "layout").items()}
    context = Context(
        layout=layout or None,
        mask=part(arrays, "mask") or None,
        previous=part(arrays, "previous") or None,
    )
    with pytest.raises(expected) as caught:
        decode(payload, context=context)
    assert type(caught.value) is expected


def test_every_error_of_the_decoder_has_a_vector() -> None:
    only_when_encoding = {"CodecError", "MaskViolation", "NonFiniteError", "QuantiseError"}
    only_when_encoding.add("UnsupportedShape")
    assert {name.partition("--")[0] for name in MUST_FAIL} == {*errors.__all__} - only_when_encoding


def test_the_starting_point_of_hostile_payloads_decodes() -> None:
    for plan in (Plan(), Plan(serial=True), Plan(serial=True, static=True), Plan(step=3)):
        assert decode(plan.payload())["w"].tolist() == [0, -1, 1, -2]
    sparse = Plan(sparse=True, nonzeros=2, gaps=(0, 1), values=(3, 2))
    for plan in (sparse, replace(sparse, serial=True)):
        assert decode(plan.payload())["w"].tolist() == [2, 0, -2, 0]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_payloads_are_refused_for_their_cause(name: str) -> None:
    payload, says = HOSTILE[name]
    with pytest.raises(getattr(codec, name.partition("--")[0]), match=says):
        decode(payload)
    assert name in MUST_FAIL
