"""What was written once must be readable for ever: vectors that no test writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prunecast.compression.schemes.registry import SCHEMES, decode_payload, inspect

FOLDER = Path(__file__).parent / "vectors"
PAYLOADS = sorted(path.stem for path in FOLDER.glob("*.bin"))


@pytest.mark.parametrize("name", PAYLOADS)
def test_decodes_bit_for_bit(name: str) -> None:
    case, coding = name.rsplit("-", 1)
    decoded = decode_payload((FOLDER / f"{name}.bin").read_bytes())
    with np.load(FOLDER / f"{case}.npz") as expected:
        assert set(decoded) == set(expected.files)
        for tensor in expected.files:
            assert decoded[tensor].dtype == np.float32
            assert decoded[tensor].shape == expected[tensor].shape
            assert decoded[tensor].tobytes() == expected[tensor].tobytes()
    assert inspect((FOLDER / f"{name}.bin").read_bytes()).coding == coding


def test_every_scheme_has_vectors_in_both_codings() -> None:
    found = {
        (info.scheme, info.coding)
        for info in (inspect(path.read_bytes()) for path in FOLDER.glob("*.bin"))
    }
    assert found == {(name, coding) for name in SCHEMES for coding in ("paper", "prunecast")}
