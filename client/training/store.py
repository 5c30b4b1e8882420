"""What a node keeps on disk between messages: the held model and the residual.

Flower's `context.state` lives in memory, crosses process borders with every message and is lost
when a SuperNode restarts. Blobs are files here, replaced atomically, before the reply is sent::

    <root>/<job>/<node id>/<record>.model          the version this node holds
    <root>/<job>/<node id>/<record>.residual       what no reply under way has taken along
    <root>/<job>/<node id>/<record>.pending-<tag>  what the reply with this tag dropped
    <root>/<job>/<node id>/<record>.taken-<tag>    the residual that this reply took along
    <root>/<job>/<node id>/attempt                 how often the job was resumed, as far as is known
    <root>/<job>/<node id>/turn                    its lock: see `NodeStore.alone`

A job is Flower's run, or what several runs of Flower go on with under one name; its folder is the
run's id, or follows from a digest of the name (`prunecast.compression.flower.job_id`), since a name
comes from outside. `prunecast.client.training.housekeeping` says when it goes.

A reply takes the whole residual along, so that one which is encoded while it is still under way
begins with none. Once the server says that it accepted the reply, what the reply dropped is added
to the residual; once it says that it gave the reply up, what the reply took along is put back. So
every residual counts once, however many replies are under way, are lost or arrive late.

A server that was resumed does not know the tags of what it sent after its checkpoint: with the
first message of the new attempt all is given up that it does not accept, and what an earlier
attempt still has under way on this node is not kept any more.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.client.training.housekeeping import (
    NAME,
    enter,
    folder_of,
    make,
    make_room,
    say_finished,
    tidy,
)
from prunecast.common.files import StorageError, remove_abandoned, write_atomically
from prunecast.compression.flower import job_id
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    RawTensor,
    Tensor,
    VersionsError,
)

__all__ = [
    "ModError",
    "NodeStore",
    "NonFiniteUpdate",
    "StoreError",
    "plan_of",
]

_ATTEMPT, _TURN = "attempt", "turn"
_LONGEST_NUMBER = 20  # digits of 64 bits
_TAGS = 64  # that a residual remembers to have been added
_DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError),
    *(zipfile.BadZipFile, VersionsError, PlanError),
)


class ModError(RuntimeError):
    """A message cannot be understood, or a reply cannot be encoded; Flower reports it."""


class NonFiniteUpdate(ModError):
    """Local training produced NaN or infinity."""


class StoreError(ModError):
    """The node's store cannot be written, or not be read for now."""


