"""What was written once must be readable for ever: vectors that no test writes."""

import json
from pathlib import Path

import numpy as np
import pytest

from prunecast.compression.versions import decode_model, decode_update, open_plain

FOLDER = Path(__file__).parent / "vectors"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
STREAM = EXPECTED["stream"].encode()


def payload(name):
    return (FOLDER / f"{name}.bin").read_bytes()


def model(name):
    base = EXPECTED[name].get("base")
    return decode_model(payload(name), held=model(base) if base else None, stream=STREAM)


@pytest.mark.parametrize("name", ["keyframe", "delta", "seeded"])
def test_models(name):
    found = model(name)
    assert found.digest.hex() == EXPECTED[name]["digest"]
    assert found.counter == EXPECTED[name]["counter"]


def test_drawn_integers():
    assert model("seeded")["w"].q.tolist() == EXPECTED["seeded"]["q"]


def test_update():
    base = model("delta")
    update = decode_update(payload("update"), base, stream=STREAM)
    change = update.change("weight")
    assert change.step == 0.03125
    assert int(change.values.sum()) == EXPECTED["update"]["weight_sum"]
    assert int(np.count_nonzero(change.values)) == EXPECTED["update"]["weight_nonzero"]
    exact = update.apply("norm.running_mean", np.zeros(8, np.float32))
    assert exact.tolist() == list(range(8))
    assert update.change("bias") is None


def test_reply():
    """Tensors that are not the version's: renamed, retyped, unlike any, beside the payload."""
    expected = EXPECTED["reply"]
    base = model("delta")
    update = decode_update(payload("reply"), base, stream=STREAM)
    assert list(update.tensors) == expected["tensors"]
    dtypes = [tensor.spec and tensor.spec.dtype.str[1:] for tensor in update.tensors.values()]
    assert dtypes == [None, "f8", "f4", "i2", "f2", "f4"]
    masters = {name: np.zeros_like(array) for name, array in base.arrays().items()}
    for name in expected["tensors"][1:]:
        array = update.apply(name, update.start(name, masters))
        assert np.array_equal(array.reshape(-1), np.ravel(expected[name])), name


def test_plain():
    found = open_plain(payload("plain"), stream=STREAM)
    for name, values in EXPECTED["plain"].items():
        assert found[name].tolist() == values
