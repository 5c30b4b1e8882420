"""Files of masks: a ``.safetensors`` file with a bit for each weight.

Each tensor of the file is named as the tensor that it masks and holds ``ceil(weights / 8)`` bytes,
dtype U8: one bit a weight, row by row, the first in the highest bit, 1 where it is kept. The shapes
are in the file's metadata, as a JSON object of lists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.files import UnreadableFile
from prunecast.compression.files.formats import lay_out, open_tensors
from prunecast.compression.files.tensors import FileSpec

__all__ = ["MaskFile", "read_masks"]

_SHAPES = "prunecast.masks"


class MaskFile:
    """The layout of a file of masks, which is filled in any order.

    Attributes:
        places: name of a tensor to where its bits begin in the file.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        texts = {_SHAPES: json.dumps({n: list(s) for n, s in shapes.items()})}
        specs = {n: FileSpec("uint8", (-(-math.prod(s) // 8),)) for n, s in shapes.items()}
        self._header, self.places = lay_out(specs, texts)
        self._size = len(self._header) + sum(spec.nbytes for spec in specs.values())

    def begin(self, path: Path) -> None:
        """Write the header into a file, and make room for the bits."""
        with open(path, "r+b") as file:
            file.write(self._header)
            file.truncate(self._size)


def read_masks(path: Path) -> dict[str, NDArray[np.bool_]]:
    """Masks of a file that `prunecast prune` wrote, True where a weight is kept.

    Raises:
        FilesError: missing, damaged, or no masks.
    """
    source = open_tensors(Path(path))
    try:
        shapes = json.loads(source.metadata[_SHAPES])
        masks = {}
        for name, tensor in source.items():
            shape = tuple(int(n) for n in shapes[name])
            size = math.prod(shape)
            if min(shape, default=0) < 0 or tensor.values.size != -(-size // 8):
                raise ValueError(f"{name!r} has not the size of its shape")
            bits = np.unpackbits(tensor.values.astype(np.uint8, casting="safe"), count=size)
            masks[name] = bits.astype(np.bool_).reshape(shape)
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableFile(f"{path} is no file of masks: {error}") from error
    return masks
