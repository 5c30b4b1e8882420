"""Weights from files: saved published models, ``.safetensors`` and ``.npz`` checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from prunecast.compression.files import FilesError, FileTensor, open_tensors
from prunecast.compression.files.tensors import FOREIGN
from prunecast.compression.onnx import ForeignModel
from prunecast.compression.onnx.lattice import Steps, snap
from prunecast.compression.versions import PublishedModel, load_model
from prunecast.server.repository.errors import RepositoryError

__all__ = ["from_arrays", "read_checkpoint"]


def read_checkpoint(
    path: Path,
    *,
    bits: int | None = None,
    steps: Steps = "range",
    held: PublishedModel | None = None,
) -> PublishedModel:
    """Read a published model, or a dense checkpoint as one.

    Args:
        path: ``.safetensors``, ``.npz``, or a file that `save_model` wrote.
        bits: for dense checkpoints, see `from_arrays`.
        steps: likewise.
        held: likewise.

    Raises:
        RepositoryError: not readable as its suffix says, or `bits` given for a published model.
        StorageError: no such file, or not a published model.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        if bits is not None:
            raise RepositoryError(f"{path} is a published model: its lattice is fixed already")
        return load_model(path)
    try:
        arrays = {name: _plain(path, name, tensor) for name, tensor in open_tensors(path).items()}
    except FilesError as error:
        raise RepositoryError(str(error)) from error
    return from_arrays(arrays, bits=bits, steps=steps, held=held)


def from_arrays(
    arrays: Mapping[str, NDArray[Any]],
    *,
    bits: int | None = None,
    steps: Steps = "range",
    held: PublishedModel | None = None,
    counter: int = 0,
) -> PublishedModel:
    """A dense checkpoint as a published model.

    Args:
        arrays: tensors by name.
        bits: 2 to 16: put every floating tensor of two or more dimensions on a symmetric lattice,
            rounding to nearest. None keeps every value exactly, which costs more bytes.
        steps: how a step is chosen, see `prunecast.compression.onnx.lattice`; ``held`` is what
            keeps patches small.
        held: the newest live version of the same release, for ``steps="held"``.
        counter: number of the version.

    Raises:
        RepositoryError: `bits` out of range, or a value that is not finite.
    """
    kernels = {name for name, a in arrays.items() if a.dtype.kind == "f" and a.ndim >= 2}
    try:
        return snap(arrays, kernels, bits=bits, steps=steps, held=held, counter=counter)
    except ForeignModel as error:
        raise RepositoryError(str(error)) from error


def _plain(path: Path, name: str, tensor: FileTensor) -> NDArray[Any]:
    if tensor.dtype in FOREIGN and tensor.dtype != "bfloat16":
        raise RepositoryError(f"{path}: tensor {name!r} is {tensor.dtype}: convert it to float32")
    return tensor.real()
