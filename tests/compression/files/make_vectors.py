"""Write the vectors anew: `python tests/compression/files/make_vectors.py`.

Only for a deliberate change of the format; tests never run this.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from prunecast.compression.files.archive import open_archive
from prunecast.compression.files.compressing import Lossy, compress_file, restore_file
from prunecast.compression.files.tensors import FileTensor, TensorFile
from support.checkpoints import every_kind

FOLDER = Path(__file__).parent / "vectors"


def main() -> None:
    """A file with every coding and every note, and what it restores to."""
    kinds = every_kind(3)
    exact = FileTensor(np.arange(0, 1 << 16, 97, dtype=np.uint16), "bfloat16")
    brain = np.random.default_rng(4).normal(size=(30, 20)).astype(np.float32)
    kinds |= {"bfloat16": exact, "brain": FileTensor.rounded(brain, "bfloat16")}
    specs = {name: tensor.spec for name, tensor in kinds.items()}
    metadata = {"format": "pt", "ключ": "значение"}
    source = TensorFile(FOLDER, "npz", specs, kinds.__getitem__, metadata=metadata)
    lossy = Lossy(error=0.02, kept=["bfloat16", "specials"])
    FOLDER.mkdir(exist_ok=True)
    compress_file(source, FOLDER / "every_kind.pcc", lossy=lossy, part_bytes=10_000)
    restore_file(open_archive(FOLDER / "every_kind.pcc"), FOLDER / "every_kind.safetensors")


if __name__ == "__main__":
    main()