class NodeStore:
    """Files of one node in one job.

    Args:
        root: directory for all jobs and nodes of this machine.
        job: its name, any text; Flower's run id of one that has none.
        node_id: Flower's node id.
        quota: most bytes that all jobs and nodes of this machine may keep in `root`; None for any.
            Those used longest ago make room, and never this job.

    As long as there is one, other processes leave the folder alone.
    """

    def __init__(
        self, root: Path, job: int | str, node_id: int, *, quota: int | None = None
    ) -> None:
        self._root, self._quota = root, quota
        self._folder, self._attempt, self._turns = folder_of(root, job, node_id), 0, 0
        fresh, handle = not os.path.isdir(self._folder.parent), None
        with suppress(OSError):  # said where something is to be written
            handle = enter(self._folder)
        self._leave = None if handle is None else weakref.finalize(self, os.close, handle)
        with suppress(OSError, StoreError):
            if job_id(job) != str(job) and not (name := self._folder.parent / NAME).exists():
                self._atomically(name, str(job).encode())
        if fresh:  # once for all nodes of a job: there may be thousands
            tidy(root, keep=self._folder.parent)
        with suppress(OSError):
            remove_abandoned(self._folder)

    def close(self) -> None:
        """Let other processes remove it, once it is over or room is needed."""
        if self._leave is not None:
            self._leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let other messages of this node wait that read or write what updates dropped.

        Where several are handled side by side, as in a simulation whose rounds do not wait for all,
        two replies would take one residual along.
        """
        handle = None
        with suppress(OSError):  # without locks there is nothing to wait for
            if not self._turns:
                handle = os.open(self._folder / _TURN, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(handle, fcntl.LOCK_EX)
        self._turns += 1
        try:
            yield
        finally:
            self._turns -= 1
            if handle is not None:
                os.close(handle)

    def note_end(self, *, last: bool) -> None:
        """Note whether the server says that this is the last round of the job.

        Nothing is removed yet: a job may go on all the same, or be sent a message once more. Its
        files go with the beginning of the next job on this machine.
        """
        say_finished(self._folder, last)

    def go_on(
        self, attempt: int, accepted: Iterable[str] = (), given_up: Iterable[str] = ()
    ) -> None:
        """Be of an attempt of the job, and settle what its server knows the end of.

        What is under way of an attempt before, and is not named, is given up.

        Args:
            attempt: how often the job was resumed.
            accepted: see `settle`.
            given_up: see `settle`.

        Raises:
            ModError: the job has been resumed since the message was sent.
            StoreError: a file cannot be written, or not be read for now; nothing can be staged then
                where the attempt is a new one.
        """
        self._attempt = attempt
        with self.alone():
            self.settle(accepted, given_up)
            self._begin(attempt, self._known_attempt())

    def _begin(self, attempt: int, known: int) -> None:
        if attempt == known:
            return
        if attempt < known:
            raise ModError(
                f"the job was resumed after this message was sent (attempt {attempt}, and {known} "
                "goes on): its reply would not be used"
            )
        left = {path.suffix.partition("-")[2] for path in self._staged()}
        self.settle((), left)
        self._atomically(self._folder / _ATTEMPT, str(attempt).encode())

    def _staged(self) -> list[Path]:
        return [path for kind in ("pending", "taken") for path in self._folder.glob(f"*.{kind}-*")]

    def _known_attempt(self) -> int:
        try:
            return int((self._folder / _ATTEMPT).read_text()[:_LONGEST_NUMBER])
        except FileNotFoundError:
            return 0
        except _DAMAGED:  # what cannot be read now is no reason to leave a message unanswered
            return self._attempt

    def _path(self, key: str, suffix: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.{suffix}"

    def held(self, key: str) -> PublishedModel | None:
        """The version held under a record key; None when there is none or its file is damaged."""
        return self.version(key)[0]

    def version(self, key: str) -> tuple[PublishedModel | None, str]:
        """`held`, and the text of the plan of its channels, see `plan_of`; of one file opened."""
        try:
            meta, arrays = _read(self._path(key, "model"))
            tensors: dict[str, Tensor] = {}
            for (name, step, pruned, dtype), values in zip(meta["tensors"], arrays, strict=True):
                if step is None:
                    tensors[name] = RawTensor(values)
                else:
                    tensors[name] = LatticeTensor(values, step, pruned, np.dtype(dtype))
            model = PublishedModel(tensors, meta["counter"])
            if model.digest.hex() == meta["digest"]:
                return model, str(meta.get("channels", ""))
        except _DAMAGED:
            pass
        return None, ""

    def channels(self, key: str) -> ChannelPlan | None:
        """Which channels the version held under a record key has left; None for all."""
        return plan_of(self._plan(self._path(key, "model")))

    def _plan(self, path: Path) -> str:
        """The text of the plan that a file goes by."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return str(json.loads(bytes(file["meta"])).get("channels", ""))
        except _DAMAGED as error:
            self._pass_over(error)
            return ""

    def _pass_over(self, error: Exception) -> None:
        """Take a file that is missing or damaged for an empty one.

        Raises:
            StoreError: it cannot be read for now, so that nothing may take its place.
        """
        if not isinstance(error, OSError):
            return
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        # NumPy's own has no number, and a damaged archive leads to places that no file has
        if error.errno not in (None, errno.EINVAL):
            raise _unreadable(self._folder, error) from error

    def remove(self, key: str, plan: ChannelPlan) -> None:
        """Take the channels that a plan removes out of what updates of a record have dropped.

        Each file says which plan it goes by, so that none is narrowed twice, whatever happens in
        between. What cannot be narrowed, as it is of something else, is dropped.

        Raises:
            StoreError: a file cannot be written, or not be read for now; it is as it was.
        """
        for kind in ("residual", "pending-*", "taken-*"):
            for path in self._folder.glob(self._path(key, kind).name):
                self._narrow(path, plan)

    def _narrow(self, path: Path, plan: ChannelPlan) -> None:
        if self._plan(path) == plan.to_text():
            return
        arrays, added, text = self._residual(path)
        before = plan_of(text)
        left: dict[str, NDArray[Any]] = {}
        for name, array in arrays.items():
            tensor = name.partition("\0")[0]  # after it, what the residual is of
            if tensor not in plan.kept and not plan.loses(tensor):
                tensor = tensor.partition("/")[2]  # before it, which part of a scheme's state
            if plan.loses(tensor):
                continue
            with suppress(PlanError):
                left[name] = plan.since(before).array(tensor, array)
        meta = {"names": list(left), "added": added, "channels": plan.to_text()}
        self._write(path, meta, left.values())

    def _alike(self, plans: Mapping[Path, str]) -> None:
        """Bring two files, given with the texts of their plans, to the fewer channels of both."""
        (one, first), (other, second) = ((path, plan_of(text)) for path, text in plans.items())
        for path, before, plan in ((one, first, second), (other, second, first)):
            with suppress(PlanError):
                if plan is not None and plan.since(before).kept:
                    self._narrow(path, plan)

    def keep(self, key: str, model: PublishedModel, channels: ChannelPlan | None = None) -> None:
        """Hold a version under a record key.

        Args:
            key: record key.
            model: the version.
            channels: which channels remain in it; None for all.

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
        meta |= _of(channels)
        self._write(self._path(key, "model"), meta, arrays)

    def drop(self, key: str, *, versions: bool = False, residuals: bool = False) -> None:
        """Remove what is not to be kept of a record, as far as the disk lets it."""
        kinds = ("model",) * versions + ("residual", "pending-*", "taken-*") * residuals
        for kind in kinds:
            with suppress(OSError):
                for path in self._folder.glob(self._path(key, kind).name):
                    path.unlink(missing_ok=True)

    def residual(self, key: str, accepted: str = "") -> dict[str, NDArray[Any]]:
        """What no reply under way has taken along, by name; empty at first.

        Args:
            key: record key.
            accepted: tag of a reply to settle first; "" for none.

        Raises:
            StoreError: a file cannot be written, or not be read for now.
        """
        self.settle([accepted])
        return self._residual(self._path(key, "residual"))[0]

    def stage(
        self,
        key: str,
        tag: str,
        dropped: Mapping[str, NDArray[Any]],
        channels: ChannelPlan | None = None,
    ) -> None:
        """Write what a reply drops; it takes the residual along.

        Args:
            key: record key.
            tag: of the reply; letters and digits.
            dropped: what quantisation dropped, by name.
            channels: which channels remain in it; None for all.

        Raises:
            StoreError: it cannot be written, or the job was resumed meanwhile; the residual stays
                as it was.
        """
        if self._known_attempt() != self._attempt:
            raise StoreError(
                "the job was resumed while this message was handled: its reply is of no use, and "
                "leaves nothing"
            )
        meta = {"names": list(dropped), **_of(channels)}
        self._write(self._path(key, f"pending-{tag}"), meta, dropped.values())
        try:
            os.replace(self._path(key, "residual"), self._path(key, f"taken-{tag}"))
        except FileNotFoundError:  # there was none to take along
            pass
        except OSError as error:
            with suppress(OSError):
                self._path(key, f"pending-{tag}").unlink(missing_ok=True)
            raise _unwritable(self._folder, error) from error

    def settle(self, accepted: Iterable[str], given_up: Iterable[str] = ()) -> None:
        """End what the server knows the end of; tags that are settled already are passed over.

        Args:
            accepted: tags of replies whose updates were applied: what they dropped is added to
                the residual, of every record.
            given_up: tags of replies that will not be applied: what they took along is added.

        Raises:
            StoreError: a file cannot be written, or not be read for now.
        """
        try:
            for tags, added, removed in (
                (accepted, "pending", "taken"),
                (given_up, "taken", "pending"),
            ):
                for tag in filter(str.isalnum, tags):
                    for path in self._folder.glob(f"*.{added}-{tag}"):
                        self._add(path, tag)
                    for path in self._folder.glob(f"*.{removed}-{tag}"):
                        path.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self._folder, error) from error

    def _add(self, path: Path, tag: str) -> None:
        """Add a file's arrays to its record's residual, once even if killed in between."""
        target = path.with_suffix(".residual")
        if not target.exists():
            os.replace(path, target)
            return
        before, added, text = self._residual(target)
        if tag not in added:
            more, _, other = self._residual(path)
            if text != other:
                self._alike({path: other, target: text})
                (before, _, text), (more, _, _) = map(self._residual, (target, path))
            total = _sum(before, more)
            meta = {"names": list(total), "added": [*added[-_TAGS:], tag], "channels": text}
            self._write(target, meta, total.values())
        path.unlink(missing_ok=True)

    def _residual(self, path: Path) -> tuple[dict[str, NDArray[Any]], list[str], str]:
        """The arrays of a file, the tags it remembers, and the text of its plan."""
        try:
            meta, arrays = _read(path)
            named = dict(zip(meta["names"], arrays, strict=True))
            return named, meta.get("added", []), str(meta.get("channels", ""))
        except _DAMAGED as error:
            self._pass_over(error)
            return {}, [], ""

    def _write(self, path: Path, meta: Any, arrays: Iterable[NDArray[Any]]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, *arrays, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8))
        self._make_room(path, buffer.getbuffer().nbytes)
        self._atomically(path, buffer.getvalue())

    def _make_room(self, path: Path, size: int) -> None:
        """Have the jobs that were used longest ago make room within the quota."""
        if self._quota is None:
            return
        with suppress(OSError):  # it is not there yet
            size -= path.stat().st_size
        if not make_room(self._root, self._folder.parent, self._quota, size):
            raise StoreError(
                f"the node's store may have {self._quota} bytes, which are fewer than this job "
                "alone needs: set prunecast-store-quota, or compression_mod(store_quota=...), to "
                "about four models of 32 bits for each node of this machine"
            )

    def _atomically(self, path: Path, data: bytes) -> None:
        try:
            make(self._folder)  # somebody may have removed it by hand
            write_atomically(path, data)
        except (OSError, StorageError) as error:
            raise _unwritable(self._folder, error) from error


def plan_of(text: str) -> ChannelPlan | None:
    """The plan of channels that a file's head tells; None for all, and for one that is damaged."""
    with suppress(PlanError):
        return ChannelPlan.from_text(text) if text else None
    return None


