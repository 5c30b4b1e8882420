"""``.safetensors`` files, through the safetensors library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from prunecast.compression.files.errors import UnreadableFile, UnsupportedTensor
from prunecast.compression.files.tensors import FileSpec, FileTensor, TensorFile, raw_dtype

__all__ = ["open_safetensors", "write_safetensors"]

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


def open_safetensors(path: Path) -> TensorFile:
    """Open a file.

    Raises:
        UnreadableFile: missing or damaged.
        UnsupportedTensor: a tensor has a dtype that cannot be coded.
    """
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


def write_safetensors(
    path: Path, tensors: Mapping[str, FileTensor], metadata: Mapping[str, str]
) -> None:
    """Write into an existing file; the caller replaces files atomically.

    Raises:
        UnreadableFile: the library refuses.
    """
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
