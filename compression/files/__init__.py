"""Checkpoint files: read, compressed to one file, restored, inspected.

``.safetensors``, ``.npz`` and ``.onnx`` are read, each with what it needs imported only then. The
compressed file (``.pcc``) is specified in ``docs/files.md``.
"""

from prunecast.compression.files.archive import Archive, describe_payloads, open_archive
from prunecast.compression.files.compressing import (
    Compressed,
    CompressedTensor,
    compress_file,
    restore_file,
)
from prunecast.compression.files.errors import (
    FilesError,
    FileTooLarge,
    UnknownFormat,
    UnreadableFile,
    UnsafePath,
    UnsupportedTensor,
)
from prunecast.compression.files.inspection import (
    InspectedTensor,
    Inspection,
    inspect_archive,
    inspect_tensors,
)
from prunecast.compression.files.lossy import KEPT, Lossy
from prunecast.compression.files.sources import open_tensors, writable_format, write_tensors
from prunecast.compression.files.tensors import FileSpec, FileTensor, TensorFile

__all__ = [
    "KEPT",
    "Archive",
    "Compressed",
    "CompressedTensor",
    "FileSpec",
    "FileTensor",
    "FileTooLarge",
    "FilesError",
    "InspectedTensor",
    "Inspection",
    "Lossy",
    "TensorFile",
    "UnknownFormat",
    "UnreadableFile",
    "UnsafePath",
    "UnsupportedTensor",
    "compress_file",
    "describe_payloads",
    "inspect_archive",
    "inspect_tensors",
    "open_archive",
    "open_tensors",
    "restore_file",
    "writable_format",
    "write_tensors",
]
