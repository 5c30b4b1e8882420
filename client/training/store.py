"""What a node keeps on disk between messages: the held model and the residual.

Flower's `context.state` lives in memory, crosses process borders with every message and is lost
when a SuperNode restarts. Blobs are files here, replaced atomically, before the reply is sent::

    <root>/<run id>/<node id>/<record>.model           the version this node holds
    <root>/<run id>/<node id>/<record>.residual        what quantisation dropped so far
    <root>/<run id>/<node id>/<record>.pending-<id>    the residual that follows from reply <id>

A residual belongs to a reply: it replaces the old one only when the server says that it accepted
that reply. A reply that is lost on the way therefore never loses a residual.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.files import StorageError, cache_folder, write_atomically
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    RawTensor,
    Tensor,
    VersionsError,
)

__all__ = ["ModError", "NodeStore", "NonFiniteUpdate", "StoreError", "default_root"]

_STALE_SECONDS = 30 * 24 * 3600
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, VersionsError)


class ModError(RuntimeError):
    """A message cannot be understood, or a reply cannot be encoded; Flower reports it."""


class NonFiniteUpdate(ModError):
    """Local training produced NaN or infinity."""


class StoreError(ModError):
    """The node's store cannot be written."""


def default_root() -> Path:
    """``$PRUNECAST_STORE``, else ``prunecast/nodes`` in the user's cache directory."""
    if explicit := os.environ.get("PRUNECAST_STORE"):
        return Path(explicit)
    return cache_folder("nodes")


class NodeStore:
    """Files of one node in one run.

    Args:
        root: directory for all runs and nodes of this machine.
        run_id: Flower's run id.
        node_id: Flower's node id.

    Raises:
        StoreError: the directory cannot be made.
    """

    def __init__(self, root: Path, run_id: int, node_id: int) -> None:
        self._folder = root / str(run_id) / str(node_id)
        if not self._folder.is_dir():
            try:
                # what a node drops from its updates says something of its data: owner only
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise _unwritable(root, error) from error
            _remove_stale_runs(root, keep=str(run_id))

    def _path(self, key: str, suffix: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.{suffix}"

    def held(self, key: str) -> PublishedModel | None:
        """The version held under a record key; None when there is none or its file is damaged."""
        try:
            meta, arrays = _read(self._path(key, "model"))
            tensors: dict[str, Tensor] = {}
            for (name, step, pruned, dtype), values in zip(meta["tensors"], arrays, strict=True):
                if step is None:
                    tensors[name] = RawTensor(values)
                else:
                    tensors[name] = LatticeTensor(values, step, pruned, np.dtype(dtype))
            model = PublishedModel(tensors, meta["counter"])
            return model if model.digest.hex() == meta["digest"] else None
        except _DAMAGED:
            return None

    def keep(self, key: str, model: PublishedModel) -> None:
        """Hold a version under a record key.

        Raises:
            StoreError: the file cannot be written; the old version stays.
        """
        heads: list[tuple[str, float | None, bool, str]] = []
        arrays: list[NDArray[Any]] = []
        for name, tensor in model.tensors.items():
            dtype = np.dtype(tensor.dtype).name
            if isinstance(tensor, LatticeTensor):
                heads.append((name, tensor.step, tensor.mask() is not None, dtype))
                arrays.append(tensor.q)
            else:
                heads.append((name, None, False, dtype))
                arrays.append(tensor.values)
        meta = {"tensors": heads, "counter": model.counter, "digest": model.digest.hex()}
        self._write(self._path(key, "model"), meta, arrays)

    def residual(self, key: str, accepted: str) -> dict[str, NDArray[Any]]:
        """What was kept with the last accepted reply, by name; empty at first.

        Args:
            key: record key.
            accepted: tag of the last reply the server accepted; what was staged with that reply,
                under any key, is committed now.
        """
        # of all records: the reply after the next is told about another one
        staged = self._folder.glob(f"*.pending-{accepted}") if accepted.isalnum() else ()
        for pending in staged:
            try:
                os.replace(pending, pending.with_suffix(".residual"))
            except OSError as error:
                raise _unwritable(self._folder, error) from error
        try:
            return dict(zip(*_read(self._path(key, "residual")), strict=True))
        except _DAMAGED:
            return {}

    def stage(self, key: str, tag: str, residual: Mapping[str, NDArray[Any]]) -> None:
        """Write the residual that holds if the reply with this tag is accepted.

        Raises:
            StoreError: the file cannot be written.
        """
        target = self._pending(key, tag)
        self._write(target, list(residual), residual.values())
        for old in self._folder.glob(f"{self._path(key, 'pending').name}-*"):
            if old != target:
                old.unlink(missing_ok=True)

    def _pending(self, key: str, tag: str) -> Path:
        return self._path(key, f"pending-{tag}")

    def _write(self, path: Path, meta: Any, arrays: Iterable[NDArray[Any]]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, *arrays, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8))
        try:
            write_atomically(path, buffer.getvalue())
        except StorageError as error:
            raise _unwritable(self._folder, error) from error


def _read(path: Path) -> tuple[Any, list[NDArray[Any]]]:
    """What `NodeStore._write` wrote."""
    with np.load(path, allow_pickle=False) as file:
        arrays = [file[f"arr_{index}"] for index in range(len(file.files) - 1)]
        return json.loads(bytes(file["meta"])), arrays


def _unwritable(folder: Path, error: Exception) -> StoreError:
    return StoreError(
        f"the node's store {folder} cannot be written ({error}): set PRUNECAST_STORE, or "
        "compression_mod(store=...), to a directory this user owns"
    )


def _remove_stale_runs(root: Path, *, keep: str) -> None:
    """Drop what runs left behind in which nothing was written for a month."""
    limit = time.time() - _STALE_SECONDS
    for folder in root.iterdir():
        if folder.name.isdigit() and folder.name != keep:
            with suppress(OSError):  # another node of this machine does the same at the same time
                # writing into a node's folder does not touch the time of the run's
                if max(path.stat().st_mtime for path in (folder, *folder.iterdir())) < limit:
                    shutil.rmtree(folder, ignore_errors=True)
