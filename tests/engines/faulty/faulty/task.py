"""Which trouble comes when, and how both sides tell what they hold."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLOW, NAN, KILLED, BACK, JOINS, BARE, LAST = range(2, 9)
"""Rounds: a reply comes when its round is over; a client makes NaN; a SuperNode is killed while it
trains; it is back; another node joins; a node answers without the mod; all is well again."""
TROUBLED = {SLOW: 1, NAN: 2, KILLED: 1, BARE: 3}
"""Round to the partition whose trouble it is."""
PATIENCE = 900.0  # seconds, on a machine that does much else


def initial() -> dict[str, NDArray[np.float32]]:
    """The arrays the server starts from."""
    rng = np.random.default_rng(99)
    return {"weight": rng.standard_normal((128, 512), dtype=np.float32)}


def fingerprint(arrays: Mapping[str, NDArray[Any]]) -> int:
    """47 bits of a digest of all values."""
    digest = hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).digest()
    return int.from_bytes(digest[:6], "little") >> 1


def wait_for(path: Path) -> None:
    """Until somebody else has got so far."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain for {path.name}")
        time.sleep(0.2)
