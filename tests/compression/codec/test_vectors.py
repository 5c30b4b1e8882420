"""The committed vectors: what decodes to exactly these values, and what must be refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import prunecast.compression.codec as codec
from prunecast.compression.codec import Context, TensorSpec, decode

FOLDER = Path(__file__).parent / "vectors"
GOLDEN = sorted(p.stem for p in FOLDER.glob("*.bin"))
MUST_FAIL = sorted(p.stem for p in (FOLDER / "must_fail").glob("*.bin"))


def test_the_vectors_are_there() -> None:
    assert len(GOLDEN) >= 10
    assert len(MUST_FAIL) >= 20


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    payload = (FOLDER / f"{name}.bin").read_bytes()
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}

    def part(kind: str) -> dict[str, np.ndarray]:
        return {k.partition(":")[2]: v for k, v in arrays.items() if k.startswith(kind + ":")}

    tensors = part("tensor")
    layout = {k: TensorSpec(v.dtype, v.shape) for k, v in tensors.items()}
    context = Context(
        layout=layout if arrays["layout"] else None,
        mask=part("mask") or None,
        previous=part("previous") or None,
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
    with pytest.raises(expected) as caught:
        decode(payload)
    assert type(caught.value) is expected
