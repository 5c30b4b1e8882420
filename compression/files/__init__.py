"""Checkpoint files: read, compressed to one file, restored, inspected, pruned.

``.safetensors``, ``.npz`` and ``.onnx`` are read, each with what it needs imported only then. The
compressed file (``.pcc``) is specified in ``docs/files.md``. The errors are here: one base, one
class per cause.
"""

__all__ = [
    "CannotPrune",
    "FileTooLarge",
    "FilesError",
    "UnknownFormat",
    "UnreadableFile",
    "UnsafePath",
    "UnsupportedTensor",
]


class FilesError(ValueError):
    """Base of every error that `prunecast.compression.files` raises."""


class UnknownFormat(FilesError):
    """A file's suffix names no format that is known here."""


class UnreadableFile(FilesError):
    """A file is missing, damaged, or not what its suffix says."""


class UnsafePath(FilesError):
    """A file refers to data outside its own folder."""


class UnsupportedTensor(FilesError):
    """A tensor has a dtype or a value that the chosen file or coding cannot hold."""


class CannotPrune(FilesError):
    """A checkpoint cannot be pruned as asked, or there is no room for what would be written."""


class FileTooLarge(FilesError):
    """A file states more data than the reader accepts."""
