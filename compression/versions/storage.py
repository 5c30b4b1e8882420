"""Model files: written whole or not at all, verified when read."""

from __future__ import annotations

from pathlib import Path

from prunecast.common.files import StorageError, write_atomically
from prunecast.compression.codec import Limits
from prunecast.compression.versions.errors import VersionsError
from prunecast.compression.versions.model import PublishedModel
from prunecast.compression.versions.payloads import decode_model, encode_keyframe

__all__ = ["load_model", "save_model"]

_STREAM = b"prunecast model file"


def save_model(model: PublishedModel, path: Path) -> None:
    """Write a published model to `path` as a keyframe payload, atomically.

    Raises:
        StorageError: the file system refuses.
    """
    write_atomically(Path(path), encode_keyframe(model, stream=_STREAM))


def load_model(path: Path, *, limits: Limits | None = None) -> PublishedModel:
    """Read a file that `save_model` wrote; its digest is verified.

    Raises:
        StorageError: the file is missing, damaged, or no model file.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return decode_model(data, stream=_STREAM, limits=limits)
    except VersionsError as error:
        raise StorageError(f"{path} is not a usable model file: {error}") from error
