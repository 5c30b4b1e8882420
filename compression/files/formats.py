"""Checkpoint files by their suffix: read as `TensorFile`, and written.

``.npz`` is read without pickle and without believing what a header states; ``.safetensors`` through
its library; ``.onnx`` by `prunecast.compression.files.onnx_files`, and it is read alone.
"""

from __future__ import annotations

import lzma
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from prunecast.common.files import replacing
from prunecast.compression.files import UnknownFormat, UnreadableFile, UnsupportedTensor
from prunecast.compression.files.onnx_files import open_onnx
from prunecast.compression.files.tensors import (
    FOREIGN,
    NATIVE,
    FileSpec,
    FileTensor,
    TensorFile,
    raw_dtype,
)

__all__ = [
    "open_tensors",
    "writable_format",
    "write_tensors",
]

# What zipfile, its decompressors and numpy's header parser (a tokenizer and literal_eval) raise.
_BAD = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, NotImplementedError),
    *(ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError),
    *(SyntaxError, tokenize.TokenError, MemoryError),
)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same tensors give the same bytes


def _open_npz(path: Path) -> TensorFile:
    """Open an archive of plain arrays."""
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
                flat = flat.astype(dtype.newbyteorder("="), copy=False)
                values = flat.reshape(spec.shape, order="F" if fortran else "C")
                return FileTensor(values, spec.dtype)
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
    if dtype.name not in NATIVE:
        raise UnsupportedTensor(
            f"has dtype {dtype}; only booleans, integers and real floats of up to 64 bits can be "
            "coded: convert it or leave it out"
        )
    if any(d < 0 for d in shape):
        raise ValueError("an array has a negative dimension")
    return FileSpec(dtype.name, shape), dtype, fortran


def _unreadable(path: Path, error: Exception) -> UnreadableFile:
    if isinstance(error, OSError) and error.strerror:
        return UnreadableFile(f"cannot read {path}: {error.strerror}")
    return UnreadableFile(f"{path} is not a readable .npz archive of plain arrays: {error}")


def _write_npz(path: Path, tensors: Mapping[str, FileTensor]) -> None:
    """Write an archive; the caller replaces files atomically."""
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


_DTYPES = {
    "BOOL": "bool",
    **{f"I{8 * n}": f"int{8 * n}" for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": f"uint{8 * n}" for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": f"float{8 * n}" for n in (2, 4, 8)},
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def _open_safetensors(path: Path) -> TensorFile:
    """Open a file."""
    from safetensors import SafetensorError, safe_open

    specs: dict[str, FileSpec] = {}
    places: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            at = 8 + int.from_bytes(file.read(8), "little")
        # The library checks the header, and that the tensors fill the file without gaps; so
        # their places follow from their order. It has no numpy dtype for some of them.
        with safe_open(path, framework="np") as opened:
            metadata = opened.metadata() or {}
            for name in opened.offset_keys():
                part = opened.get_slice(name)
                code = part.get_dtype()
                if code not in _DTYPES:
                    raise UnsupportedTensor(
                        f"{path}: tensor {name!r} is {code}, which cannot be coded; convert it, "
                        "to BF16 say"
                    )
                specs[name] = FileSpec(_DTYPES[code], tuple(part.get_shape()))
                places[name] = at
                at += specs[name].nbytes
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UnreadableFile(f"{path} is not a readable .safetensors file: {error}") from error

    def load(name: str) -> FileTensor:
        spec = specs[name]
        dtype = raw_dtype(spec.dtype)
        try:
            flat = np.fromfile(path, dtype, spec.size, offset=places[name])
        except OSError as error:
            raise UnreadableFile(f"cannot read {path}: {error.strerror or error}") from error
        if flat.size != spec.size:
            raise UnreadableFile(f"{path} became shorter while it was read")
        values = flat.astype(dtype.newbyteorder("="), copy=False).reshape(spec.shape)
        return FileTensor(values, spec.dtype)

    return TensorFile(path, "safetensors", specs, load, metadata=metadata)


def _write_safetensors(
    path: Path, tensors: Mapping[str, FileTensor], metadata: Mapping[str, str]
) -> None:
    """Write into an existing file; the caller replaces files atomically."""
    from safetensors import SafetensorError, TensorSpec, serialize_file

    # The library takes addresses, so the arrays must outlive the call.
    flat = {name: np.ascontiguousarray(t.values, raw_dtype(t.dtype)) for name, t in tensors.items()}
    entries = {
        name: TensorSpec(
            dtype=tensors[name].dtype,
            shape=tensors[name].values.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in flat.items()
    }
    try:
        mode = path.stat().st_mode
        serialize_file(entries, path, metadata=dict(metadata) or None)
        path.chmod(mode)  # the library replaces the file by one that only its owner may read
    except SafetensorError as error:
        raise UnreadableFile(f"cannot write {path}: {error}") from error


_READERS = {".safetensors": _open_safetensors, ".npz": _open_npz, ".onnx": open_onnx}


def open_tensors(path: Path) -> TensorFile:
    """Open a ``.safetensors``, ``.npz`` or ``.onnx`` file; tensors are read when asked for.

    Raises:
        UnknownFormat: another suffix.
        UnreadableFile: missing, damaged, or not what its suffix says.
        UnsafePath: it refers to data outside its folder.
        UnsupportedTensor: a tensor has a dtype that cannot be coded.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise UnknownFormat(f"{path}: the suffix {path.suffix!r} is none of {known}")
    if not path.is_file():
        raise UnreadableFile(f"cannot read {path}: there is no such file")
    return reader(path)


def writable_format(path: Path) -> str:
    """Return the suffix of a file that can be written.

    Raises:
        UnknownFormat: none of ``.safetensors``, ``.npz`` and, for what was one, ``.onnx``.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".safetensors", ".npz", ".onnx"):
        raise UnknownFormat(
            f"{path}: tensors are written as .safetensors or .npz, and as .onnx what was one, "
            f"not {suffix!r}"
        )
    return suffix


def write_tensors(
    path: Path, tensors: Mapping[str, FileTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors by the file's suffix, atomically; an ``.npz`` has no place for metadata.

    Raises:
        UnknownFormat: neither ``.safetensors`` nor ``.npz``.
        UnsupportedTensor: the format cannot hold a tensor.
        StorageError: the file system refuses.
    """
    suffix = writable_format(path)
    if suffix == ".onnx":
        raise UnknownFormat(f"{path}: tensors alone are no .onnx model: write .safetensors or .npz")
    with replacing(Path(path)) as temporary:
        if suffix == ".npz":
            _write_npz(temporary, tensors)
        else:
            _write_safetensors(temporary, tensors, metadata or {})