def _of(channels: ChannelPlan | None) -> dict[str, Any]:
    """What the head of a file says of the channels that remain."""
    return {} if channels is None else {"channels": channels.to_text()}


def _sum(
    before: Mapping[str, NDArray[Any]], more: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Residuals add up; an array of another layout, or not of floats, replaces the old one."""
    total = {**before, **more}
    for name, array in more.items():
        old = before.get(name)
        if old is not None and old.shape == array.shape and array.dtype.kind == "f":
            total[name] = (old + array).astype(array.dtype)
    return total


def _read(path: Path) -> tuple[Any, list[NDArray[Any]]]:
    """What `NodeStore._write` wrote."""
    with np.load(path, allow_pickle=False) as file:
        arrays = [file[f"arr_{index}"] for index in range(len(file.files) - 1)]
        return json.loads(bytes(file["meta"])), arrays


def _unwritable(folder: Path, error: Exception) -> StoreError:
    cause = error.__cause__ or error
    return StoreError(
        f"the node's store cannot be written ({getattr(cause, 'strerror', None) or cause}): make "
        f"room in {folder}, or set PRUNECAST_STORE, or compression_mod(store=...), to a directory "
        "that this user owns"
    )


def _unreadable(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"the node's store cannot be read ({error.strerror or error}), and is left as it is: see "
        f"to the disk of {folder}, or to how many files this process may open"
    )
