"""Open and write checkpoint files by their suffix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prunecast.common.files import replacing
from prunecast.compression.files.errors import UnknownFormat, UnreadableFile
from prunecast.compression.files.npz_files import open_npz, write_npz
from prunecast.compression.files.onnx_files import open_onnx
from prunecast.compression.files.safetensors_files import open_safetensors, write_safetensors
from prunecast.compression.files.tensors import FileTensor, TensorFile

__all__ = ["open_tensors", "writable_format", "write_tensors"]

_READERS = {".safetensors": open_safetensors, ".npz": open_npz, ".onnx": open_onnx}


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
        UnknownFormat: neither ``.safetensors`` nor ``.npz``.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".safetensors", ".npz"):
        raise UnknownFormat(f"{path}: tensors are written as .safetensors or .npz, not {suffix!r}")
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
    with replacing(Path(path)) as temporary:
        if suffix == ".npz":
            write_npz(temporary, tensors)
        else:
            write_safetensors(temporary, tensors, metadata or {})
