"""``.npz`` archives: read without pickle, and without believing what a header states."""

from __future__ import annotations

import lzma
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from prunecast.compression.files.errors import UnreadableFile, UnsupportedTensor
from prunecast.compression.files.tensors import (
    FOREIGN,
    FileSpec,
    FileTensor,
    TensorFile,
    native_tensor,
)

__all__ = ["open_npz", "write_npz"]

# What zipfile, its decompressors and numpy's header parser (a tokenizer and literal_eval) raise.
_BAD = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, NotImplementedError),
    *(ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError),
    *(SyntaxError, tokenize.TokenError, MemoryError),
)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same tensors give the same bytes


def open_npz(path: Path) -> TensorFile:
    """Open an archive of plain arrays.

    Raises:
        UnreadableFile: no such archive, damaged, or with arrays that need pickle.
        UnsupportedTensor: an array has a dtype that the codec does not know.
    """
    specs: dict[str, FileSpec] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = _name(member.filename)
                if name in specs:
                    raise UnreadableFile(f"{path} holds {name!r} twice")
                with archive.open(member) as stream:
                    spec = _header(stream)[0]
                    if spec.nbytes != member.file_size - stream.tell():
                        raise UnreadableFile(f"{path}: {name!r} has not the size of its shape")
                specs[name] = spec
    except UnsupportedTensor as error:
        raise UnsupportedTensor(f"{path}: array {name!r} {error}") from error
    except UnreadableFile:
        raise
    except _BAD as error:
        raise _unreadable(path, error) from error

    def load(name: str) -> FileTensor:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
                spec, dtype, fortran = _header(stream)
                flat = np.frombuffer(stream.read(), dtype)
                order = "F" if fortran else "C"
                return native_tensor(name, flat.reshape(spec.shape, order=order))  # type: ignore[call-overload]
        except _BAD as error:
            raise _unreadable(path, error) from error

    return TensorFile(path, "npz", specs, load)


def _name(member: str) -> str:
    if not member.endswith(".npy"):
        raise ValueError(f"{member!r} is not an array")
    return member.removesuffix(".npy")


def _header(stream: IO[bytes]) -> tuple[FileSpec, np.dtype[Any], bool]:
    """dtype and shape that an array's header states, and whether its order is Fortran's."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"an array is of format {version}")
    if dtype.hasobject:
        raise ValueError("an array holds Python objects, which only pickle reads: refused")
    try:
        native_tensor("", np.zeros(0, dtype))
    except UnsupportedTensor:
        raise UnsupportedTensor(
            f"has dtype {dtype}; only booleans, integers and real floats of up to 64 bits can be "
            "coded: convert it or leave it out"
        ) from None
    if any(d < 0 for d in shape):
        raise ValueError("an array has a negative dimension")
    return FileSpec(dtype.name, shape), dtype, fortran


def _unreadable(path: Path, error: Exception) -> UnreadableFile:
    if isinstance(error, OSError) and error.strerror:
        return UnreadableFile(f"cannot read {path}: {error.strerror}")
    return UnreadableFile(f"{path} is not a readable .npz archive of plain arrays: {error}")


def write_npz(path: Path, tensors: Mapping[str, FileTensor]) -> None:
    """Write an archive; the caller replaces files atomically.

    Raises:
        UnsupportedTensor: a dtype that numpy lacks.
    """
    for name, tensor in tensors.items():
        if tensor.dtype in FOREIGN:
            raise UnsupportedTensor(
                f"tensor {name!r} is {tensor.dtype}, which .npz cannot hold: write .safetensors"
            )
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, tensor in tensors.items():
            info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
            with archive.open(info, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, tensor.values, allow_pickle=False)
