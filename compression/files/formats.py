"""Checkpoint files by their suffix: read as `TensorFile`, and written.

``.npz`` is read without pickle and without believing what a header states; ``.safetensors`` through
its library; ``.onnx`` by `prunecast.compression.files.onnx_files`, and it is read alone.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prunecast.common.bounds import byte_limit, disk_bytes, too_large
from prunecast.common.files import remove_abandoned, replacing
from prunecast.common.npz import NpzArchive, NpzError, NpzTooLarge
from prunecast.compression.files import (
    FileTooLarge,
    UnknownFormat,
    UnreadableFile,
    UnsupportedTensor,
)
from prunecast.compression.files.contents import CONVERSIONS, content_hint, reading
from prunecast.compression.files.onnx_files import open_onnx
from prunecast.compression.files.tensors import (
    FOREIGN,
    MOST_DIMENSIONS,
    NATIVE,
    FileSpec,
    FileTensor,
    TensorFile,
    raw_dtype,
)

__all__ = [
    "lay_out",
    "open_tensors",
    "writable_format",
    "write_tensors",
]

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same tensors give the same bytes
_MOST_MEMBER = 60_000  # bytes of a name in a zip archive, which ends at a NUL besides
_MOST_HEADER = 100_000_000  # bytes, that the library of safetensors reads


def _open_npz(path: Path, max_bytes: int | None) -> TensorFile:
    """Open an archive of plain arrays."""
    specs: dict[str, FileSpec] = {}
    try:
        archive = NpzArchive(path, max_bytes=max_bytes)
    except NpzTooLarge as error:
        raise FileTooLarge(str(error)) from error
    except NpzError as error:
        hint = "" if zipfile.is_zipfile(path) else content_hint(path)
        raise UnreadableFile(f"{error}{hint}") from error
    for name, member in archive.members.items():
        if member.dtype.name not in NATIVE:
            raise UnsupportedTensor(f"{path}: array {name!r} has dtype {_remedy(member.dtype)}")
        specs[name] = FileSpec(member.dtype.name, member.shape)

    def load(name: str) -> FileTensor:
        try:
            values = archive.read(name)
        except NpzError as error:
            raise UnreadableFile(str(error)) from error
        native = values.astype(values.dtype.newbyteorder("="), copy=False)
        return FileTensor(native, specs[name].dtype)

    return TensorFile(path, "npz", specs, load)


def _remedy(dtype: np.dtype[Any]) -> str:
    """A dtype that cannot be coded, and what to do with the array."""
    if dtype.kind == "c":
        half = np.dtype(f"f{dtype.itemsize // 2}")
        return (
            f"{dtype}, and complex numbers have no coding: save its real and imaginary parts as "
            f"two {half} arrays (array.real and array.imag)"
        )
    if dtype.kind == "f":
        return f"{dtype}, and floats have up to 64 bits: convert it with array.astype('float64')"
    if dtype.kind in "US":
        return f"{dtype}, which is text: leave the array out, it holds no weights"
    return (
        f"{dtype}; only booleans, integers and real floats of up to 64 bits can be coded: convert "
        "it or leave it out"
    )


def _write_npz(path: Path, tensors: Mapping[str, FileTensor]) -> None:
    """Write an archive; the caller replaces files atomically."""
    for name, tensor in tensors.items():
        if tensor.dtype in FOREIGN:
            raise UnsupportedTensor(
                f"tensor {name!r} is {tensor.dtype}, which .npz cannot hold: write .safetensors"
            )
        if "\0" in name or len(name.encode("utf-8", "replace")) > _MOST_MEMBER:
            raise UnsupportedTensor(
                f"an .npz file can hold no tensor {name[:200]!r}: write .safetensors"
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


def _open_safetensors(path: Path, max_bytes: int | None) -> TensorFile:
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
                if len(shape := tuple(part.get_shape())) > MOST_DIMENSIONS:
                    raise UnsupportedTensor(
                        f"{path}: tensor {name!r} has {len(shape)} dimensions, more than "
                        f"{MOST_DIMENSIONS}: reshape it"
                    )
                specs[name] = FileSpec(_DTYPES[code], shape)
                places[name] = at
                at += specs[name].nbytes
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UnreadableFile(
            f"{path} is not a readable .safetensors file: {error}{content_hint(path)}"
        ) from error

    limit = byte_limit(disk_bytes(path), max_bytes)
    if sum(spec.nbytes for spec in specs.values()) > limit:
        raise FileTooLarge(f"{path}: {too_large('its tensors take', limit)}")

    def load(name: str) -> FileTensor:
        spec = specs[name]
        dtype = raw_dtype(spec.dtype)
        with reading(path):
            flat = np.fromfile(path, dtype, spec.size, offset=places[name])
        if flat.size != spec.size:
            raise UnreadableFile(f"{path} became shorter while it was read")
        values = flat.astype(dtype.newbyteorder("="), copy=False).reshape(spec.shape)
        return FileTensor(values, spec.dtype)

    return TensorFile(path, "safetensors", specs, load, metadata=metadata, offsets=places)


def lay_out(
    specs: Mapping[str, FileSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header of a ``.safetensors`` file, and where each tensor begins in the file.

    Args:
        specs: name to dtype and shape, in the order of the file.
        metadata: texts.

    Raises:
        UnsupportedTensor: a name that the format cannot hold, or too many of them.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at, places = 0, {}
    for name, spec in specs.items():
        if name == "__metadata__":
            raise UnsupportedTensor(f"a .safetensors file can hold no tensor {name!r}: rename it")
        places[name] = at
        document[name] = {
            "dtype": codes[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at := at + spec.nbytes],
        }
    try:
        header = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UnsupportedTensor(
            f"a .safetensors file can hold no name or text with lone surrogates: {error}"
        ) from error
    header += b" " * (-len(header) % 8)
    if len(header) > _MOST_HEADER:
        raise UnsupportedTensor(
            f"the names and texts of a .safetensors file take up to {_MOST_HEADER:,} bytes: "
            "shorten them"
        )
    start = 8 + len(header)
    return len(header).to_bytes(8, "little") + header, {n: start + p for n, p in places.items()}


def _write_safetensors(
    path: Path, tensors: Mapping[str, FileTensor], metadata: Mapping[str, str]
) -> None:
    """Write into an existing file; the caller replaces files atomically.

    The library would write a file of a name of its own, which nobody finds after a crash, and put
    it in the place of the locked one.
    """
    order = sorted(tensors, key=lambda n: (-raw_dtype(tensors[n].dtype).itemsize, n))
    header, _ = lay_out({name: tensors[name].spec for name in order}, metadata)
    with open(path, "r+b") as file:
        file.write(header)
        for name in order:
            values = np.ascontiguousarray(tensors[name].values, raw_dtype(tensors[name].dtype))
            values.tofile(file)


_READERS = {".safetensors": _open_safetensors, ".npz": _open_npz, ".onnx": open_onnx}


def open_tensors(path: Path, *, max_bytes: int | None = None) -> TensorFile:
    """Open a ``.safetensors``, ``.npz`` or ``.onnx`` file; tensors are read when asked for.

    Args:
        path: of the file.
        max_bytes: most bytes that its tensors may take together; default 1 GiB, or 64 times what
            the file takes on disk if that is more.

    Raises:
        FileTooLarge: its tensors exceed `max_bytes`.
        UnknownFormat: another suffix.
        UnreadableFile: missing, damaged, or not what its suffix says.
        UnsafePath: it refers to data outside its folder.
        UnsupportedTensor: a tensor has a dtype that cannot be coded.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise UnknownFormat(
            f"{path}: the suffix {path.suffix!r} is none of {known}"
            + CONVERSIONS.get(path.suffix.lower(), "")
        )
    with reading(path):  # a name may be too long, or a folder not to be entered
        if path.is_dir():
            raise UnreadableFile(f"{path} is a folder: name the file in it")
        if not path.exists():
            lost = f", it is a link to {path.readlink()}" if path.is_symlink() else ""
            raise UnreadableFile(f"cannot read {path}: there is no such file{lost}")
        if not path.is_file():
            raise UnreadableFile(f"cannot read {path}: it is no regular file")
    return reader(path, max_bytes)


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
    remove_abandoned(Path(path).parent, {Path(path).name})
    with replacing(Path(path)) as temporary:
        if suffix == ".npz":
            _write_npz(temporary, tensors)
        else:
            _write_safetensors(temporary, tensors, metadata or {})
