"""Model files: written whole or not at all, verified when read."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunecast.compression.codec import Limits
from prunecast.compression.versions.errors import StorageError, VersionsError
from prunecast.compression.versions.model import PublishedModel
from prunecast.compression.versions.payloads import decode_model, encode_keyframe

__all__ = ["load_model", "replacing", "save_model", "write_atomically"]

_STREAM = b"prunecast model file"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace `path` by what the block writes: temporary file, fsync, rename, fsync of the folder.

    A crash at any moment leaves either the old file or the new one, never a mixture; so does an
    exception in the block.

    Yields:
        An empty file beside `path`, to be written.

    Raises:
        StorageError: the file system refuses; the old file is untouched.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # opened by hand and not by tempfile, so that the file gets the user's usual permissions
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, see `replacing`.

    Raises:
        StorageError: the file system refuses; the old file is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


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
        return decode_model(data, stream=_STREAM, limits=limits or Limits())
    except VersionsError as error:
        raise StorageError(f"{path} is not a usable model file: {error}") from error
