"""The codec's committed vectors, decoded and encoded on a device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import prunecast.compression.codec as codec
from prunecast.compression import accelerated
from prunecast.compression.codec import Context, TensorSpec
from support.accelerated import assert_same_bytes, assert_same_outcome
from support.devices import on_every_device

FOLDER = Path(__file__).parents[1] / "codec" / "vectors"
GOLDEN = sorted(p.stem for p in FOLDER.glob("*.bin"))
MUST_FAIL = sorted(p.stem for p in (FOLDER / "must_fail").glob("*.bin"))


def part(arrays: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    return {k.partition(":")[2]: v for k, v in arrays.items() if k.startswith(kind + ":")}


def load(path: Path) -> tuple[bytes, dict[str, np.ndarray], Context]:
    """Payload, tensors (of a golden vector) and context."""
    arrays: dict[str, np.ndarray] = {}
    if path.with_suffix(".npz").exists():
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    tensors = part(arrays, "tensor")
    known = tensors if arrays.get("layout") else part(arrays, "layout")
    context = Context(
        layout={k: TensorSpec(v.dtype, v.shape) for k, v in known.items()} or None,
        mask=part(arrays, "mask") or None,
        previous=part(arrays, "previous") or None,
    )
    return path.with_suffix(".bin").read_bytes(), tensors, context


@on_every_device
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(device: str, name: str) -> None:
    payload, tensors, context = load(FOLDER / name)
    decoded = accelerated.decode(payload, context=context, device=device)
    assert list(decoded) == list(tensors)
    for key, value in tensors.items():
        assert decoded[key].cpu().numpy().tobytes() == value.tobytes()
    assert_same_outcome(payload, context, device)
    assert_same_bytes(tensors, context, device)


@on_every_device
@pytest.mark.parametrize("name", MUST_FAIL)
def test_must_fail(device: str, name: str) -> None:
    payload, _, context = load(FOLDER / "must_fail" / name)
    expected = getattr(codec, name.partition("--")[0])
    with pytest.raises(expected) as caught:
        accelerated.decode(payload, context=context, device=device)
    assert type(caught.value) is expected
    assert_same_outcome(payload, context, device)


def test_the_vectors_are_there() -> None:
    assert len(GOLDEN) >= 10
    assert len(MUST_FAIL) >= 80
