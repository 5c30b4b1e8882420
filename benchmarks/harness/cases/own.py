"""Cases from a folder of the user's own tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .case import Case, case
from .quantising import largest, to_error

__all__ = ["own_cases"]


def own_cases(path: Path) -> Iterator[Case]:
    """Cases of one ``.npz`` of float tensors.

    With "update" in its name it is quantised with one step to a relative L2 error of 0.01, 0.25
    and 0.6, and cut to its largest 1 %; else to 0.01, and then pruned to 10 %.
    """
    with np.load(path, allow_pickle=False) as archive:
        values = {k: archive[k].astype(np.float32) for k in archive.files}
    if "update" in path.stem:
        for error in (0.01, 0.25, 0.6):
            yield case(f"{path.stem}/{error}", "update", dict(to_error(values, error)))
        yield case(f"{path.stem}/top-1%", "top", dict(largest(to_error(values, 0.3), 0.01)))
        return
    dense = to_error(values, 0.01)
    yield case(f"{path.stem}/dense", "dense", dict(dense))
    yield case(f"{path.stem}/pruned", "pruned", dict(largest(dense, 0.1)))
    yield case(f"{path.stem}/float", "float", dict(values))
